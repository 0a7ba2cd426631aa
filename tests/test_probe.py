"""Interventions: what each gives the model, what is counted of what comes back, and the command."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import byte_level, save_base, tiny_recipe
from memreason import inside, pipeline
from memreason.cli import main
from memreason.core.files import read_json, read_traces, write_traces
from memreason.core.trace import Question, Step, Trace
from memreason.data.atlas import make_atlas
from memreason.data.atlas_changes import LESIONS, false_line, lesioned, other_country
from memreason.data.atlas_facts import memory_line_true, read_statement, restated
from memreason.data.atlas_rules import answer_from, line_kind, reason_from
from memreason.encode.codec import Codec
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_tokens
from memreason.measure.attribute import attribute
from memreason.measure.kinds import kind_reader, learnt_reader, reader_accuracy
from memreason.measure.probe import MEANINGS, PROBES, Begun, Case, begun, cases_of, probe_table


def lines_of(trace: Trace) -> list[str]:
    return [step.text for step in trace.of_kind("memory")]


# --- lines changed on purpose


def test_a_false_line_leads_to_the_answer_that_it_names() -> None:
    changed = 0
    for trace in make_atlas("test", 150):
        lines = lines_of(trace)
        found = false_line(trace.question, lines, random.Random(trace.question.id))
        if found is None:
            assert trace.question.meta["form"] in ("country_on_continent", "three_on_continent")
            continue
        other, answer = found
        (place,) = [n for n, pair in enumerate(zip(lines, other, strict=True)) if pair[0] != pair[1]]
        assert memory_line_true(other[place]) is False
        assert answer == answer_from(trace.question, other) != answer_from(trace.question, lines)
        changed += 1
    assert changed > 110


def test_a_line_about_another_country_is_true_and_of_the_same_form() -> None:
    for trace in make_atlas("test", 60):
        lines = lines_of(trace)
        other = other_country(trace.question, lines, random.Random(trace.question.id))
        assert other is not None
        ((old, new),) = [pair for pair in zip(lines, other, strict=True) if pair[0] != pair[1]]
        before, after = read_statement(old), read_statement(new)
        assert before and after and before.relation == after.relation and memory_line_true(new)
        assert after.subject not in trace.question.meta["countries"]


def test_lines_that_say_nothing_known_are_left_alone() -> None:
    question = make_atlas("test", 1)[0].question
    assert false_line(question, ["Cats purr."], random.Random(0)) is None
    assert other_country(question, ["Cats purr."], random.Random(0)) is None
    assert restated("The Netherlands lies in Europe.", "Asia", "the Sudan") == "The Sudan lies in Asia."


@pytest.mark.parametrize("lesion", LESIONS)
def test_a_lesion_breaks_what_it_names_and_nothing_else(lesion: str) -> None:
    """Attribution of the lesioned traces themselves, by the gold answers of the questions, says which it was."""
    traces = make_atlas("train", 150)
    changed = lesioned(traces, lesion, 0.5, seed=1)
    verdicts = []
    for before, after in zip(traces, changed, strict=True):
        found = attribute(replace(after, question=before.question, prediction=after.question.answer))
        assert (found.verdict == "right") == (after == before)
        verdicts += [] if after == before else [found.verdict]
    assert 50 < len(verdicts) < 100 and set(verdicts) == {"memory" if lesion == "facts" else "reason"}
    assert lesioned(traces, lesion, 0.5, seed=1) == changed != lesioned(traces, lesion, 0.5, seed=2)


def test_reason_lines_are_written_as_atlas_writes_them() -> None:
    for trace in make_atlas("test", 150):
        assert reason_from(trace.question, lines_of(trace)) == trace.of_kind("reason")[0].text
        assert reason_from(trace.question, []) is None


# --- what is given


@pytest.fixture
def case() -> Case:
    made = next(trace for trace in make_atlas("test", 60) if trace.question.meta["form"] == "capital_on_continent")
    gold = replace(made, steps=(Step(("memory",), "The capital of Peru is Lima."), made.steps[-1]))
    return Case(replace(made, prediction="True"), gold, make_atlas("test", 1)[0])


def test_own_lines_stand_as_they_were_generated(codec: Codec, case: Case) -> None:
    ids = begun("own", codec, [case])[case.made.question.id].ids
    assert ids == codec.render(case.made)[: len(ids)]
    assert ids[-2:] == list(codec.block("prefix"))


@pytest.mark.parametrize("name", ["swap", "drop", "shuffle", "random"])
def test_only_blocks_change(codec: Codec, case: Case, name: str) -> None:
    own, changed = (begun(one, codec, [case])[case.made.question.id].ids for one in ("own", name))
    planning = {token for block in codec.blocks.values() for token in block}
    texts = [codec.encode(f" {line}\n") for line in lines_of(case.made)]
    if name == "drop":
        assert changed == [token for text in texts for token in text] + own[-2:]
        return
    assert len(changed) == len(own)
    differing = {n for n, pair in enumerate(zip(own, changed, strict=True)) if pair[0] != pair[1]}
    assert differing and all(own[n] in planning for n in differing)
    reasons = codec.block("prefix", "reason")
    if name == "swap":
        assert changed[: len(reasons)] == list(reasons) and not set(codec.block("memory")) & set(changed)
    else:
        assert all((changed[n] in planning) == (name == "shuffle") for n in differing)
    assert begun(name, codec, [case])[case.made.question.id].ids == changed  # drawn by the question, not by the run


def test_lines_are_replaced_left_out_and_forced(byte_codec: Codec, case: Case) -> None:
    codec, key, made = byte_codec, case.made.question.id, case.made
    given = {name: begun(name, codec, [case])[key] for name in PROBES}

    def texts(name: str) -> list[str]:
        return [step.text for step in codec.parse(made.question, given[name].ids).steps if step.text]

    assert texts("gold") == ["The capital of Peru is Lima."]
    assert len(texts("delete")) == len(lines_of(made)) - 1 and set(texts("delete")) < set(lines_of(made))
    assert len(set(texts("entity")) - set(lines_of(made))) == len(set(texts("false")) - set(lines_of(made))) == 1
    assert given["false"].answer in ("True", "False") and given["false"].answer != answer_from(
        made.question, lines_of(made)
    )
    assert given["no-reason"].ids == codec.step_ids(made.of_kind("memory")) + list(codec.block("prefix", "answer"))
    for kind in ("memory", "reason"):
        one = given[f"force-{kind}"]
        assert one.ids == codec.step_ids(made.steps[: one.step]) + list(codec.block("prefix", kind))
        assert (one.forced, one.chosen) == (kind, made.steps[one.step].kinds[0])
    assert given["force-memory"].step == given["force-reason"].step
    assert set(MEANINGS) == set(PROBES)


def test_what_cannot_be_done_is_left_out(byte_codec: Codec) -> None:
    plain = Trace(Question("Do cats purr?", "True"), (Step(("reason",), "Cats purr."),), prediction="True")
    (case,) = cases_of([plain], {plain.question.id: plain})
    assert {name for name in PROBES if begun(name, byte_codec, [case])} == {
        "own", "swap", "drop", "shuffle", "random", "no-reason", "force-memory", "force-reason"
    }  # fmt: skip
    one_kind = add_tokens(TokenScheme(kinds=("memory",)), byte_level())
    assert not begun(
        "force-reason", one_kind, [replace(case, made=replace(plain, steps=(Step(("memory",), "Cats purr."),)))]
    )


def test_the_other_question_is_of_the_same_form() -> None:
    made = make_atlas("test", 40)
    for case in cases_of(made, {trace.question.id: trace for trace in made}):
        assert case.other.question.meta["form"] == case.made.question.meta["form"]
        assert case.gold.question.id == case.made.question.id != case.other.question.id


# --- what is counted


def answered(number: int, answer: str, *lines: str) -> Trace:
    steps = tuple(Step(("memory",), line) for line in lines)
    return Trace(Question(f"Is it {number}?", "True", meta={"group": number // 2}), steps, prediction=answer)


def table(**answers: Sequence[str]) -> dict[str, Any]:
    tried = {}
    for name, given in answers.items():
        traces = [answered(n, answer) for n, answer in enumerate(given)]
        tried[name.replace("_", "-")] = {trace.question.id: (Begun([], answer="False"), trace) for trace in traces}
    return probe_table(tried, lambda question, text: None)


def test_effects_are_paired_with_the_own_lines() -> None:
    own = ["True", "True", "True", "True", "False", "False", "True", "True"]
    swapped = ["True", "False", "False", "False", "False", "True", "False", "False"]
    found = table(own=own, swap=swapped, false=["False", "False", "True", "False"])
    swap, false = found["interventions"]
    assert (swap["name"], swap["n"], swap["before"]["share"], swap["accuracy"]["share"]) == ("swap", 8, 6 / 8, 2 / 8)
    assert swap["difference"] == -0.5 and swap["interval"][0] <= -0.5 <= swap["interval"][1]
    assert swap["p"] == pytest.approx(2 * (1 + 6) / 64)  # five pairs got worse, one better
    assert swap["changed"] == 6 / 8
    assert (false["n"], false["before"]["share"]) == (4, 1.0)  # paired with the same four questions
    assert (found["memory_reliance"]["n"], found["memory_reliance"]["share"]) == (4, 3 / 4)
    assert found["tag_control"]["share"] is None


def test_control_counts_where_the_model_chose_another_kind() -> None:
    rows = [
        ("memory", "reason", "Peru lies in Asia."),  # against its choice, obeyed
        ("memory", "reason", "Asia and Europe are different."),  # not obeyed
        ("memory", "memory", "Asia and Europe are different."),  # with its choice: not control
        ("reason", "memory", "Asia and Europe are different."),
        ("reason", "memory", "Hm."),
    ]
    tried: dict[str, Any] = {"own": {}}
    for n, (kind, chosen, text) in enumerate(rows):
        trace = answered(n, "True", "Peru lies in Asia.", text)
        tried["own"][trace.question.id] = (Begun([]), trace)
        tried.setdefault(f"force-{kind}", {})[trace.question.id] = (Begun([], None, kind, chosen, 1), trace)
    found = probe_table(tried, lambda question, text: line_kind(text))
    assert (found["tag_control"]["n"], found["tag_control"]["share"]) == (4, 2 / 4)
    shares = {(one["kind"], one["against"]): one["share"] for one in found["forced"]}
    assert shares == {("memory", False): 0.0, ("memory", True): 0.5, ("reason", True): 0.5}


# --- kinds by words


def test_lines_of_atlas_are_read_by_their_forms() -> None:
    reader = kind_reader([])
    traces = make_atlas("test", 60)
    assert reader_accuracy(reader, traces) == 1.0
    assert reader(traces[0].question, "I do not know.") is None


def test_other_lines_are_read_as_labelled_ones_teach() -> None:
    def trace(n: int) -> Trace:
        facts, thought = Step(("memory",), f"The city {n} is old."), Step(("reason",), f"Therefore {n} comes first.")
        return Trace(Question(f"Which {n}?", "True"), (facts, thought))

    reader = learnt_reader([trace(n) for n in range(20)])
    assert reader_accuracy(reader, [trace(n) for n in range(30, 40)]) == 1.0
    assert learnt_reader([])(Question("?", "True"), "The city is old.") is None
    assert reader_accuracy(reader, []) is None


# --- the command


def test_probe_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A tiny model, nearly untrained: every intervention runs once, is kept, and is not run again."""
    monkeypatch.chdir(tmp_path)
    write_traces(tmp_path / "traces.jsonl", make_atlas("train", 24))
    recipe = tiny_recipe(
        tmp_path, save_base(tmp_path / "base"), **{"eval.n": 5, "eval.max_new_tokens": 30, "data.task": "atlas"}
    )
    run = pipeline.train(recipe)
    assert main(["probe", str(run), "--eval.n", "5"]) == 0
    told = capsys.readouterr().out
    assert "tag control" in told and "memory reliance" in told and "blocks of reason before the memory lines" in told
    (path,) = run.glob("checkpoint-*/eval/*/probe.json")
    found = read_json(path)
    own = {trace.question.id: trace for trace in read_traces(next(path.parent.glob("given-own-*.jsonl")))}
    assert len(own) == 5
    calls = []
    monkeypatch.setattr(inside, "continue_traces", lambda *given, **more: calls.append(given) or [])
    assert {**inside.probe(run, settings=None), "folder": ""} == {**found, "folder": ""} and not calls


def test_probe_refuses_a_run_without_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(tmp_path, save_base(tmp_path / "base"), **{"tokens.placement": "only_at_front"})
    assert main(["probe", str(pipeline.train(recipe))]) == 2
    assert "no blocks of their kinds" in capsys.readouterr().err
