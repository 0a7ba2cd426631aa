"""The embedded default task: real facts of countries, composed into questions by a rule.

Gold traces are written by the same rule: memory lines state facts, reason lines combine those above.
Train, validation and test share no country, so a test answer must be recalled from pre-training.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from memreason.core.errors import TaskError
from memreason.core.trace import MEMORY, REASON, Question, Step, Trace
from memreason.data.atlas_facts import borders, countries, memory_line_true, split_of
from memreason.data.atlas_forms import FORMS, Draft, Pool

__all__ = ["FORMS", "atlas_table", "make_atlas", "memory_line_true"]

PATIENCE = 400  # draws without a new question before a form counts as used up


def _pool(split: str, obscurity: tuple[float, float] | None) -> Pool:
    low, high = obscurity or (0.0, 1.0)
    kept = [c for name, c in countries().items() if split_of()[name] == split and low <= c.rank <= high]
    return Pool(kept, [c for c in kept if c.fixed], borders([c.name for c in kept]))


def _trace(draft: Draft, form: str, split: str) -> Trace:
    about = sorted(c.name for c in draft.about)
    question = Question(
        text=draft.text,
        answer=draft.answer,
        task="atlas",
        split=split,
        choices=draft.choices,
        facts=tuple({"subject": s, "relation": relation, "object": o} for s, relation, o in draft.facts),
        meta={
            "form": form,
            "hops": FORMS[form][1],
            "group": draft.about[0].name,
            "countries": about,
            "obscurity": round(sum(c.rank for c in draft.about) / len(draft.about), 3),
        },
    )
    steps = (*(Step((MEMORY,), line) for line in draft.memory), Step((REASON,), draft.reason))
    return Trace(question, steps)


def make_atlas(
    split: str,
    n: int,
    *,
    seed: int = 0,
    hops: Sequence[int] | None = None,
    obscurity: tuple[float, float] | None = None,
    forms: Sequence[str] | None = None,
) -> list[Trace]:
    """`n` labelled traces of a split, balanced over forms and, within each, over its answers.

    `hops` keeps forms by how many facts they combine, `obscurity` countries by population rank (0 to 1).
    Raises TaskError for an unknown split or form and for more questions than there are.
    """
    unknown = [form for form in forms or () if form not in FORMS]
    if split not in ("train", "validation", "test") or unknown:
        raise TaskError(
            f"atlas has no {f'form {unknown[0]!r}' if unknown else f'split {split!r}'}. Forms: {', '.join(FORMS)}."
        )
    pool = _pool(split, obscurity)
    wanted = [form for form in forms or FORMS if not hops or FORMS[form][1] in hops]
    if len(pool.fixed) < 4 or not wanted:
        raise TaskError(
            f"atlas/{split}: hops {hops} and obscurity {obscurity} leave {len(pool.all)} countries, {len(wanted)} forms"
        )
    draws = random.Random(f"{split}-{seed}")
    traces: dict[str, Trace] = {}
    counts = dict.fromkeys(wanted, 0)
    while len(traces) < n:
        if not counts:
            raise TaskError(
                f"atlas/{split} holds only about {len(traces)} questions of these forms, {n} were asked for"
            )
        form = min(counts, key=lambda name: counts[name])
        trace = _new(form, pool, split, counts[form], draws, traces)
        if trace is None:
            del counts[form]
        else:
            traces[trace.question.id] = trace
            counts[form] += 1
    ordered = list(traces.values())
    draws.shuffle(ordered)
    return ordered


def _new(form: str, pool: Pool, split: str, slot: int, draws: random.Random, known: dict[str, Trace]) -> Trace | None:
    """A question of this form that is not there yet, or None if none was drawn in PATIENCE tries."""
    for _ in range(PATIENCE):
        draft = FORMS[form][0](draws, pool, slot)
        if draft is None or len(set(draft.choices or ())) < len(draft.choices or ()):
            continue
        trace = _trace(draft, form, split)
        if trace.question.id not in known:
            return trace
    return None


def atlas_table(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """Per form: how many, chance, and the share of the commonest answer."""
    rows = []
    for form, (_, hops, chance) in FORMS.items():
        answers = [trace.question.answer for trace in traces if trace.question.meta["form"] == form]
        if answers:
            share = max(answers.count(answer) for answer in set(answers)) / len(answers)
            rows.append({"form": form, "hops": hops, "n": len(answers), "chance": chance, "majority": share})
    return rows
