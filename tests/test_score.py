"""Answers are found or not found, never guessed; hard cases are data with their source."""

import json
from pathlib import Path
from typing import Any

import pytest

from memreason.core.trace import Question, Step, Trace
from memreason.measure.formula import same_value
from memreason.measure.score import chance, majority, question_kind, score, score_trace
from memreason.measure.stats import summarise

CASES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("answer_cases.json").read_text(encoding="utf-8"))
TRUTH = Question("Is Lima the capital of Peru?", "True")
LETTER = Question("Which is a city?", "B", choices=("Peru", "Lima", "Inca"))
TEXT = Question("What is the capital of Peru?", "Lima")


def made(case: dict[str, Any]) -> Any:
    return score(case["text"], case["gold"], choices=case["choices"], answer_kind=case.get("kind"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case["text"][-40:]))
def test_hard_cases(case: dict[str, Any]) -> None:
    found = made(case)
    assert (found.verdict, found.extracted) == (case["verdict"], case["extracted"]), case["source"]


def test_every_case_has_a_source_and_there_are_enough() -> None:
    assert len(CASES) >= 40
    assert all(case["source"] for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case["text"][-40:]))
def test_evidence_is_of_the_text_and_tells_the_answer(case: dict[str, Any]) -> None:
    found = made(case)
    assert found.evidence in case["text"]
    assert (found.extracted is None) == (found.verdict == "no_answer")
    if found.extracted and found.rule == "last phrase":  # the evidence alone gives the same answer
        again = score(found.evidence, case["gold"], choices=case["choices"], answer_kind=case.get("kind"))
        assert again.extracted == found.extracted


def test_rules_are_named() -> None:
    assert score("B", "B", choices=3).rule == "no phrase"
    assert score("The answer is: B", "B", choices=3).rule == "last phrase"
    assert score("The answer is: Lima", "B", choices=3).rule == "last phrase, no letter behind it"
    assert score("The answer is: A or B", "B", choices=3).rule == "last phrase, several answers"
    assert score_trace(Trace(LETTER, (), "B")).rule == "answer line"


@pytest.mark.parametrize(
    ("question", "prediction", "verdict"),
    [
        (TRUTH, "True", "correct"),
        (TRUTH, "no", "wrong"),
        (TRUTH, "", "no_answer"),
        (TRUTH, "perhaps", "no_answer"),
        (LETTER, "B", "correct"),
        (LETTER, "B. Lima", "correct"),
        (LETTER, "The answer is: B", "correct"),
        (LETTER, "C", "wrong"),
        (LETTER, "D", "no_answer"),
        (LETTER, " ", "no_answer"),
        (TEXT, "Lima.", "correct"),
        (TEXT, "Quito", "wrong"),
    ],
)
def test_a_trace_is_scored_by_its_prediction(question: Question, prediction: str, verdict: str) -> None:
    assert score_trace(Trace(question, (Step(("reason",), "The answer is: True"),), prediction)).verdict == verdict


def test_a_labelled_trace_has_no_prediction_to_score() -> None:
    assert score_trace(Trace(TRUTH, ())).verdict == "no_answer"


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        (TRUTH, "truth"),
        (LETTER, "letter"),
        (TEXT, "text"),
        (Question("Is it?", "no"), "truth"),
        (Question("Which blood group?", "B"), "text"),
        (Question("How many?", "1,234"), "number"),
        (Question("How many?", "3/4"), "number"),
        (Question("Who?", "3 kings"), "text"),
    ],
)
def test_kind_is_told_by_gold_and_choices(question: Question, kind: str) -> None:
    assert question_kind(question) == kind


def test_chance_and_majority() -> None:
    assert chance([TRUTH, LETTER, TEXT]) == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert majority([TRUTH, TRUTH, LETTER, TEXT]) == 0.5
    assert chance([]) == majority([]) == 0.0


def test_summary() -> None:
    steps = (Step(("memory",), "Lima is a city."), Step(("memory", "reason"), "So it is."))
    traces = [
        Trace(TRUTH, steps, "True"),
        Trace(TRUTH, steps[:1], "False"),
        Trace(LETTER, (), "", faults=("no end of sequence", "no answer line")),
        Trace(LETTER, (), "B"),
    ]
    found = summarise([(trace, score_trace(trace)) for trace in traces])
    assert (found["n"], found["correct"], found["accuracy"]) == (4, 2, 0.5)
    assert (found["no_answer"], found["well_formed"], found["cut_off"]) == (0.25, 0.75, 0.25)
    assert found["blocks"] == {"memory": 0.75, "reason": 0.25}
    assert found["interval"] == pytest.approx((0.15004, 0.84996), abs=1e-5)
    assert (found["chance"], found["majority"]) == (pytest.approx(5 / 12), 0.5)
    json.dumps(found)


def test_summary_of_nothing() -> None:
    found = summarise([])
    assert (found["n"], found["accuracy"], found["interval"]) == (0, 0.0, (0.0, 1.0))


@pytest.mark.parametrize(
    ("said", "gold", "verdict"),
    [
        ("1/2", "\\frac{1}{2}", "correct"),
        (" $\\boxed{\\dfrac{1}{2}}$.", "\\frac12", "correct"),
        ("0.5", "\\frac{1}{2}", "correct"),
        ("10", "10\\text{ cm}", "correct"),
        ("(1, 2)", "(1,2)", "correct"),
        ("1 + x^2", "x^2+1", "correct"),
        ("$\\sqrt{8}$", "2\\sqrt{2}", "correct"),
        ("[0,1]", "[0,1)", "wrong"),
        ("\\frac{1}{3}", "\\frac{1}{2}", "wrong"),
        ("2^{10^{10}}", "3", "wrong"),
        ("__import__('os').system('exit 1')", "1", "wrong"),
        ("", "1", "no_answer"),
    ],
)
def test_math_compares_values(said: str, gold: str, verdict: str) -> None:
    """Equal formulas written otherwise are right (they were wrong); a power that cannot be computed ends in time."""
    question = Question("How much?", gold, "math")
    found = score_trace(Trace(question, (), said))
    assert (found.verdict, question_kind(question)) == (verdict, "formula")


def test_a_thread_compares_texts_alone() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(same_value, "1/2", "0.5").result()
        assert pool.submit(same_value, "$\\frac12$", "\\frac12").result()
