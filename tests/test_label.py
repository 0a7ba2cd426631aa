"""Labelling without a server: protocols, checks, replies, prompts, the journal, prices."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memreason.core.errors import DataError, RecipeError, StorageError
from memreason.core.labelling import ChecksRecipe, LabelRecipe, TeacherRecipe, load_label_recipe
from memreason.core.recipe import shipped
from memreason.core.trace import Question, Step, Trace
from memreason.label.checks import CHECKS, Draft, problems, problems_of
from memreason.label.journal import Journal, Kept
from memreason.label.outcome import Outcome, label_trace
from memreason.label.prices import Price, estimate, price_of
from memreason.label.prompting import Prompts
from memreason.label.protocols import PROTOCOLS
from memreason.label.request import Failed, Reply, Request, content_of, key_of
from memreason.label.run import Job

QUESTION = Question("Is Lima the capital of Peru?", "True")
CHOICE = Question("Which is the capital of Peru?", "B", choices=("Quito", "Lima", "La Paz"))
GOOD = [
    {"kind": "memory", "text": "Lima is the seat of government of Peru."},
    {"kind": "reason", "text": "The seat of government of Peru is its capital."},
]


def right(trace: Trace) -> bool:
    return trace.prediction == trace.question.answer


def drive(
    question: Question | Trace, protocol: str, replies: Sequence[Any], **changes: Any
) -> tuple[Outcome, list[Request]]:
    """Play replies (objects become JSON) into a protocol; returns the outcome and what was asked."""
    trace = question if isinstance(question, Trace) else Trace(question, ())
    recipe = LabelRecipe(protocol=protocol, **changes)  # type: ignore[arg-type]
    talk = label_trace(trace, recipe, Job(recipe, right).prompts, right)
    asked, waiting = [], list(replies)
    try:
        asked.append(next(talk))
        while True:
            reply = waiting.pop(0)
            asked.append(talk.send(reply if isinstance(reply, Reply) else Reply(_text(reply))))
    except StopIteration as done:
        assert not waiting, "replies were left over"
        return done.value, asked


def _text(reply: Any) -> str:
    return reply if isinstance(reply, str) else json.dumps(reply)


def counts(outcome: Outcome) -> dict[str, int]:
    """How often each check failed on the way."""
    return Counter(name for entry in outcome.history for name in entry["checks"])


def lines(outcome: Outcome) -> list[tuple[str, str]]:
    assert outcome.trace is not None
    return [(step.kinds[0], step.text) for step in outcome.trace.steps]


def test_single() -> None:
    outcome, asked = drive(QUESTION, "single", [{"steps": GOOD, "answer": "True"}])
    assert outcome.status == "accepted"
    assert lines(outcome) == [(step["kind"], step["text"]) for step in GOOD]
    assert outcome.trace is not None and outcome.trace.prediction is None
    assert outcome.trace.meta["label"]["protocol"] == "single"
    assert asked[0].schema is not None
    assert asked[0].schema["properties"]["answer"]["enum"] == ["True", "False"]
    assert asked[0].schema["properties"]["steps"]["items"]["properties"]["kind"]["enum"] == ["memory", "reason"]


def test_plan_and_fill_takes_the_second_replies_and_hides_the_answer() -> None:
    """The published code drops the second call's answers: the memory lines are the planner's own."""
    question = Question("Who wrote it?", "the zebra author")
    plan = [
        {"kind": "memory", "text": "Who wrote the book?"},
        {"kind": "reason", "text": "So the author wrote the book."},
        {"kind": "memory", "text": "When was the book written?"},
    ]
    facts = [{"number": 2, "text": "The book was written late."}, {"number": 1, "text": "The author wrote the book."}]
    outcome, asked = drive(question, "plan+fill", [{"steps": plan, "answer": "the zebra author"}, {"facts": facts}])
    assert lines(outcome) == [
        ("memory", "The author wrote the book."),
        ("reason", "So the author wrote the book."),
        ("memory", "The book was written late."),
    ]
    assert "zebra" in json.dumps(asked[0].messages)
    assert "zebra" not in json.dumps(asked[1].messages)
    assert "So the author" not in json.dumps(asked[1].messages)


def test_a_failed_fill_asks_the_fill_again_and_a_failed_plan_both() -> None:
    plan = {"steps": [{"kind": "memory", "text": "Where is the seat of government?"}, GOOD[1]], "answer": "True"}
    short, fill = {"facts": []}, {"facts": [{"number": 1, "text": "Lima is the seat of government of Peru."}]}
    outcome, asked = drive(QUESTION, "plan+fill", [plan, short, plan, fill])
    assert outcome.status == "accepted"
    assert [request.purpose for request in asked] == ["plan", "fill", "plan", "fill"]
    assert asked[2] == asked[0]  # the journal has its reply
    assert "numbered 1 to 1" in asked[3].messages[-1]["content"]
    wrong = {**plan, "answer": "False"}
    outcome, asked = drive(QUESTION, "plan+fill", [wrong, fill, plan, fill])
    assert [entry["purpose"] for entry in outcome.history] == ["plan"]
    assert "the right one is 'True'" in asked[2].messages[-1]["content"]
    assert asked[2].messages[-2] == {"role": "assistant", "content": json.dumps(wrong)}


def test_ordered_wants_memory_first() -> None:
    outcome, asked = drive(
        QUESTION, "ordered", [{"steps": GOOD[::-1], "answer": "True"}, {"steps": GOOD, "answer": "True"}]
    )
    assert outcome.status == "accepted" and counts(outcome) == {"order": 1}
    assert "write all memory steps first" in asked[1].messages[-1]["content"]


def test_tag_keeps_texts() -> None:
    trace = Trace(QUESTION, (Step((), "Lima is the seat of Peru."), Step((), "So Lima is the capital of Peru.")))
    outcome, asked = drive(trace, "tag", [{"kinds": ["memory"]}, {"kinds": ["memory", "reason"]}])
    assert lines(outcome) == [("memory", "Lima is the seat of Peru."), ("reason", "So Lima is the capital of Peru.")]
    assert counts(outcome) == {"count": 1}
    assert "1. Lima is the seat of Peru." in asked[0].messages[1]["content"]
    nothing, asked = drive(QUESTION, "tag", [])
    assert nothing.status == "rejected" and not asked


def test_self_never_sees_the_answer_and_is_kept_if_right() -> None:
    question = Question("Who is the author of the book?", "the zebra author")
    said = "Memory: The book names its author.\n- **Reason:** The author is named.\nWell.\nThe answer is: {}"
    outcome, asked = drive(question, "self", [said.format("nobody"), said.format("the zebra author")])
    assert outcome.status == "accepted" and counts(outcome) == {"answer": 1}
    assert lines(outcome)[1] == ("reason", "The author is named.")
    assert outcome.trace is not None and outcome.trace.meta["label"]["left_out"] == 1
    assert "zebra" not in json.dumps(asked[0].messages) and asked[0].schema is None
    assert "zebra" not in json.dumps(asked[1].messages)


def test_an_unknown_kind_rejects_its_step_and_kinds_never_shift() -> None:
    steps = [GOOD[0], {"kind": "opinion", "text": "Lima is nice."}, GOOD[1]]
    outcome, _ = drive(QUESTION, "single", [{"steps": steps, "answer": "True"}])
    assert lines(outcome) == [(step["kind"], step["text"]) for step in GOOD]
    assert outcome.trace is not None and outcome.trace.meta["label"]["left_out"] == 1


def test_attempts_end_in_a_rejection_with_its_history() -> None:
    bad = {"steps": GOOD[:1], "answer": "True"}
    outcome, asked = drive(QUESTION, "single", [bad, "no JSON", bad], attempts=3)
    assert outcome.status == "rejected" and outcome.trace is None and len(asked) == 3
    assert [entry["checks"] for entry in outcome.history] == [["kinds", "length"], ["not_json"], ["kinds", "length"]]
    assert outcome.history[1]["reply"] == "no JSON"


FAILURES = {
    "no_content": Reply(None),
    "truncated": Reply('{"steps": [', "length"),
    "refused": Reply(None, refusal="I can't help with that."),
    "not_json": Reply("Here you are: nothing."),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failed_replies_are_named(name: str) -> None:
    outcome, _ = drive(QUESTION, "single", [FAILURES[name], {"steps": GOOD, "answer": "True"}])
    assert outcome.status == "accepted" and counts(outcome) == {name: 1}


@pytest.mark.parametrize(
    "text",
    [
        '{"kinds": ["memory"]}',
        '<think>{"kinds": []}</think>\n{"kinds": ["memory"]}',
        'Sure:\n```json\n{"kinds": ["memory"]}\n```',
        '{"kinds": ["memory",]',
        "Sure: {'kinds': ['memory']}",
    ],
)
def test_json_is_found_and_repaired(text: str) -> None:
    request = Request("tag", "id", (), {"required": ["kinds"]})
    assert content_of(Reply(text), request) == {"kinds": ["memory"]}


@pytest.mark.parametrize("text", ["I'm sorry, but I can't do that.", "I cannot answer."])
def test_refusals_in_words(text: str) -> None:
    with pytest.raises(Failed) as found:
        content_of(Reply(text), Request("tag", "id", (), {"required": ["kinds"]}))
    assert found.value.name == "refused"


FACT, CONCLUSION = ("memory", "Lima is the seat of government."), ("reason", "The seat of government is the capital.")
WRONG = {
    "kinds": [(FACT, ("memory", "Peru lies in South America.")), (("reason", "Peru has a capital."), CONCLUSION)],
    "empty": [(FACT, ("memory", " - "), CONCLUSION)],
    "duplicate": [(FACT, ("memory", "Lima is the seat of government!"), CONCLUSION)],
    "one_line": [(("memory", "Lima is the seat.\nIt is in Peru."), CONCLUSION)],
    "gives_away": [
        (("memory", text), CONCLUSION)
        for text in (
            "So the answer is plain from the seat of government.",
            "Yes, Lima is the seat of government.",
            "The statement on Lima and the seat of government is true.",
            "Lima, the seat of government, is the correct choice.",
        )
    ],
    "uses_above": [(FACT, ("reason", "Bananas are yellow fruit."))],
    "length": [(FACT, ("reason", "the capital " * 60)), (FACT, *[("reason", f"Capital {n}.") for n in range(12)])],
    "language": [
        (
            ("memory", "Lima ist der Sitz der Regierung von Peru und liegt an der Küste des Pazifischen Ozeans."),
            ("reason", "Der Sitz der Regierung von Peru ist die Hauptstadt des Landes, also ist Lima die Hauptstadt."),
        )
    ],
}


@pytest.mark.parametrize(("name", "draft"), [(name, draft) for name, drafts in WRONG.items() for draft in drafts])
def test_checks(name: str, draft: tuple[tuple[str, str], ...]) -> None:
    question = Question("Is Lima the capital of the country that is called Peru?", "True")
    found = [check for check, _ in problems_of(Draft(question, draft, "True"), ChecksRecipe())]
    assert set(found) == {name}
    assert not problems_of(Draft(question, draft, "True"), ChecksRecipe(skip=[name]))  # type: ignore[list-item]


@pytest.mark.parametrize("text", ["Option B is in Peru.", "Lima (B) is in Peru.", "B. Lima is in Peru."])
def test_a_letter_gives_the_answer_away(text: str) -> None:
    draft = Draft(CHOICE, (("memory", text), ("reason", "Lima lies in Peru.")), "B")
    assert [name for name, _ in problems_of(draft, ChecksRecipe())] == ["gives_away"]
    assert not problems_of(replace(draft, question=QUESTION), ChecksRecipe())  # no letters, no choices


def test_good_traces_pass_every_check() -> None:
    steps = tuple(Step((step["kind"],), step["text"]) for step in GOOD)
    assert not problems(Trace(QUESTION, steps))
    assert {*WRONG} == {*CHECKS}
    chinese = Question("利马是秘鲁的首都吗？", "True")
    assert not problems(
        Trace(chinese, (Step(("memory",), "利马是秘鲁政府的所在地。"), Step(("reason",), "所以首都是利马。")))
    )


def test_prompts_are_files_that_a_user_replaces(tmp_path: Path) -> None:
    shipped = Prompts(["single"])
    (tmp_path / "single.j2").write_text("{% block user %}Label: {{ question.text }} {{ gold }}{% endblock %}")
    own = Prompts(["single"], tmp_path)
    assert own.messages("single", QUESTION, gold="True") == (
        {"role": "user", "content": "Label: Is Lima the capital of Peru? True"},
    )
    assert own.version != shipped.version == Prompts(["single"]).version
    with pytest.raises(RecipeError, match="'gold' is undefined"):
        own.messages("single", QUESTION)
    (tmp_path / "single.j2").write_text("{% block user %}{{ question.text }")
    with pytest.raises(RecipeError, match=r"prompts: single\.j2"):
        own.messages("single", QUESTION)
    with pytest.raises(RecipeError, match="is no folder"):
        Prompts(["single"], tmp_path / "none")


@pytest.mark.parametrize("purpose", [purpose for protocol in PROTOCOLS.values() for purpose in protocol.purposes])
def test_shipped_prompts_hold_question_and_rules(purpose: str) -> None:
    given = {"gold": "B (Lima)", "answer_form": "a letter", "queries": ["What is Lima?"], "lines": ["Lima is big."]}
    messages = Prompts([purpose]).messages(purpose, CHOICE, **given)
    assert [message["role"] for message in messages][:2] == ["system", "user"]
    whole = "\n".join(message["content"] for message in messages)
    assert ("Which is the capital of Peru?\nA. Quito\nB. Lima" in whole) == (purpose != "fill")
    assert "JSON" in messages[0]["content"] or purpose == "self"  # OpenAI's JSON mode wants the word


def test_keys_name_what_is_asked() -> None:
    request, teacher = Request("single", "q", ({"role": "user", "content": "a"},)), TeacherRecipe(model="m")
    key = key_of(request, teacher, 0)
    assert key == key_of(request, teacher.model_copy(update={"endpoints": [], "structured": "json"}), 0)
    others = [
        key_of(request, teacher, 1),
        key_of(request, teacher, 0, "weights"),
        key_of(replace(request, purpose="plan"), teacher, 0),
        key_of(replace(request, question="other"), teacher, 0),
        key_of(request, teacher.model_copy(update={"model": "n"}), 0),
        key_of(request, teacher.model_copy(update={"temperature": 1.0}), 0),
    ]
    assert len({key, *others}) == 7


def test_journal_claims_replies_and_outcomes(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    one, two = Journal(path, "a"), Journal(path, "a")
    assert one.claim(["q1", "q2"]) == {"q1", "q2"}
    assert two.claim(["q1", "q3"]) == {"q3"}
    one.settle("q1", Outcome("accepted", Trace(QUESTION, ())))
    one.settle("q2", Outcome("failed"))
    assert two.claim(["q1", "q2"]) == {"q2"}  # it failed, so it is asked again
    other = Journal(path, "b")  # another labelling
    assert other.claim(["q1"]) == {"q1"}
    other.close()
    one.keep(Kept("k", "q1", "single", 0, "m", Reply("text", prompt_tokens=3)))
    two.keep(Kept("k", "q1", "single", 0, "m", Reply("later", prompt_tokens=5)))
    assert one.find("k") == two.find("k") == Reply("text", prompt_tokens=3)
    assert two.find("other") is None
    two.close()
    assert one.claim(["q3"]) == {"q3"}
    usage = {"replies": 1, "prompt_tokens": 3, "completion_tokens": 0, "seconds": 0.0}
    usage |= {"batch_prompt_tokens": 0, "batch_completion_tokens": 0}
    assert one.usage() == one.usage(["q1"]) == usage
    assert [line["content"] for line in one.export()] == ["text"]
    one.close()
    assert not list(tmp_path.glob(".*.lock"))


def test_a_full_disk_loses_no_reply(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite", "a")
    journal.keep(Kept("k", "q", "single", 0, "m", Reply("text")))
    journal.base.execute("pragma max_page_count = 12")
    with pytest.raises(StorageError, match=r"journal\.sqlite: cannot be written .*full"):
        journal.keep(Kept("large", "q", "single", 0, "m", Reply("x" * 100_000)))
    assert journal.find("k") == Reply("text") and journal.find("large") is None
    journal.base.execute("pragma max_page_count = 1000")
    journal.keep(Kept("large", "q", "single", 0, "m", Reply("x" * 100_000)))
    journal.close()


def test_journals_merge(tmp_path: Path) -> None:
    one, two = (Journal(tmp_path / name, "a") for name in ("one", "two"))
    one.keep(Kept("k1", "q1", "single", 0, "m", Reply("mine")))
    two.keep(Kept("k1", "q1", "single", 0, "m", Reply("theirs")))
    two.keep(Kept("k2", "q2", "single", 0, "m", Reply("text")))
    two.settle("q2", Outcome("accepted", Trace(QUESTION, ())))
    two.settle("q1", Outcome("failed"))
    one.settle("q2", Outcome("failed"))
    one.merge(tmp_path / "two")
    assert [one.find(key) for key in ("k1", "k2")] == [Reply("mine"), Reply("text")]
    found = one.outcome("q2")
    assert found is not None and found[0] == "accepted" and one.outcome("q1") is None
    with pytest.raises(DataError, match="no such journal"):
        one.merge(tmp_path / "three")
    (tmp_path / "text").write_text("no database at all, only text")
    with pytest.raises(DataError, match="cannot be read as a journal"):
        one.merge(tmp_path / "text")
    sqlite3.connect(tmp_path / "foreign").execute("create table replies (key text)")
    with pytest.raises(DataError, match="foreign: cannot be read as a journal"):
        Journal(tmp_path / "four", "a").merge(tmp_path / "foreign")
    with pytest.raises(DataError, match="cannot be opened as a journal"):
        Journal(tmp_path / "text")


def test_prices_and_estimates(tmp_path: Path) -> None:
    assert price_of("gpt-4o-mini-2024-07-18") == Price(0.15, 0.60)
    assert price_of("gpt-4o-2024-08-06") == Price(2.50, 10.0)
    assert price_of("my-own") is None
    table = tmp_path / "prices.yaml"
    table.write_text("my-own: [1, 2]\ngpt-4o: [9, 9]\n")
    assert price_of("my-own-7b", table) == Price(1, 2)
    assert price_of("gpt-4o", table) == Price(9, 9)
    table.write_text("my-own: 3\n")
    with pytest.raises(RecipeError, match="must map model names"):
        price_of("my-own", table)
    usage = {"replies": 20, "prompt_tokens": 10_000, "completion_tokens": 2_000, "seconds": 32.0}
    teacher = LabelRecipe().teacher
    found = estimate(10, 1000, usage, teacher, Price(1, 10))
    assert found["dollars"] == pytest.approx(1.0 + 2.0) and found["batch_dollars"] == pytest.approx(1.5)
    assert found["seconds"] == pytest.approx(100 * 32 / 16) and found["replies"] == 2000
    limited = [teacher.endpoints[0].model_copy(update={"requests_per_minute": 100})]
    found = estimate(10, 1000, usage, teacher.model_copy(update={"endpoints": limited}), None)
    assert found["seconds"] == pytest.approx(20 * 60) and found["dollars"] is None


def test_recipes_name_every_mistake() -> None:
    wrong = {
        "protocol": "both",
        "shard": "4/3",
        "teacher.endpoints": [{"base_url": "http://me:secret@host/v1"}, {"base_url": "host/v1"}],
        "attempts": 0,
        "color": 1,
    }
    with pytest.raises(RecipeError) as found:
        load_label_recipe(None, wrong)
    text = str(found.value)
    assert len(found.value.problems) == 6
    assert "no keys in base_url" in text and "secret" not in text
    assert "shard: K must not exceed N, got 4/3" in text


@pytest.mark.parametrize("name", shipped("label"))
def test_shipped_recipes_are_understood(name: str) -> None:
    recipe = load_label_recipe(name)
    assert load_label_recipe(None, recipe.model_dump(mode="json")) == recipe
    assert recipe.folder == Path("labels/strategyqa-train")
