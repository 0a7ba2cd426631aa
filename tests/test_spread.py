"""A model whose layers lie on several devices answers as it does on one, and is exported as it is."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import BASES, save_base, tiny_recipe
from memreason import pipeline
from memreason.core.errors import ModelError
from memreason.core.recipe import load_recipe
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question
from memreason.finetune.checkpoint import load_checkpoint
from memreason.finetune.spread import is_spread, places_of
from memreason.generate.engine import Cohort, _attend
from memreason.generate.rows import Row

LITTLE = {"untied": "185KB", "tied": "130KB"}  # of memory: embeddings and one of two layers at a time


@pytest.fixture(params=["untied", "tied"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    base = save_base(tmp_path / "base", BASES[request.param])
    recipe = tiny_recipe(tmp_path, base, **{"data.validation": 0, "eval.n": 5, "eval.max_new_tokens": 24})
    return pipeline.train(recipe), {"cpu": LITTLE[request.param]}


def samples(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(results["folder"]) / "samples.jsonl").read_text().splitlines()]


def test_layers_on_disk_give_the_same_traces(
    run: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMREASON_HOME", str(tmp_path / "home"))
    folder, memory = run
    whole = pipeline.evaluate(folder)
    spread = load_checkpoint(folder, offload=memory)
    places: dict[str, Any] = dict(spread.model.hf_device_map)  # type: ignore[arg-type]
    assert [place for name, place in places.items() if "layers" in name] == ["disk", "disk"]
    assert {place for name, place in places.items() if "layers" not in name} == {"cpu"}
    meta = [name for name, value in spread.model.named_parameters() if value.device.type == "meta"]
    assert any("lora_A" in name for name in meta) and not any("token_adapter" in name for name in meta)
    offloaded = pipeline.evaluate(folder, offload=memory)
    assert offloaded["folder"] != whole["folder"]
    for one, other in zip(samples(whole), samples(offloaded), strict=True):
        assert one["ids"] == other["ids"]
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)
    del spread
    gc.collect()
    assert not list((tmp_path / "home").glob("offloaded-*"))


def test_enough_memory_leaves_a_model_in_one_place(run: tuple[Path, dict[str, str]]) -> None:
    assert "disk" not in getattr(load_checkpoint(run[0], offload={"cpu": "1GB"}).model, "hf_device_map", {}).values()


def test_too_little_memory_is_an_error(run: tuple[Path, dict[str, str]]) -> None:
    with pytest.raises(ModelError, match=r"40,000 bytes of cpu do not hold the embeddings \(.*\) and a layer"):
        load_checkpoint(run[0], offload={"cpu": "40KB"})


def test_layers_go_to_devices_in_turn() -> None:
    model = BASES["untied"](400)
    layer = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    rest = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) - 2 * layer
    beside = {"model.embed_tokens": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    two: dict[Any, int] = {0: rest + 2 * layer, 1: layer, "cpu": 10 * layer}
    assert places_of(model, two) == beside | {"model.layers.0": 0, "model.layers.1": 0}
    two[0] -= 1  # then room is kept for a layer that is brought in
    assert places_of(model, two) == beside | {"model.layers.0": 1, "model.layers.1": "cpu"}
    assert places_of(model, {0: rest + layer}) == beside | {"model.layers.0": "disk", "model.layers.1": "disk"}


def test_attention_computes_where_its_layer_lies() -> None:
    """Tensors of two devices in one operation are an error: meta stands for a second GPU."""
    rows = [Row(Question("", ""), 0, 9, ids, torch.Generator()) for ids in ([1, 2, 3], [4])]
    cohort = Cohort(rows, torch.device("cpu"))
    query, key = torch.zeros(1, 4, 4, 8, device="meta"), torch.zeros(1, 2, 4, 8, device="meta")
    layer = torch.nn.Module()
    layer.layer_idx = 0  # type: ignore[assignment]
    found, _ = _attend(layer, query, key, key, None, cohorts=[cohort])
    assert found.device.type == cohort.memory[0][0].device.type == "meta"
    cohort.plan()
    assert cohort.on(torch.device("cpu")).row.tolist() == [0, 0, 0, 1]


def test_the_recipe_takes_what_each_device_may_give() -> None:
    recipe = load_recipe("demo", {"model.offload": "{'0': 20GiB, cpu: 60GiB}"})
    assert recipe.model.offload == {"0": "20GiB", "cpu": "60GiB"}
    assert load_recipe("demo", {"model.offload": "true"}).model.offload is True
    assert not is_spread(torch.nn.Linear(1, 1))
    assert EvalRecipe().engine == "local"
