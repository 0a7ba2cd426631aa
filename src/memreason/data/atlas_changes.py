"""Lines of atlas changed on purpose: a false one that leads to another answer, one about another country; and traces
with a false fact or a wrong step, to train on: whoever tells memory faults from reason faults must tell these apart."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from memreason.core.trace import LETTERS, MEMORY, REASON, Question, Step, Trace
from memreason.data.atlas_facts import Country, Statement, countries, read_statement, restated, statement_true
from memreason.data.atlas_rules import answer_from, asked_in, reason_from

__all__ = ["LESIONS", "false_line", "lesioned", "other_country"]


def false_line(question: Question, lines: Sequence[str], draw: random.Random) -> tuple[list[str], str] | None:
    """The lines with one of them made false so that another answer follows, and that answer.

    None if the lines settle nothing, or no false value of any of them changes the answer.
    """
    before = answer_from(question, lines)
    if before is None:
        return None
    for place in draw.sample(range(len(lines)), len(lines)):
        statement = read_statement(lines[place])
        if statement is None:
            continue
        for value in _values(question, statement, draw):
            changed = [*lines[:place], restated(lines[place], value), *lines[place + 1 :]]
            after = answer_from(question, changed)
            if after not in (None, before) and not statement_true(statement._replace(value=value)):
                return changed, str(after)
    return None


def _values(question: Question, statement: Statement, draw: random.Random) -> Iterator[str]:
    """What a line might say instead: what the question names goes first, as it is what most answers hang on."""
    named = list(question.choices or filter(None, (asked_in(question),)))
    known = sorted({_value(country, statement.relation) for country in countries().values()})
    for some in (named, known):
        yield from (value for value in draw.sample(some, len(some)) if value.casefold() != statement.value.casefold())


def _value(country: Country, relation: str) -> str:
    return country.name if relation == "borders" else str(getattr(country, relation))


def other_country(question: Question, lines: Sequence[str], draw: random.Random) -> list[str] | None:
    """The lines with one of them replaced by a true one, of the same form, about a country not asked about."""
    places = [place for place, line in enumerate(lines) if read_statement(line)]
    if not places:
        return None
    place = draw.choice(places)
    statement = read_statement(lines[place])
    assert statement is not None
    asked = {statement.subject, *question.meta.get("countries", ())}
    others = [country for name, country in countries().items() if name not in asked and country.neighbours]
    other = draw.choice(others)
    value = (
        draw.choice(sorted(other.neighbours)) if statement.relation == "borders" else _value(other, statement.relation)
    )
    return [*lines[:place], restated(lines[place], value, other.name), *lines[place + 1 :]]


def _with_wrong_step(question: Question, lines: Sequence[str], draw: random.Random) -> tuple[Sequence[str], str]:
    """True lines, and an answer that does not follow from them."""
    answers = LETTERS[: len(question.choices)] if question.choices else ("True", "False")
    return lines, draw.choice([answer for answer in answers if answer != question.answer])


LESIONS: dict[str, Callable[..., tuple[Sequence[str], str] | None]] = {
    "facts": false_line,
    "rules": _with_wrong_step,
}


def lesioned(traces: Sequence[Trace], lesion: str, share: float, seed: int = 0) -> list[Trace]:
    """A share of labelled traces lesioned: in their `facts`, from which everything behind is drawn rightly, or in
    their `rules`, a wrong step from true facts. Their gold answers are then what the lesioned traces come to."""
    draw, found = random.Random(seed), []
    for trace in traces:
        question, lines = trace.question, [step.text for step in trace.of_kind(MEMORY)]
        changed = LESIONS[lesion](question, lines, draw) if draw.random() < share else None
        if changed is None:
            found.append(trace)
            continue
        memory, answer = changed
        reason = reason_from(question, memory, answer)
        assert reason is not None
        steps = (*(Step((MEMORY,), line) for line in memory), Step((REASON,), reason))
        found.append(Trace(replace(question, answer=answer), steps))
    return found
