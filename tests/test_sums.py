"""The task sums: its rule is right, its splits are apart, and it is trained on and evaluated like any other."""

from dataclasses import replace
from pathlib import Path

import pytest

from conftest import save_base, tiny_recipe
from memreason import pipeline
from memreason.core.errors import TaskError
from memreason.core.kinds import OPERATORS
from memreason.core.stages import DataRecipe
from memreason.data import sums
from memreason.data.arithmetic import ANNOTATION, arithmetic_kinds
from memreason.data.sums import make_sums
from memreason.data.tasks import load_eval, load_splits
from memreason.measure.score import score_trace


@pytest.fixture(scope="module")
def train() -> list:
    return make_sums("train", 600)


def test_steps_lead_to_the_answer(train: list) -> None:
    for trace in train:
        assert 2 <= len(trace.steps) <= 4
        before = ""
        for step in trace.steps:
            (formula,) = ANNOTATION.findall(step.text)
            (operator,) = step.kinds
            left, right = map(int, formula.split(operator))
            value = {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[operator]
            assert f"<<{formula}={int(value)}>>{int(value)}" in step.text
            assert value == int(value) > 0
            assert before in ("", str(left))
            assert f"{right} " in trace.question.text
            assert arithmetic_kinds(step.text) == step.kinds
            before = str(int(value))
        assert trace.question.answer == before
    assert {kind for trace in train for step in trace.steps for kind in step.kinds} == set(OPERATORS)


def test_splits_are_apart_and_the_same_for_a_seed(train: list) -> None:
    assert make_sums("train", 600) == train
    assert make_sums("train", 600, seed=1) != train
    chains = {
        split: {
            tuple(ANNOTATION.search(step.text)[0] for step in trace.steps) for trace in make_sums(split, 300, seed=s)
        }
        for s, split in enumerate(("train", "validation", "test"))
    }
    assert not chains["train"] & chains["test"]
    assert not chains["train"] & chains["validation"]
    assert not chains["validation"] & chains["test"]


def test_as_many_calculations_as_asked() -> None:
    made = load_splits(DataRecipe(task="sums", n_train=60, hops=[1, 3])).train
    assert {len(trace.steps) for trace in made} == {1, 3}


def test_what_cannot_be_made_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TaskError, match=r"at least one calculation, got hops \[0\]"):
        make_sums("train", 3, hops=[0])
    with pytest.raises(TaskError, match="task sums has no split 'dev'"):
        make_sums("dev", 3)
    monkeypatch.setattr(sums, "_chain", lambda generator, lengths: [1, ("+", 1, 2)])
    monkeypatch.setattr(sums, "SPLITS", {"train": 100})
    monkeypatch.setattr(sums, "NAMES", ("Ada",))
    monkeypatch.setattr(sums, "THINGS", ("eggs",))
    with pytest.raises(TaskError, match="9 questions are more than split train has; ask for 3"):
        make_sums("train", 9)


def test_it_is_loaded_as_a_task() -> None:
    data = DataRecipe(task="sums", n_train=20)
    splits = load_splits(data)
    assert (len(splits.train), len(splits.validation)) == (20, 100)
    (gold,) = load_eval("sums", "test", data, 1)
    assert score_trace(replace(gold, prediction=gold.answer)).verdict == "correct"


def test_it_is_trained_on_and_evaluated(tmp_path: Path) -> None:
    changes = {"data.task": "sums", "data.n_train": 8, "data.paths": [], "data.step_types": "arithmetic"}
    recipe = tiny_recipe(tmp_path, save_base(tmp_path / "base"), **changes, **{"train.n_select": 1, "eval.n": 2})
    results = pipeline.run(recipe)
    assert (results["task"], results["n"]) == ("sums", 2)
