"""Training, saving, loading and generating with models made in memory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import BASES, byte_level, save_base, tiny_model, tiny_recipe
from memreason.core.errors import CheckpointError
from memreason.core.recipe import Recipe
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question, Trace
from memreason.encode.codec import Codec
from memreason.encode.examples import encode_trace
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_rows, add_tokens
from memreason.finetune.checkpoint import load_checkpoint, save_checkpoint
from memreason.finetune.methods import trainable
from memreason.finetune.train import train
from memreason.generate.engines import generate

METHODS = ["full", "lora", "prompt-tuning", "lora+prompt-tuning", "prefix-tuning"]


def live(base: Path, recipe: Recipe) -> tuple[torch.nn.Module, Codec]:
    from memreason.encode.base import load_model, load_tokenizer

    codec = add_tokens(TokenScheme(), load_tokenizer(str(base)))
    model = load_model(str(base), dtype="fp32")
    add_rows(model, codec)
    return trainable(model, codec, recipe.method), codec


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_law_7_logits_survive_saving(tmp_path: Path, trace: Trace, kind: str, method: str) -> None:
    base = save_base(tmp_path / "base", BASES[kind])
    recipe = tiny_recipe(tmp_path, base, **{"method.name": method})
    model, codec = live(base, recipe)
    row = encode_trace(codec, trace)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    done = train(recipe, model, codec, [row] * 12)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.requires_grad)
    model.eval()
    ids = torch.tensor([row["input_ids"]])
    loaded = load_checkpoint(tmp_path / "run" / str(done["best"]))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert not list((tmp_path / "run").glob("**/*.bin"))


@pytest.mark.parametrize("kind", BASES)
def test_rows_learn_to_be_emitted(tmp_path: Path, trace: Trace, kind: str) -> None:
    """Also on padded vocabularies, where the published code trains other rows than it uses."""
    base = save_base(tmp_path / "base", BASES[kind])
    recipe = tiny_recipe(tmp_path, base, **{"train.max_steps": 300, "train.logging_steps": 50})
    model, codec = live(base, recipe)
    train(recipe, model, codec, [encode_trace(codec, trace)] * 8)
    model.eval()
    (made,) = next(generate(model, codec, [trace.question], EvalRecipe(max_new_tokens=200)))
    parsed = codec.parse(trace.question, made.ids)
    assert parsed.steps == trace.steps
    assert (parsed.prediction, parsed.faults) == ("True", ())


def test_same_answers_at_every_batch_size(byte_codec: Codec) -> None:
    model = tiny_model(len(byte_codec.tokenizer))
    questions = [Question("word " * n + "?", "True") for n in range(1, 8)]
    found = []
    for size in (1, 3, 7):
        settings = EvalRecipe(batch_size=size, max_new_tokens=24)
        made = {g.question.id: g for batch in generate(model, byte_codec, questions, settings) for g in batch}
        found.append(made)
    for made in found[1:]:
        for key, one in found[0].items():
            assert made[key].ids == one.ids
            assert made[key].logprobs == pytest.approx(one.logprobs, abs=1e-3)


def test_generation_matches_one_forward(byte_codec: Codec) -> None:
    model = tiny_model(len(byte_codec.tokenizer), seed=3)
    question = Question("Is Lima the capital of Peru?", "True")
    (made,) = next(generate(model, byte_codec, [question], EvalRecipe(max_new_tokens=12)))
    prompt = byte_codec.question_ids(question)
    with torch.no_grad():
        scores = model(torch.tensor([prompt + made.ids])).logits[0].log_softmax(-1)
    start = len(prompt) + len(byte_codec.opening())
    for k, token in enumerate(made.ids[len(byte_codec.opening()) :]):
        assert int(scores[start + k - 1].argmax()) == token
        assert float(scores[start + k - 1, token]) == pytest.approx(made.logprobs[k], abs=1e-3)


def test_resume_continues_the_same_curve(tmp_path: Path, trace: Trace) -> None:
    base = save_base(tmp_path / "base")
    changes = {"train.max_steps": 6, "train.save_strategy": "steps", "train.save_steps": 2}
    whole = tiny_recipe(tmp_path, base, **changes)

    def losses(recipe: Recipe) -> list[float]:
        model, codec = live(base, recipe)
        rows = [encode_trace(codec, replace(trace, steps=trace.steps[: 1 + n % 2])) for n in range(24)]
        return [entry["loss"] for entry in train(recipe, model, codec, rows)["history"] if "loss" in entry]

    uninterrupted = losses(whole)
    for name in ("checkpoint-4", "checkpoint-6"):
        folder = tmp_path / "run" / name
        (folder / "trainer_state.json").unlink()  # what a kill while writing leaves: an incomplete checkpoint
    assert losses(whole) == uninterrupted


def test_foreign_checkpoints_are_refused(tmp_path: Path, trace: Trace) -> None:
    base = save_base(tmp_path / "base")
    recipe = tiny_recipe(tmp_path, base, **{"method.name": "lora"})
    model, codec = live(base, recipe)
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, model, codec, recipe)
    other = tmp_path / "other"
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(vocab_size=500, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(other)
    byte_level().save_pretrained(other)
    with pytest.raises(CheckpointError, match="does not fit the base model"):
        load_checkpoint(folder, base=str(other))
    (folder / "token_scheme.json").unlink()
    with pytest.raises(CheckpointError, match="token_scheme"):
        load_checkpoint(folder)
