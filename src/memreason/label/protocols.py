"""Protocols: from a question to requests, and from their replies to a draft.

A protocol is a generator, and pure: it yields a request, gets what the reply holds, yields the next one or returns a
draft. It knows of no server, no journal and no clock; the same replies always give the same draft. Steps typed while
planning, with queries that a second call answers: arXiv 2411.13504, section 3.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from memreason.core.trace import LETTERS, MEMORY, REASON, Question, Trace
from memreason.label.checks import Draft
from memreason.label.prompting import Prompts
from memreason.label.request import Failed, Request

__all__ = ["PROTOCOLS", "Protocol", "Talk"]

Talk = Generator[Request, Any, Draft]
KINDS = (MEMORY, REASON)
TRUTHS = ("True", "False")
SELF_LINE = re.compile(r"\W*(memory|reason)\W*?[:：][\s*]*(.*)", re.IGNORECASE)
SELF_ANSWER = re.compile(r"\W*the answer is\b\W*?[:：]?[\s*]*(.*)", re.IGNORECASE)


def _object(**properties: Any) -> dict[str, Any]:
    """A strict JSON schema: everything is required, nothing else is allowed."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


TEXT, KIND = {"type": "string"}, {"type": "string", "enum": list(KINDS)}


def _answers(question: Question) -> tuple[str, ...]:
    """The closed set of answers, where there is one."""
    if question.choices:
        return tuple(LETTERS[: len(question.choices)])
    return TRUTHS if question.answer in TRUTHS else ()


def _answer_form(question: Question) -> str:
    closed = _answers(question)
    if question.choices:
        return f"the letter of the right choice ({closed[0]} to {closed[-1]})"
    return '"True" or "False"' if closed else "the answer alone, as short as it can be"


def _gold(question: Question) -> str:
    if question.choices and question.answer in _answers(question):
        return f"{question.answer} ({question.choices[LETTERS.index(question.answer)]})"
    return question.answer


def _ask_steps(purpose: str, trace: Trace, prompts: Prompts) -> Request:
    question = trace.question
    closed = _answers(question)
    answer = {**TEXT, "enum": list(closed)} if closed else TEXT
    messages = prompts.messages(purpose, question, gold=_gold(question), answer_form=_answer_form(question))
    schema = _object(steps=_list(_object(kind=KIND, text=TEXT)), answer=answer)
    return Request(purpose, question.id, messages, schema)


def _read_steps(found: Any, trace: Trace) -> Draft:
    """Lines of a reply. One of an unknown kind is left out alone: the kinds of the others never shift."""
    steps = found["steps"]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise Failed("not_json", '"steps" must be a list of objects with kind and text')
    lines = [(str(step.get("kind")).strip().lower(), step.get("text")) for step in steps]
    known = tuple((kind, text) for kind, text in lines if kind in KINDS and isinstance(text, str))
    return Draft(trace.question, known, str(found["answer"]).strip(), len(lines) - len(known))


def _single(trace: Trace, prompts: Prompts) -> Talk:
    return _read_steps((yield _ask_steps("single", trace, prompts)), trace)


def _ordered(trace: Trace, prompts: Prompts) -> Talk:
    draft = _read_steps((yield _ask_steps("ordered", trace, prompts)), trace)
    kinds = [kind for kind, _ in draft.lines]
    if kinds != sorted(kinds, key=KINDS.index):
        raise Failed("order", "a memory step stands behind a reason step; write all memory steps first")
    return draft


def _plan_fill(trace: Trace, prompts: Prompts) -> Talk:
    """The memory lines come from the second call, which sees the queries alone: neither the answer nor the plan."""
    question = trace.question
    plan = _read_steps((yield _ask_steps("plan", trace, prompts)), trace)
    queries = [text for kind, text in plan.lines if kind == MEMORY]
    if not queries:
        raise Failed("kinds", "there is no memory step; write at least one of each kind")
    messages = prompts.messages("fill", question, queries=queries)
    schema = _object(facts=_list(_object(number={"type": "integer"}, text=TEXT)))
    facts = _read_facts((yield Request("fill", question.id, messages, schema)), len(queries))
    lines = tuple((kind, next(facts) if kind == MEMORY else text) for kind, text in plan.lines)
    return Draft(question, lines, plan.answer, plan.left_out)


def _read_facts(found: Any, count: int) -> Any:
    """An iterator of the facts in the order of their numbers, each of which must come once."""
    facts = found["facts"]
    if not isinstance(facts, list) or not all(isinstance(fact, dict) for fact in facts):
        raise Failed("not_json", '"facts" must be a list of objects with number and text')
    numbered = {str(fact.get("number")): fact.get("text") for fact in facts}
    wanted = [str(n) for n in range(1, count + 1)]
    missing = [n for n in wanted if not isinstance(numbered.get(n), str)]
    if missing or len(facts) != count:
        raise Failed("facts", f"{count} facts numbered 1 to {count} are needed, each once, got {len(facts)}")
    return iter([numbered[n] for n in wanted])


def _tag(trace: Trace, prompts: Prompts) -> Talk:
    """Lines that are there keep their texts and only get kinds."""
    lines = [step.text for step in trace.steps]
    if not lines:
        raise Failed("no_lines", "the question has no lines that could be tagged")
    messages = prompts.messages("tag", trace.question, lines=lines)
    kinds = (yield Request("tag", trace.question.id, messages, _object(kinds=_list(KIND))))["kinds"]
    if not isinstance(kinds, list) or len(kinds) != len(lines):
        got = len(kinds) if isinstance(kinds, list) else "no list"
        raise Failed("count", f"{len(lines)} kinds are needed, one for each line, got {got}")
    pairs = [(str(kind).strip().lower(), line) for kind, line in zip(kinds, lines, strict=True)]
    known = tuple(pair for pair in pairs if pair[0] in KINDS)
    return Draft(trace.question, known, trace.question.answer, len(pairs) - len(known))


def _self(trace: Trace, prompts: Prompts) -> Talk:
    """The model writes lines of its own and never sees the answer; a line without a kind is left out."""
    question = trace.question
    messages = prompts.messages("self", question, answer_form=_answer_form(question))
    text = yield Request("self", question.id, messages)
    lines, answer, left_out = [], "", 0
    for line in text.splitlines():
        if found := SELF_ANSWER.match(line):
            answer = found[1].strip()
            break
        if found := SELF_LINE.match(line):
            lines.append((found[1].lower(), found[2].strip()))
        else:
            left_out += bool(line.strip())
    if not answer:
        raise Failed("no_answer", 'there is no line "The answer is:"')
    return Draft(question, tuple(lines), answer, left_out)


@dataclass(frozen=True)
class Protocol:
    """`talk` makes the draft. A failed check is told to the first purpose, unless it is `blamed` on another one."""

    talk: Callable[[Trace, Prompts], Talk]
    purposes: tuple[str, ...]
    about: str
    blamed: tuple[tuple[str, str], ...] = ()  # (check, purpose)

    def to_blame(self, check: str) -> str:
        return dict(self.blamed).get(check, self.purposes[0])


PROTOCOLS = {
    "plan+fill": Protocol(
        _plan_fill,
        ("plan", "fill"),
        "one call plans, a second one that sees no answer states the facts",
        (("gives_away", "fill"), ("one_line", "fill")),
    ),
    "single": Protocol(_single, ("single",), "one call"),
    "ordered": Protocol(_ordered, ("ordered",), "one call, all memory first"),
    "tag": Protocol(_tag, ("tag",), "lines that are there get kinds"),
    "self": Protocol(_self, ("self",), "the model to be trained writes its own, without the answer"),
}
