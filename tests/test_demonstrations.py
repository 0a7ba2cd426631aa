"""k-shot demonstrations: chosen once from the training traces, shown before every question, never supervised."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from conftest import byte_level, own_traces, save_base, tiny_recipe
from memreason import pipeline
from memreason.core.errors import CheckpointError, DataError, RecipeError
from memreason.core.files import read_json, read_jsonl
from memreason.core.recipe import load_recipe
from memreason.core.stages import DataRecipe
from memreason.core.trace import Question, Step, Trace
from memreason.encode.demonstrations import Demonstrations, choose_demonstrations
from memreason.encode.examples import encode_trace
from memreason.encode.nearness import by_embedding
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_tokens
from memreason.finetune.checkpoint import open_checkpoint, resolve
from memreason.finetune.demonstrate import by_loss
from memreason.finetune.prepare import prepare
from memreason.generate.onward import PromptCodec
from memreason.measure.segments import segments
from memreason.published import differences, of_evaluation, translate


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


CAPITALS = ["Is Lima the capital of Peru?", "Does the yen buy bread in Japan?", "Is Bern the capital of Switzerland?"]


def asked(texts: list[str], task: str = "") -> list[Trace]:
    return [Trace(Question(text, "True", task=task), (Step(("memory",), text),)) for text in texts]


def nearest(question: str, data: DataRecipe) -> str:
    shown = choose_demonstrations(asked(CAPITALS), data, 0, none_needed)
    assert shown is not None
    return shown.of(Question(question, "True"))[-1].question.text


def test_similar_by_words() -> None:
    data = DataRecipe(k_shot=1, demo_selection="similar")
    assert nearest("How much bread does a yen buy?", data) == CAPITALS[1]
    assert nearest("What is the capital: Bern?", data) == CAPITALS[2]
    assert nearest(CAPITALS[0], data) == CAPITALS[2]  # not itself


def test_similar_by_embedding(tmp_path: Path) -> None:
    base = str(save_base(tmp_path / "base"))
    data = DataRecipe(k_shot=1, demo_selection="similar", demo_model=base)
    for text in CAPITALS:
        shown = choose_demonstrations(asked(CAPITALS), data, 0, none_needed)
        assert shown is not None
        twin = Question(text, "True", task="another")  # the same text, another question
        assert shown.of(twin)[-1].question.text == text
    many = asked([f"{text} {'very ' * n}" for n in range(20) for text in CAPITALS])
    near = by_embedding([trace.question for trace in many[:7]], base)
    together, alone = near([t.question for t in many]), [near([trace.question])[0] for trace in many]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    model = LlamaForCausalLM.from_pretrained(base)
    ids = [torch.tensor([byte_level()(trace.question.text)["input_ids"]]) for trace in many[:2]]
    left, right = (model.model(one).last_hidden_state.mean(1)[0] for one in ids)
    assert together[0, 1] == pytest.approx(float(torch.cosine_similarity(left, right, dim=0).detach()), abs=1e-5)


def test_prompt_takes_those_of_least_loss(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    recipe = tiny_recipe(tmp_path, base, **{"data.k_shot": 2, "data.demo_selection": "prompt"})
    tokenizer, traces = byte_level(), own_traces(9)
    order = by_loss(recipe, TokenScheme(), tokenizer, traces[:6], traces[6:])
    model, plain = LlamaForCausalLM.from_pretrained(base), add_tokens(TokenScheme(n_prefix=0, n_special=0), tokenizer)
    losses = []
    for candidate in traces[:6]:
        rows = [(encode_trace(plain, candidate)["input_ids"], encode_trace(plain, trace)) for trace in traces[6:]]
        found = [
            model(
                torch.tensor([before + row["input_ids"]]), labels=torch.tensor([[-100] * len(before) + row["labels"]])
            ).loss.item()
            for before, row in rows
        ]
        losses.append(sum(found) / len(found))
    assert [losses[i] for i in order] == sorted(losses)
    short = recipe.model_copy(update={"train": recipe.train.model_copy(update={"model_max_length": 8})})
    assert by_loss(short, TokenScheme(), tokenizer, traces[:6], traces[6:]) == list(range(6))  # all too long
    shown = prepare(recipe).codec.demonstrations
    assert shown is not None and len(shown.pool) == 3  # one more than two: a question is never its own
    sampled = choose_demonstrations(own_traces(12), recipe.data, 0, lambda pool, sample: [len(pool) - 1, *range(3)])
    assert sampled is not None and len(sampled.of(own_traces(1)[0].question)) == 2


def test_only_training_traces_are_shown(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, save_base(tmp_path / "base"), **{"data.k_shot": 3, "data.validation": 0.5})
    for selection in ("uniform", "similar", "prompt"):
        data = recipe.data.model_copy(update={"demo_selection": selection})
        ready = prepare(recipe.model_copy(update={"data": data}))
        assert ready.codec.demonstrations is not None
        shown = {trace.question.id for trace in ready.codec.demonstrations.pool}
        assert shown <= {trace.question.id for trace in ready.splits.train}
        assert not shown & {trace.question.id for trace in ready.splits.validation}


def test_examples_that_grow_too_long_are_dropped_and_counted(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    alone = prepare(tiny_recipe(tmp_path, base)).examples.rows.lengths.max()
    told: list[str] = []
    with pytest.raises(DataError, match="no example is left of 24"):
        prepare(tiny_recipe(tmp_path, base, **{"data.k_shot": 4, "train.model_max_length": int(alone)}))
    whole = prepare(tiny_recipe(tmp_path, base, **{"data.k_shot": 2})).examples.rows.lengths
    limit = int(whole.max()) - 1
    some = prepare(tiny_recipe(tmp_path, base, **{"data.k_shot": 2, "train.model_max_length": limit}), warn=told.append)
    assert some.examples.dropped == int((whole > limit).sum()) > 0
    assert "traces dropped" in told[0]


def test_lines_that_are_given_stand_behind_the_demonstrations() -> None:
    codec = add_tokens(TokenScheme(n_prefix=1, n_special=2), byte_level(), chosen(k_shot=2))
    trace = own_traces(12)[3]
    begun = PromptCodec(codec, {trace.question.id: codec.question_ids(trace.question) + codec.step_ids(trace.steps)})
    assert begun.question_ids(trace.question)[: -len(codec.step_ids(trace.steps))] == codec.question_ids(trace.question)
    ids = codec.render(trace)
    fed, parts = segments(codec, trace.question, ids)
    assert fed == codec.question_ids(trace.question) + ids[:-1]
    assert [part.kind for part in parts[1 : len(codec.question_ids(trace.question))]].count("question") == len(
        codec.question_ids(trace.question)
    ) - 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data.k_shot": -1}, "data.k_shot"),
        ({"data.demo_selection": "best"}, "data.demo_selection"),
        (
            {"data.k_shot": 4, "data.demo_selection": "similar", "data.candidate_size": 4},
            "at least 5 candidates, got 4",
        ),
        ({"data.demo_model": "x"}, "data.demo_model: it is for data.demo_selection similar"),
    ],
)
def test_bad_settings(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load_recipe(None, changes)


@pytest.mark.parametrize(("selection", "needs"), [("uniform", 13), ("similar", 13), ("prompt", 14)])
def test_too_few_traces(selection: str, needs: int) -> None:
    data = DataRecipe(k_shot=12, demo_selection=selection)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=f"need {needs} different training questions, there are 12"):
        choose_demonstrations(own_traces(12) * 2, data, 0, none_needed)


def test_published_flags() -> None:
    words = ["--dataset", "gsm8k", "--k_shot", "2", "--demo_selection", "similar", "--candidate_size", "50"]
    off = load_recipe(None, translate(words, train=True)[0])
    assert (off.data.k_shot, off.data.demo_selection) == (0, "uniform")
    on = load_recipe(None, translate([*words, "--use_demonstrations", "True"], train=True)[0])
    assert (on.data.k_shot, on.data.demo_selection, on.data.candidate_size) == (2, "similar", 50)
    usual = load_recipe(None, translate(["--dataset", "gsm8k", "--use_demonstrations"], train=True)[0])
    assert (usual.data.k_shot, usual.data.demo_selection, usual.data.candidate_size) == (4, "uniform", 100)
    overrides = dict(translate([*words, "--use_demonstrations", "True"], train=False)[0])
    assert of_evaluation(overrides, published=True) == ({"eval.task": "gsm8k"}, {})  # those of the checkpoint count
    assert "data.k_shot 2 is not what" in "\n".join(differences(overrides, usual))
    assert not differences(overrides, on)
    with pytest.raises(RecipeError, match="one of uniform, similar, prompt is needed"):
        translate(["--dataset", "gsm8k", "--demo_selection", "best"], train=True)
