"""Estimates: what is counted is what a real model has, what is rehearsed is what a real pass does, and sums add up."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import BASES, save_base, tiny_recipe
from memreason.cli import main
from memreason.core.errors import RecipeError
from memreason.core.recipe import load_recipe
from memreason.encode.examples import pack
from memreason.fast.attention import PACKED, attending
from memreason.fast.loss import Head, chunked_loss, head_of
from memreason.finetune.methods import network_of
from memreason.finetune.prepare import prepare, scheme_of, trainable_model
from memreason.timing import hardware as devices
from memreason.timing.estimate import estimate
from memreason.timing.footprint import SPARE, footprint, remedies
from memreason.timing.hardware import hardware
from memreason.timing.heap import heap_peak
from memreason.timing.job import Job
from memreason.timing.passes import Shape, train_pass
from memreason.timing.rehearsal import heap_of, rehearse
from memreason.timing.skeleton import configuration, shipped_size, sizes, skeleton, with_layers
from memreason.timing.workload import encoded, workload

METHODS = ("full", "lora", "prompt-tuning", "lora+prompt-tuning", "prefix-tuning")
GIB = 2**30


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor of round figures, in place of this one's."""
    monkeypatch.setattr(devices, "_processor", lambda _dtype: (100e9, 10e9))


def counts(model: Any) -> tuple[int, int, int]:
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    held = sum(p.numel() * p.element_size() for p in parameters)
    return sum(p.numel() for p in parameters), sum(p.numel() for p in trained), held


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", BASES)
def test_a_skeleton_has_the_parameters_of_the_real_model(tmp_path: Path, make: str, method: str) -> None:
    changes: dict[str, Any] = {"method.name": method}
    recipe = tiny_recipe(tmp_path, save_base(tmp_path / "base", BASES[make]), **changes)
    ready = prepare(recipe)
    load = encoded(recipe, ready)
    model = skeleton(recipe, configuration(recipe), scheme_of(recipe), load.tokenizer, torch.float32)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    found = sizes(model, recipe)
    assert (found.parameters, found.trained, found.weights) == counts(trainable_model(recipe, ready.codec))


# Parameters as their publishers state them.
PUBLISHED = {
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
}


@pytest.mark.parametrize("base", PUBLISHED)
def test_shipped_configurations_have_the_published_sizes(base: str) -> None:
    recipe = load_recipe(None, {"model.base": base, "tokens.add": False, "method.name": "full"})
    size = shipped_size(base)
    assert size
    model = skeleton(recipe, configuration(recipe), scheme_of(recipe), size, torch.bfloat16)
    found = sizes(model, recipe)
    assert found.parameters == found.trained == PUBLISHED[base]
    assert (found.weights, found.optimizer) == (2 * PUBLISHED[base], 4 * PUBLISHED[base])


def job_of(tmp_path: Path, gpus: str = "cpu", **changes: Any) -> Job:
    recipe = tiny_recipe(tmp_path, save_base(tmp_path / "base"), **changes)
    return Job(recipe, configuration(recipe), workload(recipe), hardware(gpus, "fp32"))


@pytest.mark.parametrize("method", ["full", "lora+prompt-tuning"])
def test_a_rehearsed_pass_computes_what_a_real_one_does(tmp_path: Path, method: str) -> None:
    """FLOPs of a real packed pass, attention aside, which torch's counter does not know."""
    changes: dict[str, Any] = {"method.name": method}
    job = job_of(tmp_path, **changes)
    ready = prepare(job.recipe)
    batch = pack([ready.examples.rows[n] for n in range(4)])
    labels = batch.pop("shift_labels")
    batch.pop("labels")
    model = trainable_model(job.recipe, ready.codec).train()
    columns = (labels[0] != -100).nonzero().squeeze(1)
    head = network_of(model).get_output_embeddings()
    head.forward = lambda hidden: hidden
    with attending(network_of(model), PACKED), FlopCounterMode(display=False) as counter:
        hidden = model(**batch, use_cache=False, logits_to_keep=columns).logits[0]
        chunked_loss(hidden, labels[0, columns], head_of(head)).backward()
    lengths = tuple(batch["cu_seq_lens_q"].diff().tolist())
    shape = Shape(lengths, len(columns) / sum(lengths), packed=True)
    attention = 7 * 2 * shape.pairs * job.config.hidden_size * job.config.num_hidden_layers
    assert job.rehearsed(shape).flops - attention == counter.get_total_flops()


def test_pairs_are_those_that_are_computed() -> None:
    assert Shape((3, 400), 1.0, packed=True).pairs == 3 * 3 + 192 * 192 + 192 * 384 + 16 * 400
    assert Shape((3, 400), 1.0, packed=False).pairs == 2 * 400 * 400 / 2


def test_layers_that_are_alike_are_told_from_few(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    shape = job.passes.largest
    few, whole = (rehearse(job.model, 12, train_pass(shape), shape.pairs, few=few) for few in (True, False))
    assert few.flops == whole.flops
    assert few.peak == pytest.approx(whole.peak, rel=1e-3)
    assert [count for count, _ in few.lives] == [-1, 2]  # 12 layers are twice eight less four
    # Which places a heap loses is a count of requests, so that it grows by layers in steps.
    assert heap_of(few, few) == pytest.approx(heap_of(whole, whole), rel=0.1)
    rates = (1e9, 1e9, 1e8, 1e-6)
    assert few.seconds(*rates) == pytest.approx(whole.seconds(*rates), rel=1e-3)


TENSOR = 2**20


def after(*sizes: int) -> list[tuple[int, int]]:
    """Tensors of such sizes are made and then freed, one by one."""
    return [event for number, size in enumerate(sizes) for event in ((number, size), (number, -1))]


def test_freed_memory_is_used_again() -> None:
    one = heap_peak([[(0, TENSOR)]])
    assert TENSOR <= one < TENSOR + 200
    assert heap_peak([after(*[TENSOR] * 15)]) == one
    grown = heap_peak([[(n, TENSOR) for n in range(3)]])
    assert heap_peak([[*((n, TENSOR) for n in range(3)), (0, -1), (1, -1), (3, 2 * TENSOR - 100)]]) == grown  # together
    assert heap_peak([[*((n, TENSOR) for n in range(3)), (0, -1), (3, TENSOR // 2), (4, TENSOR // 3)]]) == grown
    assert heap_peak([[*((n, TENSOR) for n in range(3)), (0, -1), (3, 2 * TENSOR)]]) == pytest.approx(
        5 * TENSOR, rel=1e-3
    )


def test_a_place_whose_end_is_lost_is_lost_for_its_size() -> None:
    """The twentieth request keeps its spare end, so that the twenty-first of its size takes new memory beside it."""
    nineteen = [(0, TENSOR), *((n, size) for n in range(1, 19) for size in (TENSOR, -1))]
    lost = [*nineteen, (19, TENSOR), (20, TENSOR), (19, -1), (21, TENSOR)]
    assert heap_peak([lost]) == pytest.approx(4 * TENSOR, rel=1e-3)
    assert heap_peak([[*lost[:-1], (21, TENSOR // 2)]]) == pytest.approx(3 * TENSOR, rel=1e-3)


def test_the_largest_tensors_are_mapped_apart() -> None:
    large = 40 * TENSOR
    assert heap_peak([after(large, large)]) == large
    assert heap_peak([after(large), after(large, TENSOR)]) == large
    assert heap_peak([[(0, large), (1, TENSOR)]]) == pytest.approx(41 * TENSOR, rel=1e-3)


def test_checkpointing_trades_memory_for_work(tmp_path: Path) -> None:
    job = replace(job_of(tmp_path), config=with_layers(job_of(tmp_path).config, 8))
    plain, kept = (
        one.rehearsed(one.passes.largest) for one in (job, job.changed(**{"train.gradient_checkpointing": True}))
    )
    assert kept.peak < 0.7 * plain.peak
    assert 1.2 < kept.flops / plain.flops < 1.6


def test_memory_is_shared_out_by_fsdp_alone(tmp_path: Path) -> None:
    one, copies = (footprint(job_of(tmp_path, gpus)) for gpus in ("a100-80", "8xa100-80"))
    shards = footprint(job_of(tmp_path, "8xa100-80", **{"train.fsdp": True}))
    assert copies["weights"] == one["weights"]
    assert copies["gradients"] == 2 * one["gradients"]  # DDP's buckets
    assert shards["optimizer"] == one["optimizer"] / 8
    assert shards["weights"] < 2 * one["weights"]


def test_what_would_fit_is_tried(tmp_path: Path) -> None:
    job = job_of(tmp_path, "l4", **{"train.per_device_train_batch_size": 8})
    less = job.changed(**{"train.per_device_train_batch_size": 1})
    need, needed = (footprint(one)["total"] for one in (job, less))
    tight = replace(job, machine=replace(job.machine, memory=(need + needed) / 2 / (1 - SPARE)))
    found = remedies(tight)
    assert any("per_device_train_batch_size 1" in text for text in found)
    hopeless = replace(job, machine=replace(job.machine, memory=1e3))
    assert remedies(hopeless) == []


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("8xB9000", None), "unknown device"),
        (("0xh100", None), "a count and a device"),
        (("h100", "cheap"), "a number or a range"),
        (("h100", "3-2"), "a number or a range"),
    ],
)
def test_unknown_hardware_is_refused(words: tuple[str, str | None], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        hardware(words[0], "auto", words[1])


def test_devices_are_named_in_several_ways() -> None:
    names = {words: str(hardware(words, "auto")) for words in ("8xA100-80", "8 x a100-80", "h100", "1xL4")}
    assert names == {"8xA100-80": "8 x A100-80", "8 x a100-80": "8 x A100-80", "h100": "H100", "1xL4": "L4"}
    assert hardware("h100", "auto", "2").dollars == (2.0, 2.0)


def test_an_fp32_head_under_autocast() -> None:
    """What training over a quantised base is: the loss is that of full precision, not an error."""
    weight, hidden, gold = torch.randn(50, 8), torch.randn(5, 8, requires_grad=True), torch.arange(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked_loss(hidden, gold, Head(weight))
    found.backward()
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, gold, reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


# The published settings, worked out by hand. Llama-2-7B in 8 bits: 32 layers of 4 x 4096^2 + 3 x 4096 x 11008 weights
# of a byte, the embedding and the head in fp32, 18 new rows each; LoRA of rank 16 on the mlp, trained in fp32.
LAYER = 4 * 4096**2 + 3 * 4096 * 11008
ROWS = 18
LORA = 32 * 3 * 16 * (4096 + 11008)
BY_HAND = {
    "weights": 32 * LAYER + 2 * 4 * 4096 * (32000 + ROWS) + 4 * LORA,
    "trained": LORA + 2 * ROWS * 4096,
    "flops a token": 4 * (32 * LAYER + 4096 * 32000) + 6 * LORA,
}


def test_the_published_setting_by_hand() -> None:
    recipe = load_recipe("llama2-7b-strategyqa")
    found = estimate(recipe, gpus="a100-80", traces=1588, tokens=288, dollars="2")
    memory = found["memory"]
    assert found["model"]["trained"] == BY_HAND["trained"]
    assert memory["weights"] == pytest.approx(BY_HAND["weights"], rel=0.002)  # norms, and a scale for each row
    assert memory["gradients"] == 4 * BY_HAND["trained"]
    assert memory["optimizer"] == 8 * BY_HAND["trained"]
    assert memory["total"] == sum(value for name, value in memory.items() if name != "total")
    assert found["steps"] == 1000  # 100 an epoch of 1,588 examples, 16 at a time
    assert found["flops_per_token"] == pytest.approx(BY_HAND["flops a token"], rel=0.03)  # and attention
    assert found["flops"] == pytest.approx(1588 * 288 * 10 * BY_HAND["flops a token"], rel=0.03)
    best, worst = found["seconds"]["training"]
    assert best > found["flops"] / 312e12
    assert found["dollars"]["training"] == pytest.approx([best / 1800, worst / 1800])
    assert found["evaluation"]["cache"] == 2 * 32 * 4096 * 2 * 288  # a row of 16 + 256 tokens, in steps of 32


def test_devices_share_the_work(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, save_base(tmp_path / "base"), **{"train.max_steps": -1})
    one, eight = (estimate(recipe, gpus=gpus, traces=3200, tokens=60) for gpus in ("a100-80", "8xa100-80"))
    assert (one["steps"], eight["steps"]) == (800, 100)
    assert eight["flops"] == pytest.approx(one["flops"])
    assert eight["seconds"]["training"][1] == pytest.approx(one["seconds"]["training"][1] / 8, rel=0.05)
    assert (one["strategy"], eight["strategy"]) == ("one device", "DDP")


@pytest.mark.soak
def test_a_70b_model_takes_eight_devices() -> None:
    """70.6 billion weights in bf16 are 131 GiB: never on one H100, 16 GiB on each of eight, and two layers and what is
    outside of them whole meanwhile."""
    changes = {"model.base": "meta-llama/Llama-3.1-70B-Instruct", "model.quantize": None, "train.fsdp": True}
    recipe = load_recipe("llama2-7b-strategyqa", changes)
    found = estimate(recipe, gpus="8xh100", traces=1588, tokens=288)
    layer = 2 * 8192**2 * (1 + 1 / 8) + 3 * 8192 * 28672
    by_hand = 2 * (70.55e9 / 8 + 2 * layer + 2 * 8192 * 128256)
    assert found["memory"]["weights"] == pytest.approx(by_hand, rel=0.05)
    assert found["fits"]
    alone = estimate(recipe, gpus="h100", traces=100, tokens=288)
    assert not alone["fits"]
    assert any(text.startswith("--model.quantize 4bit") for text in alone["remedies"])
    assert any("--gpus 4xH100" in text or "--gpus 8xH100" in text for text in alone["remedies"])


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(tmp_path, save_base(tmp_path / "base"))
    Path("recipe.yaml").write_text(recipe.to_yaml())
    assert main(["estimate", "recipe.yaml", "--gpus", "2xl4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data"]["examples"] == 24
    assert found["steps"] == 3
    assert main(["estimate", "recipe.yaml", "--gpus", "l4", "--dollars-per-hour", "1-2"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("weights", "optimizer", "evaluation", "dollars", "of the peak"))
    assert main(["estimate", "recipe.yaml", "--gpus", "nonsense"]) == 2
    assert "unknown device" in capsys.readouterr().err


TRAININGS = (
    "LoRA on all",
    "LoRA on all, 30M",
    "rows alone",
    "everything",
    "LoRA on mlp, 1,230 tokens a pass",
    "LoRA on all, checkpointed",
)


@pytest.fixture(scope="module")
def row(request: pytest.FixtureRequest) -> dict[str, float]:
    """What was estimated of a training and what came, in a process of its own."""
    script = Path(__file__).parent.parent / "benchmarks" / "estimated.py"
    command = [sys.executable, str(script), "--json", request.param]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)[request.param]
    print({key: found[key] for key in ("memory", "peak", "seconds", "took")})
    return found


@pytest.mark.soak
@pytest.mark.parametrize("row", TRAININGS, indirect=True)
def test_time_comes_true(row: dict[str, float]) -> None:
    assert row["seconds"] / row["took"] == pytest.approx(1, abs=0.3)


@pytest.mark.soak
@pytest.mark.parametrize("row", TRAININGS, indirect=True)
def test_memory_comes_true(row: dict[str, float]) -> None:
    assert row["memory"] / row["peak"] == pytest.approx(1, abs=0.15)
