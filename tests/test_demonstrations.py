"""k-shot demonstrations: chosen once from the training traces, shown before every question, never supervised."""

from pathlib import Path
from typing import Any

import pytest

from conftest import byte_level, own_traces, save_base, tiny_recipe
from memreason import pipeline
from memreason.core.errors import CheckpointError
from memreason.core.files import read_json, read_jsonl
from memreason.core.recipe import DataRecipe
from memreason.core.trace import Question
from memreason.encode.demonstrations import Demonstrations, choose_demonstrations
from memreason.encode.examples import encode_trace
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_tokens
from memreason.finetune.checkpoint import open_checkpoint, resolve


def none_needed(*_: Any) -> list[int]:
    raise AssertionError("no loss is asked for")


def chosen(**data: Any) -> Demonstrations:
    found = choose_demonstrations(own_traces(12), DataRecipe(**data), 0, none_needed)
    assert found is not None
    return found


def test_demonstrations_are_whole_traces_before_the_question_and_masked() -> None:
    shown = chosen(k_shot=2)
    codec = add_tokens(TokenScheme(n_prefix=1, n_special=2), byte_level(), shown)
    plain = add_tokens(TokenScheme(n_prefix=1, n_special=2), byte_level())
    trace = own_traces(12)[3]
    row, alone = encode_trace(codec, trace), encode_trace(plain, trace)
    before = [i for one in shown.of(trace.question) for i in encode_trace(plain, one)["input_ids"]]
    assert row["input_ids"] == before + alone["input_ids"]
    assert row["labels"] == [-100] * len(before) + alone["labels"]
    assert codec.question_ids(trace.question) == before + plain.question_ids(trace.question)
    assert set(codec.blocks["memory"]) <= set(before)


def test_a_question_never_demonstrates_itself() -> None:
    shown = chosen(k_shot=3)
    usual = [trace.question.id for trace in shown.of(Question("another", "True"))]
    for trace in own_traces(12):
        found = [one.question.id for one in shown.of(trace.question)]
        assert len(found) == 3 and trace.question.id not in found
        assert found == usual or trace.question.id in usual


def test_the_same_seed_draws_the_same_another_others() -> None:
    draws = [choose_demonstrations(own_traces(12), DataRecipe(k_shot=4), seed, none_needed) for seed in (0, 0, 1)]
    digests = [draw.digest for draw in draws if draw]
    assert digests[0] == digests[1] != digests[2]


def test_from_training_to_evaluation(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, save_base(tmp_path / "base"), **{"data.k_shot": 2, "data.validation": 0.25})
    run = pipeline.train(recipe)
    loaded = open_checkpoint(run)
    shown = [line for _, line in read_jsonl(run / "demonstrations.jsonl")]
    assert shown == [line for _, line in read_jsonl(loaded.folder / "demonstrations.jsonl")]
    assert read_json(run / "manifest.json")["demonstrations"] == loaded.codec.scheme.demonstrations
    question = own_traces(1)[0].question
    assert sum(i == loaded.codec.eos_id for i in loaded.codec.question_ids(question)) == 2
    found = pipeline.evaluate(run, settings=recipe.eval.model_copy(update={"task": recipe.data.paths[0], "n": 3}))
    assert found["n"] == 3
    (loaded.folder / "demonstrations.jsonl").write_text(
        (run / "demonstrations.jsonl").read_text().replace("Lima", "Rome"), encoding="utf-8"
    )
    with pytest.raises(CheckpointError, match="other demonstrations"):
        open_checkpoint(run)
    (resolve(run) / "demonstrations.jsonl").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        open_checkpoint(run)
