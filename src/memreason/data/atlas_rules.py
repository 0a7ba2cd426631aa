"""The rules behind atlas's questions: what a trace's own lines say, and what answer follows from them, true or not."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from memreason.core.trace import LETTERS, MEMORY, REASON, Question
from memreason.data.atlas_facts import Statement, read_statement, statement_true

__all__ = ["UNSETTLED", "answer_from", "asked_in", "line_kind", "memory_faults", "reason_fault", "reason_from"]

Stated = dict[tuple[str, str], Statement]  # (country in small letters, relation) -> what the lines say
ASKED = re.compile(r"(?:lie in|lies in|^is) (?P<asked>.+?)(?: the capital of .+)?\?$", re.IGNORECASE)
UNSETTLED = "the lines do not settle the question"
SAME = re.compile(r"(?P<list>.+) are (?P<verdict>the same|different)\.")
CHOSEN = re.compile(r"(?:The choice|The one in (?P<place>.+?)) is (?P<option>.+) \((?P<letter>[A-Z])\)\.")


def _stated(lines: Sequence[str]) -> Stated:
    """What memory lines say. Of two that say it of one country the first counts: it was read first."""
    found: Stated = {}
    for statement in filter(None, map(read_statement, lines)):
        found.setdefault((statement.subject.casefold(), statement.relation), statement)
    return found


def _needed(question: Question) -> list[Statement]:
    return [Statement(fact["subject"], fact["relation"], fact["object"]) for fact in question.facts or ()]


def _values(question: Question, stated: Stated, relation: str) -> list[str] | None:
    """What the lines say of each country asked about, in order; None if one of them is not spoken of."""
    keys = [(fact.subject.casefold(), relation) for fact in _needed(question) if fact.relation == relation]
    return [stated[key].value for key in keys] if all(key in stated for key in keys) else None


def asked_in(question: Question) -> str:
    """The place or name that a question asks about; empty if it compares countries with one another."""
    found = ASKED.search(question.text)
    return found["asked"] if found else ""


def _compared(question: Question, stated: Stated) -> list[str] | None:
    """The values that a true-or-false question compares."""
    relation = "capital" if question.meta["form"] == "capital_is" else "continent"
    values = _values(question, stated, relation)
    alone = question.meta["form"] in ("capital_is", "continent_is", "capital_on_continent")
    return values and ([*values, asked_in(question)] if alone else values)


def _truth(question: Question, stated: Stated) -> str | None:
    values = _compared(question, stated)
    return str(len({value.casefold() for value in values}) == 1) if values else None


def _letter(question: Question, wanted: Callable[[str], bool]) -> str | None:
    """The one choice that is wanted; None if there is none, or more than one."""
    letters = [letter for letter, choice in zip(LETTERS, question.choices or (), strict=False) if wanted(choice)]
    return letters[0] if len(letters) == 1 else None


def _value_choice(question: Question, stated: Stated) -> str | None:
    relation = _needed(question)[-1].relation
    values = _values(question, stated, relation)
    return _letter(question, lambda choice: choice.casefold() == values[0].casefold()) if values else None


def _country_choice(question: Question, stated: Stated) -> str | None:
    """The country that the lines put on the continent that is asked for."""
    if _values(question, stated, "continent") is None:
        return None
    asked = asked_in(question).casefold()
    return _letter(question, lambda choice: stated[choice.casefold(), "continent"].value.casefold() == asked)


def line_kind(text: str) -> str | None:
    """The kind that a line is by its words: it states a fact, or draws a conclusion; None if it does neither."""
    if read_statement(text):
        return MEMORY
    return REASON if SAME.fullmatch(text.strip()) or CHOSEN.fullmatch(text.strip()) else None


def memory_faults(question: Question, lines: Sequence[str]) -> list[str]:
    """What is wrong with the memory lines that the question needs: one is false, or missing."""
    stated, faults = _stated(lines), []
    for fact in _needed(question):
        one = stated.get((fact.subject.casefold(), fact.relation))
        if one is None:
            faults.append(f"no line says the {fact.relation} of {fact.subject}")
        elif not statement_true(one):
            faults.append(f"false: {one.subject}, {one.relation}, {one.value} (it is {fact.value})")
    if not faults and answer_from(question, lines) is None:
        faults.append(UNSETTLED)
    return faults


def answer_from(question: Question, lines: Sequence[str]) -> str | None:
    """The answer that follows from these memory lines by the question's form; None if they do not settle it."""
    stated = _stated(lines)
    if not question.choices:
        return _truth(question, stated)
    rule = _country_choice if question.meta["form"] == "country_on_continent" else _value_choice
    return rule(question, stated)


def reason_from(question: Question, lines: Sequence[str], answer: str | None = None) -> str | None:
    """The reason line that the question's form draws from these memory lines, or that leads to another `answer`; None
    if the lines do not settle the question."""
    follows = answer_from(question, lines)
    if follows is None:
        return None
    answer = answer or follows
    if question.choices:
        asks = question.meta["form"] == "country_on_continent"
        said = f"The one in {asked_in(question)}" if asks else "The choice"
        return f"{said} is {question.choices[LETTERS.index(answer)]} ({answer})."
    values = _compared(question, _stated(lines))
    assert values  # the lines settle it
    *first, last = values
    return f"{', '.join(first)} and {last} are {'the same' if answer == 'True' else 'different'}."


def reason_fault(question: Question, lines: Sequence[str], reason: str) -> str | None:
    """What is wrong with a reason line, given the memory lines above it; None if nothing is.

    A line of no known form is wrong too: nothing can be drawn from it.
    """
    same, chosen = SAME.fullmatch(reason.strip()), CHOSEN.fullmatch(reason.strip())
    if not question.choices and same:
        named = [part.casefold() for part in re.split(r", | and ", same["list"])]
        if (len(set(named)) == 1) != (same["verdict"] == "the same"):
            return "it calls them the same or different wrongly"
        values = _compared(question, _stated(lines))
        if values is not None and sorted(named) != sorted(value.casefold() for value in values):
            return "it compares other things than the lines above name"
        return None
    if question.choices and chosen:
        place = LETTERS.index(chosen["letter"])
        if place >= len(question.choices) or question.choices[place].casefold() != chosen["option"].casefold():
            return f"choice {chosen['letter']} is not {chosen['option']}"
        if chosen["place"] and chosen["place"].casefold() != asked_in(question).casefold():
            return f"the question does not ask about {chosen['place']}"
        follows = answer_from(question, lines)
        return f"from the lines above follows {follows}" if follows not in (None, chosen["letter"]) else None
    return "it is no step that this question asks for"
