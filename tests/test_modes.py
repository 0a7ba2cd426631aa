"""Every way to train, end to end on tiny models: precision, memory, placement, sampling, merging."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from conftest import BASES, own_traces, save_base, tiny_recipe
from memreason import pipeline
from memreason.core.errors import CheckpointError, RecipeError
from memreason.core.files import read_json
from memreason.core.recipe import Recipe
from memreason.core.stages import EvalRecipe
from memreason.encode.base import load_model, load_tokenizer
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_rows, add_tokens
from memreason.finetune.checkpoint import checkpoints_in, load_checkpoint
from memreason.finetune.methods import trainable
from memreason.generate.answer import answer_questions
from memreason.publish.export import write_model
from memreason.publish.merge import merge

METHODS = ("full", "lora", "prompt-tuning", "lora+prompt-tuning", "prefix-tuning")


def wide_model(rows: int) -> LlamaForCausalLM:
    """Wide enough for the 64-value blocks of bitsandbytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=64,
        initializer_range=0.3,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def biased_model(rows: int) -> PhiForCausalLM:
    """A head with a bias, as Phi's is."""
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=rows,
        hidden_size=32,
        initializer_range=0.3,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    )
    model = PhiForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    return model


KINDS = {**BASES, "biased": biased_model}
MODULES = {"biased": ["q_proj", "v_proj", "fc1"]}


def losses(recipe: Recipe) -> list[float]:
    run = pipeline.train(recipe)
    return [entry["loss"] for entry in read_json(run / "trainer_state.json")["log_history"] if "loss" in entry]


def logits_of(model: Any, codec: Any) -> torch.Tensor:
    ids = [codec.question_ids(trace.question) + codec.render(trace) for trace in own_traces(1)]
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float()


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_bases_are_trained_over_and_evaluated(tmp_path: Path, bits: str) -> None:
    base = save_base(tmp_path / "base", wide_model)
    recipe = tiny_recipe(tmp_path, base, **{"model.quantize": bits, "train.max_steps": 12})
    curve = losses(recipe)
    assert curve[-1] < curve[0] - 0.5
    results = pipeline.evaluate(recipe.folder, settings=EvalRecipe(n=3, max_new_tokens=8))
    assert results["n"] == 3
    loaded = load_checkpoint(recipe.folder)
    names = {type(module).__name__ for module in loaded.model.modules()}
    assert names & {"Linear8bitLt", "Linear4bit"}
    weights = sum(path.stat().st_size for path in loaded.folder.glob("adapter_model*"))
    assert 0 < weights < sum(path.stat().st_size for path in base.glob("*.safetensors")) / 2


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("method", ["full", "lora+prompt-tuning"])
def test_dtypes(tmp_path: Path, dtype: str, method: str) -> None:
    base = save_base(tmp_path / "base")
    curve = losses(tiny_recipe(tmp_path, base, **{"model.dtype": dtype, "method.name": method, "train.max_steps": 8}))
    assert curve[-1] < curve[0] - 0.5


@pytest.mark.parametrize("given", [{}, {"train.warmup_steps": 5}, {"train.max_steps": 2}])
def test_a_warm_up_that_never_ends_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, given: dict[str, Any]
) -> None:
    """24 traces make 6 steps of 4. Who asks for two steps is not told."""
    asked = {"train.max_steps": -1, "train.warmup_steps": 10, **given}
    with caplog.at_level(logging.WARNING, "memreason"):
        assert len(losses(tiny_recipe(tmp_path, save_base(tmp_path / "base"), **asked))) == given.get(
            "train.max_steps", 6
        )
    said = [record.message for record in caplog.records if record.name == "memreason"]
    never = "train.warmup_steps is 10, but there are 6 steps: the learning rate never reaches 0.01"
    assert said == ([] if given else [never])


def test_fp16_says_what_a_cpu_does_instead(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = save_base(tmp_path / "base")
    with caplog.at_level(logging.WARNING, "memreason"):
        losses(tiny_recipe(tmp_path, base, **{"train.fp16": True}))
    said = [record.message for record in caplog.records if record.name == "memreason"]
    assert said == ([] if torch.cuda.is_available() else ["train.fp16 needs a GPU: training in bf16 autocast here"])


@pytest.mark.parametrize("method", ["full", "lora+prompt-tuning"])
def test_gradient_checkpointing_changes_no_loss(tmp_path: Path, method: str) -> None:
    base = save_base(tmp_path / "base")
    shared = {"method.name": method, "train.max_steps": 4}
    plain = losses(tiny_recipe(tmp_path, base, **shared, output_dir=str(tmp_path / "plain")))
    spared = losses(tiny_recipe(tmp_path, base, **shared, **{"train.gradient_checkpointing": True}))
    assert spared == pytest.approx(plain, abs=1e-4)
    with pytest.raises(RecipeError, match="prefix-tuning does not take it"):
        tiny_recipe(tmp_path, base, **{"method.name": "prefix-tuning", "train.gradient_checkpointing": True})


def test_accumulation_changes_no_loss(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    one = {"train.per_device_train_batch_size": 8, "train.max_steps": 3, "output_dir": str(tmp_path / "one")}
    two = {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 4, "train.max_steps": 3}
    assert losses(tiny_recipe(tmp_path, base, **two)) == pytest.approx(
        losses(tiny_recipe(tmp_path, base, **one)), abs=1e-4
    )


def test_constant_length_stream(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    changes = {"train.mode": "constant_len", "train.model_max_length": 128, "train.max_steps": 10}
    curve = losses(tiny_recipe(tmp_path, base, **changes))
    assert curve[-1] < curve[0] - 0.5
    assert pipeline.evaluate(tmp_path / "run", settings=EvalRecipe(n=2, max_new_tokens=4))["n"] == 2


def merged_model(run: Path, out: Path) -> Path:
    """What `export` writes before it is checked."""
    loaded = load_checkpoint(run, dtype="fp32", quantize=None)
    write_model(out, out, merge(loaded), loaded, "fp32")
    return out


def test_virtual_tokens_at_the_front(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    changes = {"method.name": "prompt-tuning", "tokens.placement": "only_at_front", "tokens.n_prefix": 3}
    recipe = tiny_recipe(tmp_path, base, **changes)
    losses(recipe)
    config = read_json(tmp_path / "run" / "checkpoint-3" / "adapter_config.json")
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PROMPT_TUNING", 3)
    assert pipeline.evaluate(tmp_path / "run", settings=EvalRecipe(n=2, max_new_tokens=4))["n"] == 2
    with pytest.raises(CheckpointError, match="prompt-tuning trains virtual tokens"):
        merged_model(tmp_path / "run", tmp_path / "merged")


def test_best_checkpoint_outlives_the_limit(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    changes = {"train.save_strategy": "epoch", "train.num_train_epochs": 4, "train.max_steps": -1}
    recipe = tiny_recipe(
        tmp_path, base, **changes, **{"train.save_total_limit": 1, "data.validation": 0.2, "train.n_select": 2}
    )
    run = pipeline.train(recipe)
    history = read_json(run / "trainer_state.json")["log_history"]
    scored = {entry["step"]: entry["eval_acc"] for entry in history if "eval_acc" in entry}
    assert len(scored) == 4
    best = min(step for step, accuracy in scored.items() if accuracy == max(scored.values()))
    assert read_json(run / "manifest.json")["best"]["checkpoint"] == f"checkpoint-{best}"
    assert {path.name for path in checkpoints_in(run)} == {f"checkpoint-{best}", f"checkpoint-{max(scored)}"}


def test_trackers_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    losses(tiny_recipe(tmp_path, base, **{"train.report_to": "tensorboard"}))
    assert list((tmp_path / "board").glob("**/events.out.tfevents.*"))


def test_sampling_is_told_by_its_seed(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    codec = add_tokens(TokenScheme(), load_tokenizer(str(base)))
    model = load_model(str(base), dtype="fp32")
    add_rows(model, codec)
    questions = [trace.question for trace in own_traces(3)]

    def sampled(seed: int, batch: int) -> list[Any]:
        settings = EvalRecipe(decoding="sample", n_samples=2, seed=seed, max_new_tokens=8, batch_size=batch)
        return [
            (trace.question.id, trace.steps, trace.prediction)
            for trace in answer_questions(model, codec, questions, settings)
        ]

    first = sampled(0, 6)
    assert len(first) == 6
    assert first == sampled(0, 2)
    assert first != sampled(1, 6)
    assert len({repr(steps) for _, steps, _ in first}) > 3  # the samples of one question differ


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_law_7_merging(tmp_path: Path, kind: str, method: str) -> None:
    base = save_base(tmp_path / "base", KINDS[kind])
    modules = MODULES.get(kind, "all")
    recipe = tiny_recipe(tmp_path, base, **{"method.name": method, "method.lora_module": modules})
    losses(recipe)
    trained = load_checkpoint(recipe.folder)
    if method == "prefix-tuning":
        with pytest.raises(CheckpointError, match="prefix-tuning trains virtual tokens"):
            merged_model(recipe.folder, tmp_path / "merged")
        return
    out = merged_model(recipe.folder, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    expected = logits_of(trained.model, trained.codec)
    torch.testing.assert_close(logits_of(plain, trained.codec), expected, rtol=1e-4, atol=1e-4)
    assert "<memory_0>" in AutoTokenizer.from_pretrained(out).get_vocab()
    again = load_checkpoint(out)
    torch.testing.assert_close(logits_of(again.model, again.codec), expected, rtol=1e-4, atol=1e-4)


def test_a_quantised_run_is_merged_unquantised(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", wide_model)
    recipe = tiny_recipe(tmp_path, base, **{"model.quantize": "8bit"})
    losses(recipe)
    unquantised = load_checkpoint(recipe.folder, quantize=None, dtype="fp32")
    folder = merged_model(recipe.folder, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert not getattr(plain, "is_quantized", False)
    expected = logits_of(unquantised.model, unquantised.codec)
    torch.testing.assert_close(logits_of(plain, unquantised.codec), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["prompt-tuning", "lora+prompt-tuning"])
def test_law_8_a_biased_head_keeps_its_bias(tmp_path: Path, method: str) -> None:
    base = save_base(tmp_path / "base", biased_model)
    codec = add_tokens(TokenScheme(), load_tokenizer(str(base)))
    before = load_model(str(base), dtype="fp32")
    old = len(load_tokenizer(str(base)))
    ids = torch.tensor([codec.question_ids(own_traces(1)[0].question)])
    recipe = tiny_recipe(tmp_path, base, **{"method.name": method, "method.lora_module": MODULES["biased"]})
    with torch.no_grad():
        expected = before(ids).logits.clone()
        add_rows(before, codec)
        adapted = trainable(before, codec, recipe.method).eval()
        torch.testing.assert_close(adapted(ids).logits[..., :old], expected[..., :old], rtol=0, atol=1e-5)


def test_steps_without_kinds_and_arithmetic(tmp_path: Path) -> None:
    from memreason.core.files import write_traces

    base = save_base(tmp_path / "base")
    plain = [replace(trace, steps=tuple(replace(step, kinds=()) for step in trace.steps)) for trace in own_traces(8)]
    write_traces(tmp_path / "traces.jsonl", plain)
    losses(tiny_recipe(tmp_path, base, **{"tokens.kinds": [], "train.max_steps": 2}))
    scheme = read_json(tmp_path / "run" / "checkpoint-2" / "token_scheme.json")
    assert (scheme["n_prefix"], scheme["n_special"]) == (1, 0)
