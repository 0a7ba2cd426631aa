"""Does the tag control anything, and does the answer follow the memory? Interventions on the same questions.

Every intervention gives the model a trace's beginning, changed in one way, and lets it write everything behind. It is
compared with the same beginning unchanged (`own`), question by question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memreason.core.trace import MEMORY, REASON, Question, Step, Trace
from memreason.data.atlas_changes import false_line, other_country
from memreason.encode.codec import Codec
from memreason.encode.scheme import ANSWER, PREFIX
from memreason.measure.score import score_trace
from memreason.measure.stats import mcnemar_exact, paired_bootstrap, wilson

__all__ = ["MEANINGS", "PROBES", "Begun", "Case", "begun", "cases_of", "probe_table"]

DRAWS = 2000


@dataclass(frozen=True)
class Case:
    """A generated trace, the gold one of its question, and that of another question of the same form."""

    made: Trace
    gold: Trace
    other: Trace

    def draw(self, name: str) -> random.Random:
        return random.Random(f"{name} {self.made.question.id}")


@dataclass(frozen=True)
class Begun:
    """Ids that are given behind the question. `answer`: what follows from them, where it is known and not what
    followed before. `forced` is the kind whose block stands last, `step` the number of the line that it opens, and
    `chosen` the kind that the model itself gave that line."""

    ids: list[int]
    answer: str | None = None
    forced: str | None = None
    chosen: str | None = None
    step: int = 0


Begin = Callable[[Codec, Case], Begun | None]  # None where it cannot be done


def _on(codec: Codec, lines: Sequence[Step]) -> list[int]:
    return codec.step_ids(lines) + list(codec.block(PREFIX))


def _memory(case: Case) -> list[Step]:
    return case.made.of_kind(MEMORY)


def _own(codec: Codec, case: Case) -> Begun | None:
    return Begun(_on(codec, _memory(case)))


def _gold(codec: Codec, case: Case) -> Begun | None:
    return Begun(_on(codec, case.gold.of_kind(MEMORY))) if case.gold.of_kind(MEMORY) else None


def _texts(case: Case) -> list[str]:
    return [step.text for step in _memory(case)]


def _as_memory(lines: Sequence[str]) -> list[Step]:
    return [Step((MEMORY,), text) for text in lines]


def _false(codec: Codec, case: Case) -> Begun | None:
    if "form" not in case.made.question.meta:  # only atlas knows what follows from a false line
        return None
    found = false_line(case.made.question, _texts(case), case.draw("false"))
    return Begun(_on(codec, _as_memory(found[0])), answer=found[1]) if found else None


def _entity(codec: Codec, case: Case) -> Begun | None:
    """On atlas a line of the same form about another country, else one of another question's."""
    lines, draw = _texts(case), case.draw("entity")
    if "form" in case.made.question.meta:
        changed = other_country(case.made.question, lines, draw)
        return Begun(_on(codec, _as_memory(changed))) if changed else None
    others = [step.text for step in case.other.of_kind(MEMORY)]
    if not lines or not others:
        return None
    lines[draw.randrange(len(lines))] = draw.choice(others)
    return Begun(_on(codec, _as_memory(lines)))


def _delete(codec: Codec, case: Case) -> Begun | None:
    lines = _memory(case)
    if not lines:
        return None
    del lines[case.draw("delete").randrange(len(lines))]
    return Begun(_on(codec, lines))


def _no_reason(codec: Codec, case: Case) -> Begun | None:
    """The reason lines are left out: the block of the answer stands behind the memory lines."""
    return Begun(codec.step_ids(_memory(case)) + list(codec.block(PREFIX, ANSWER)))


def _blocks(change: Callable[[Codec, Step, random.Random], Sequence[int]], name: str) -> Begin:
    """Own memory lines whose texts stay and whose blocks are changed."""

    def begin(codec: Codec, case: Case) -> Begun | None:
        draw, ids = case.draw(name), list[int]()
        for step in _memory(case):
            text = codec.encode(codec.scheme.line_text(step.text))
            ids += [*change(codec, step, draw), *text]
        return Begun(ids + list(codec.block(PREFIX)))

    return begin


def _swapped(codec: Codec, step: Step, draw: random.Random) -> Sequence[int]:
    return codec.block(PREFIX, REASON)


def _dropped(codec: Codec, step: Step, draw: random.Random) -> Sequence[int]:
    return ()


def _shuffled(codec: Codec, step: Step, draw: random.Random) -> Sequence[int]:
    """As many planning tokens, of any block and in any order."""
    known = [token for block in codec.blocks.values() for token in block]
    return [draw.choice(known) for _ in codec.block(PREFIX, *step.kinds)]


def _random(codec: Codec, step: Step, draw: random.Random) -> Sequence[int]:
    """As many rows of the vocabulary as it was before training."""
    planning = {token for block in codec.blocks.values() for token in block}
    known = [n for n in range(min(planning, default=codec.eos_id)) if n != codec.eos_id]
    return [draw.choice(known) for _ in codec.block(PREFIX, *step.kinds)]


def _forced(kind: str) -> Begin:
    """Behind some of the trace's own lines, how many is drawn: the block of a kind."""

    def begin(codec: Codec, case: Case) -> Begun | None:
        steps = case.made.steps
        if kind not in codec.scheme.kinds or not steps:
            return None
        place = case.draw("forced").randrange(len(steps))  # the same one for each kind
        ids = codec.step_ids(steps[:place]) + list(codec.block(PREFIX, kind))
        return Begun(ids, forced=kind, chosen=next(iter(steps[place].kinds), None), step=place)

    return begin


PROBES: dict[str, Begin] = {
    "own": _own,
    "swap": _blocks(_swapped, "swap"),
    "drop": _blocks(_dropped, "drop"),
    "shuffle": _blocks(_shuffled, "shuffle"),
    "random": _blocks(_random, "random"),
    "false": _false,
    "gold": _gold,
    "entity": _entity,
    "delete": _delete,
    "no-reason": _no_reason,
    "force-memory": _forced(MEMORY),
    "force-reason": _forced(REASON),
}
MEANINGS = {
    "own": "own memory lines, unchanged",
    "swap": "blocks of reason before the memory lines",
    "drop": "no blocks before the memory lines",
    "shuffle": "other planning tokens before the memory lines",
    "random": "ordinary tokens before the memory lines",
    "false": "one memory line made false",
    "gold": "the gold memory lines",
    "entity": "one memory line about something else",
    "delete": "one memory line left out",
    "no-reason": "no reason line, the answer at once",
    "force-memory": "next line forced to be memory",
    "force-reason": "next line forced to be reason",
}


def cases_of(made: Sequence[Trace], gold: Mapping[str, Trace]) -> list[Case]:
    """Generated traces beside the gold ones (by question id); the other question is the next of the same form."""
    rows: dict[Any, list[Trace]] = {}
    for trace in made:
        rows.setdefault(trace.question.meta.get("form"), []).append(trace)
    return [
        Case(trace, gold[trace.question.id], gold[row[(place + 1) % len(row)].question.id])
        for row in rows.values()
        for place, trace in enumerate(row)
    ]


def begun(name: str, codec: Codec, cases: Sequence[Case]) -> dict[str, Begun]:
    """Question id -> what an intervention gives; the questions that it cannot be done on are left out."""
    made = {case.made.question.id: PROBES[name](codec, case) for case in cases}
    return {question: one for question, one in made.items() if one is not None}


def probe_table(
    tried: Mapping[str, Mapping[str, tuple[Begun, Trace]]], kind_of: Callable[[Question, str], str | None]
) -> dict[str, Any]:
    """What each intervention changed, and the two numbers that sum up. `tried`: intervention -> question id -> what
    was given and the trace that came of it; `kind_of` reads a line's kind from its words.

    memory_reliance: how often the answer is the one that follows from a line made false. tag_control: how often a
    forced kind, where the model itself chose another, gives a line of that kind.
    """
    own = {question: trace for question, (_, trace) in tried["own"].items()}
    follows = [score_trace(trace).extracted == given.answer for given, trace in tried.get("false", {}).values()]
    forced = [
        (given.forced, given.forced != given.chosen, _kind_at(trace, given.step, kind_of) == given.forced)
        for found in tried.values()
        for given, trace in found.values()
        if given.forced
    ]
    return {
        "n": len(own),
        "interventions": [_effect(name, found, own) for name, found in tried.items() if name != "own" and found],
        "memory_reliance": _share(follows),
        "tag_control": _share([right for _, against, right in forced if against]),
        "forced": [
            {
                "kind": kind,
                "against": against,
                **_share([right for *where, right in forced if where == [kind, against]]),
            }
            for kind, against in sorted({(kind, against) for kind, against, _ in forced})
        ],
    }


def _kind_at(trace: Trace, place: int, kind_of: Callable[[Question, str], str | None]) -> str | None:
    return kind_of(trace.question, trace.steps[place].text) if place < len(trace.steps) else None


def _effect(name: str, found: Mapping[str, tuple[Begun, Trace]], own: Mapping[str, Trace]) -> dict[str, Any]:
    pairs = [(score_trace(own[question]), score_trace(trace)) for question, (_, trace) in found.items()]
    groups = [trace.question.group for _, trace in found.values()]
    before, after = ([pair[n].verdict == "correct" for pair in pairs] for n in (0, 1))
    difference, *interval = paired_bootstrap(after, before, groups, samples=DRAWS)
    return {
        "name": name,
        "meaning": MEANINGS[name],
        "n": len(pairs),
        "before": _share(before),
        "accuracy": _share(after),
        "difference": difference,
        "interval": interval,
        "p": mcnemar_exact(before, after),
        "changed": sum(a.extracted != b.extracted for a, b in pairs) / len(pairs),
        "no_answer": sum(b.verdict == "no_answer" for _, b in pairs) / len(pairs),
    }


def _share(values: Sequence[bool]) -> dict[str, Any]:
    share = sum(values) / len(values) if values else None
    return {"n": len(values), "share": share, "wilson": list(wilson(sum(values), len(values))) if values else None}
