"""Exact attribution on atlas: rules, verdicts, the table, the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memreason.core.errors import TaskError
from memreason.core.trace import MEMORY, REASON, Question, Step, Trace
from memreason.data.atlas import FORMS, make_atlas
from memreason.data.atlas_rules import answer_from, memory_faults, reason_fault
from memreason.measure.attribute import attribute, fault_table
from memreason.measure.counterfactual import INTERVENTIONS, attribute_by_trying, begin, effects, gold_lines
from memreason.measure.trends import slope, trends
from memreason.measure.ways import compare_ways, fault_lines, faults_of, strongest


def lines_of(trace: Trace) -> list[str]:
    return [step.text for step in trace.of_kind(MEMORY)]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_gold_traces_have_no_fault(split: str) -> None:
    """Every form's rule gives the gold answer from the gold lines."""
    for trace in make_atlas(split, 120):
        question, (reason,) = trace.question, trace.of_kind(REASON)
        assert answer_from(question, lines_of(trace)) == question.answer
        assert not memory_faults(question, lines_of(trace))
        assert reason_fault(question, lines_of(trace), reason.text) is None
        assert attribute(replace(trace, prediction=question.answer)).verdict == "right"


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_line_is_a_memory_fault(form: str) -> None:
    for trace in make_atlas("train", 6, forms=[form]):
        wrong = _other_answer(trace.question)
        steps = (trace.steps[1:] if len(lines_of(trace)) > 1 else ()) or trace.of_kind(REASON)
        found = attribute(replace(trace, steps=tuple(steps), prediction=wrong))
        assert found.verdict in ("memory", "both") and found.memory
        assert any(text.startswith("no line says") for text in found.memory)


def _other_answer(question: Question) -> str:
    if question.choices:
        return "B" if question.answer == "A" else "A"
    return "False" if question.answer == "True" else "True"


def capital(*steps: tuple[str, str], answer: str = "False", gold: str = "True") -> Trace:
    """Is Lima the capital of Peru?"""
    facts: tuple[Any, ...] = ({"subject": "Peru", "relation": "capital", "object": "Lima"},)
    meta = {"form": "capital_is", "hops": 1, "obscurity": 0.4, "group": "Peru"}
    question = Question("Is Lima the capital of Peru?", gold, "atlas", facts=facts, meta=meta)
    return Trace(question, tuple(Step((kind,), text) for kind, text in steps), prediction=answer)


TRUE_LINE, FALSE_LINE = "The capital of Peru is Lima.", "The capital of Peru is Cusco."
SAME, OTHER = "Lima and Lima are the same.", "Cusco and Lima are different."
CASES = {
    "memory": capital((MEMORY, FALSE_LINE), (REASON, OTHER)),
    "reason": capital((MEMORY, TRUE_LINE), (REASON, SAME)),  # the answer does not follow
    "reason line": capital((MEMORY, TRUE_LINE), (REASON, "Lima and Lima are different.")),
    "other things": capital((MEMORY, TRUE_LINE), (REASON, OTHER)),
    "both": capital((MEMORY, FALSE_LINE), (REASON, SAME)),
    "no reason line": capital((MEMORY, TRUE_LINE)),
    "format": capital((MEMORY, TRUE_LINE), (REASON, SAME), answer=""),
    "no lines": capital(),
    "lucky": capital((MEMORY, FALSE_LINE), (REASON, SAME), answer="True"),
    "right": capital((MEMORY, TRUE_LINE), (REASON, SAME), answer="True"),
    "first of two": capital((MEMORY, FALSE_LINE), (MEMORY, TRUE_LINE), (REASON, OTHER)),
}
VERDICT = {"reason line": "reason", "other things": "reason", "no reason line": "reason", "no lines": "format"}


@pytest.mark.parametrize("case", CASES)
def test_verdicts(case: str) -> None:
    found = attribute(CASES[case])
    assert found.verdict == VERDICT.get(case, "memory" if case == "first of two" else case)
    assert bool(found.memory) == (found.verdict in ("memory", "both", "lucky"))
    if found.verdict in ("reason", "both"):
        assert found.reason


def test_evidence_names_line_and_fact() -> None:
    found = attribute(CASES["memory"]).to_json()
    assert found["memory"] == ["false: Peru, capital, Cusco (it is Lima)"]
    assert attribute(CASES["reason"]).reason == ("the answer is False, from the lines follows True",)


def test_choices() -> None:
    facts: tuple[Any, ...] = ({"subject": "Peru", "relation": "capital", "object": "Lima"},)
    question = Question("What is the capital of Peru?", "B", choices=("Quito", "Lima"), facts=facts)
    question = replace(question, meta={"form": "capital_choice"})
    assert answer_from(question, ["The capital of Peru is Lima."]) == "B"
    assert answer_from(question, ["The capital of Peru is Quito."]) == "A"
    assert answer_from(question, ["The capital of Peru is Paris."]) is None
    lines = ["The capital of Peru is Lima."]
    assert reason_fault(question, lines, "The choice is Lima (B).") is None
    assert reason_fault(question, lines, "The choice is Lima (A).") == "choice A is not Lima"
    assert reason_fault(question, lines, "The choice is Quito (A).") == "from the lines above follows B"
    assert reason_fault(question, lines, "Lima is nice.") == "it is no step that this question asks for"


def test_a_reason_line_speaks_of_the_continent_that_is_asked_for() -> None:
    (trace,) = make_atlas("train", 1, forms=["country_on_continent"])
    (reason,) = trace.of_kind(REASON)
    asked = trace.question.text.removeprefix("Which of these countries lies in ").rstrip("?")
    other = "Asia" if asked != "Asia" else "Europe"
    found = reason_fault(trace.question, lines_of(trace), reason.text.replace(f"in {asked}", f"in {other}"))
    assert found == f"the question does not ask about {other}"


def test_the_table_counts_and_parts() -> None:
    found = [attribute(CASES[name]) for name in ("memory", "reason", "both", "format", "lucky", "right", "right")]
    table = fault_table(found)
    assert table["counts"] == {"memory": 1, "reason": 1, "both": 1, "format": 1, "lucky": 1, "right": 2}
    assert (table["n"], table["wrong"]) == (7, 4)
    assert table["of_wrong"]["memory"]["share"] == 0.25
    low, high = table["shares"]["right"]["wilson"]
    assert low < 2 / 7 < high
    (middle,) = table["by"]["obscurity"]
    assert (middle["obscurity"], middle["n"], middle["memory"]["share"]) == ("middle", 7, 3 / 7)
    assert fault_table([])["of_wrong"]["memory"] is None


def test_other_tasks_are_refused() -> None:
    with pytest.raises(TaskError, match="strategyqa: lines can be checked exactly on atlas only"):
        attribute(Trace(Question("Is it?", "True", "strategyqa"), (), prediction="True"))


def test_interventions_give_gold_own_and_anothers_lines() -> None:
    gold = {trace.question.id: trace for trace in make_atlas("test", 24)}
    made = [
        replace(trace, steps=(Step((MEMORY,), "X."), Step((REASON,), "Y.")), prediction="A") for trace in gold.values()
    ]
    source, lines = gold_lines(list(gold.values()))
    assert source == "labelled"
    for name in INTERVENTIONS:
        for trace, begun in zip(made, begin(name, made, lines), strict=True):
            assert begun.question == trace.question and {step.kinds for step in begun.steps} <= {(MEMORY,)}
            own = gold[trace.question.id]
            if name == "other":
                others = [o for o in gold.values() if o.question.group != own.question.group]
                alike = [o for o in others if o.question.meta["form"] == own.question.meta["form"]]
                assert begun.steps in [tuple(o.of_kind(MEMORY)) for o in alike or others]
                assert begun.steps != tuple(own.of_kind(MEMORY))
            else:
                assert begun.steps == tuple((own if name == "gold" else trace).of_kind(MEMORY))


ANSWERS = {"gold": ["True", "False", "False", "True", "True"], "own": [*["False"] * 4, "True"], "other": ["False"] * 5}


def test_ways_are_compared_where_one_thing_failed() -> None:
    cases = ("memory", "memory", "reason", "both", "right")
    made = [CASES[case].with_question(id=str(n)) for n, case in enumerate(cases)]
    found = [attribute(trace) for trace in made]
    gold = {trace.question.id: [Step((MEMORY,), TRUE_LINE)] for trace in made}
    tried = {
        name: [replace(trace, prediction=answer) for trace, answer in zip(made, given, strict=True)]
        for name, given in ANSWERS.items()
    }
    ways = {"counterfactual": attribute_by_trying(made, "labelled", gold, tried), "exact": found}
    (table,) = compare_ways(ways)
    assert table["between"] == ["exact", "counterfactual"]
    assert table["confusion"] == {"memory, memory": 1, "memory, reason": 1, "reason, reason": 1, "both, memory": 1}
    assert (table["agreement"]["n"], table["agreement"]["share"]) == (3, 2 / 3)
    assert table["kappa"]["kappa"] == pytest.approx(0.4)  # observed 2/3, by chance 4/9
    done = effects(made, gold, tried)
    assert [done["accuracy"][name]["share"] for name in ("before", "gold", "own", "other")] == [0.2, 0.6, 0.2, 0.0]
    assert done["mended"]["gold"]["share"] == 0.5 and done["mended"]["own"]["share"] == 0.0
    assert [done["changed"][name]["share"] for name in ("gold", "own", "other")] == [0.4, 0.0, 0.2]
    beyond = done["beyond_chance"]  # 3 of 5 with gold lines and 0 with another's; of the 4 wrong ones 2 and 0
    assert {name: (one["n"], one["difference"], one["p"]) for name, one in beyond.items()} == {
        "accuracy": (5, pytest.approx(0.6), 0.25),
        "mended": (4, 0.5, 0.5),
    }
    assert all(low <= one["difference"] <= high for one in beyond.values() for low, high in [one["by_group"]])
    assert compare_ways({"exact": [], "counterfactual": []})[0]["kappa"] is None


def test_needed_lines_are_counted_one_by_one() -> None:
    """Of three facts one is stated, one is stated falsely, one is missing: two of three needed lines are at fault."""
    (gold,) = make_atlas("train", 1, forms=["three_on_continent"])
    _, second, third, reason = gold.steps
    wrong = "Africa" if second.text.endswith(" Asia.") else "Asia"
    changed = replace(second, text=f"{second.text.split(' lies in ')[0]} lies in {wrong}.")
    trace = replace(gold, steps=(changed, third, reason), prediction=_other_answer(gold.question))
    found = [attribute(trace), attribute(replace(gold, prediction=gold.question.answer))]
    assert [(one.missed, one.needed) for one in found] == [(2, 3), (0, 3)]
    table = fault_table(found)
    (row,) = table["by"]["hops"]
    assert (row["memory"]["share"], row["per_line"]["share"]) == (0.5, pytest.approx(2 / 6))
    unread = attribute(replace(trace, prediction=""))
    assert unread.verdict == "format" and not unread.needed  # nothing of it counts as a memory fault
    assert fault_table([unread])["by"]["hops"][0]["per_line"] is None


def test_slopes_are_least_squares_over_shares() -> None:
    """By hand: shares 0, 1/2, 1 at 0, 1, 2 rise by 1/2; a weight counts as so many lines at one place."""
    x, y = [0.0, 0.0, 1.0, 1.0, 2.0, 2.0], [0, 0, 0, 1, 1, 1]
    found = slope(x, [(fault, 1) for fault in y], list("abcdef"))
    assert found is not None and found["slope"] == pytest.approx(0.5)
    low, high = found["by_group"]
    assert low <= 0.5 <= high
    assert slope([1.0, 2.0], [(3, 4), (1, 4)], "ab") == {"slope": pytest.approx(-0.5), "by_group": [-0.5, -0.5]}
    assert slope([1.0, 1.0], [(1, 1), (0, 1)], "ab") is None  # nothing to compare
    assert slope([1.0, 2.0], [(0, 0), (0, 0)], "ab") is None  # no lines
    together = slope(x, [(fault, 1) for fault in y], ["one"] * 6)
    assert together is not None and together["by_group"] == [pytest.approx(0.5)] * 2  # one group: no width


def test_trends_rise_with_what_was_made_to_rise() -> None:
    """Memory faults are put on obscure questions only: their slope is positive, that of reason faults is none."""
    found = []
    for n in range(40):
        trace = CASES["memory" if n >= 20 else "right"].with_question(id=str(n))
        meta = {**trace.question.meta, "obscurity": n / 40, "hops": 1 + n % 2, "group": str(n)}
        found.append(attribute(trace.with_question(meta=meta)))
    table = trends(found)
    memory, reason = table["obscurity"]["memory"], table["obscurity"]["reason"]
    assert memory["by_group"][0] > 1 and reason == {"slope": 0.0, "by_group": [0.0, 0.0]}
    low, high = table["hops"]["per_line"]["by_group"]
    assert low < 0 < high
    assert table["obscurity"]["per_line"] == memory  # one fact each
    assert trends([]) == {}


def test_the_strongest_way_that_has_a_verdict_counts() -> None:
    made = [CASES[name].with_question(id=name) for name in ("memory", "both", "right", "format")]
    exact = [attribute(trace) for trace in made]
    silent = [replace(one, verdict="unjudged" if one.wrong else "right", memory=(), reason=()) for one in exact]
    ways = {"judge": exact, "counterfactual": silent}
    assert [one.verdict for one in strongest(ways)] == ["memory", "both", "right", "format"]
    assert [one.verdict for one in strongest({"counterfactual": silent})] == [
        "unjudged",
        "unjudged",
        "right",
        "unjudged",
    ]
    line = fault_lines({**ways, "exact": exact})[0]
    assert line["ways"] == {"exact": "memory", "counterfactual": "unjudged", "judge": "memory"}
    assert line["memory"] == ["false: Peru, capital, Cusco (it is Lima)"]
    table = faults_of(ways)
    assert list(table["counts"]) == ["memory", "reason", "both", "format", "right", "unjudged"]  # luck is not seen
    assert table["ways"]["counterfactual"]["unjudged"] == 3
    (pair,) = table["agreement"]
    assert (pair["wrong"], pair["agreement"]["n"], pair["kappa"]) == (2, 0, None)
    assert "unjudged" not in faults_of({"exact": exact})["counts"]


def test_going_on_from_own_lines_changes_nothing(byte_codec: Any) -> None:
    """Greedy: what follows the model's own first lines is what it wrote behind them."""
    from conftest import byte_level, tiny_model
    from memreason.core.stages import EvalRecipe
    from memreason.encode.vocab import add_rows
    from memreason.generate.onward import begun_ids, continue_traces

    model = tiny_model(len(byte_level()))
    add_rows(model, byte_codec)
    trace = capital((MEMORY, TRUE_LINE), (REASON, SAME), answer="True")
    settings = EvalRecipe(max_new_tokens=40)
    given = {trace.question.id: begun_ids(byte_codec, replace(trace, steps=trace.steps[:1]))}
    (begun,) = continue_traces(model, byte_codec, [trace.question], given, settings)
    assert begun.steps[0] == trace.steps[0]
    prompt = byte_codec.question_ids(trace.question) + byte_codec.step_ids(trace.steps[:1]) + byte_codec.opening()
    assert byte_codec.render(trace)[: len(byte_codec.step_ids(trace.steps))] == byte_codec.step_ids(trace.steps)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(40):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    plain = byte_codec.parse(trace.question, ids[0, len(byte_codec.question_ids(trace.question)) :].tolist())
    assert begun.steps == plain.steps


def test_faults_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from conftest import save_base, tiny_recipe
    from memreason import pipeline
    from memreason.cli import main
    from memreason.core.files import read_json, read_jsonl

    changes = {"data.paths": [], "data.task": "atlas", "data.n_train": 12, "eval.n": 6, "train.n_select": 2}
    run = pipeline.train(tiny_recipe(tmp_path, save_base(tmp_path / "base"), **changes))
    assert main(["faults", str(run), "--eval.max_new_tokens", "8"]) == 0
    assert "6 questions" in capsys.readouterr().out
    (path,) = run.glob("checkpoint-*/eval/*/faults.json")
    assert read_json(path)["n"] == len(list(read_jsonl(path.with_name("faults.jsonl")))) == 6
    assert main(["faults", str(run), "--eval.max_new_tokens", "8", "--counterfactual"]) == 0
    assert "own lines again" in capsys.readouterr().out
    accuracy = read_json(path)["counterfactual"]["accuracy"]
    assert {name: one["n"] for name, one in accuracy.items()} == {"before": 6, "gold": 6, "own": 6, "other": 6}
    given = {path.name: path.read_bytes() for path in path.parent.glob("given-*.jsonl")}
    assert len(given) == 3
    assert main(["faults", str(run), "--eval.max_new_tokens", "8", "--counterfactual"]) == 0  # kept, not made anew
    assert given == {path.name: path.read_bytes() for path in path.parent.glob("given-*.jsonl")}
