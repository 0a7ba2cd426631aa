"""Many processes at one run: what they compute is what one does, and what one leaves another takes up."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from conftest import BASES, save_base, tiny_model, tiny_recipe
from memreason import pipeline
from memreason.core.errors import ProcessError, RecipeError
from memreason.core.recipe import Recipe
from memreason.core.stages import MethodRecipe
from memreason.encode.codec import Codec
from memreason.encode.examples import Example, collate, first_rows, pack
from memreason.encode.pieces import IGNORED
from memreason.encode.vocab import add_rows
from memreason.finetune.methods import trainable
from memreason.finetune.processes import together
from memreason.finetune.sharded import check_shardable
from test_processes import curve, finished, memreason, recipe_file, wait_until

MACHINES = Path(__file__).parent.parent / "docs" / "machines"
EXACT = 1e-5  # of the loss, over every step
SETTINGS = {
    "data.validation": 0.3,  # 17 examples are left to train on: the third step of an epoch has one
    "train.max_steps": 6,
    "train.save_strategy": "steps",
    "train.save_steps": 2,  # once in the middle of the second epoch
    "train.eval_strategy": "steps",
    "train.eval_steps": 2,
}


def launched(processes: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))


def shared_by(processes: int, effective: int = 8) -> dict[str, Any]:
    return {"train.per_device_train_batch_size": effective // processes}


def train_together(folder: Path, recipe: Recipe, processes: int) -> dict[int, float]:
    with memreason("train", recipe_file(folder, recipe), before=launched(processes)) as process:
        code, _, errors = finished(process)
    assert code == 0, errors
    return curve(recipe.folder)


def as_stopped_at(run: Path, step: int, copy: Path) -> Path:
    """A copy of a run as it was when it was killed behind a checkpoint."""
    shutil.copytree(run, copy)
    for later in copy.glob("checkpoint-*"):
        if int(later.name.split("-")[1]) > step:
            shutil.rmtree(later)
    (copy / "trainer_state.json").unlink()
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "best": None}))
    return copy


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint-6" / "adapter_model.safetensors")


def optimizer(run: Path) -> Any:
    return torch.load(run / "checkpoint-6" / "optimizer.pt", weights_only=True)


def fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that `accelerate launch` makes of the shipped file."""
    parser = launch_command_parser()
    words = parser.parse_args(["--config_file", str(MACHINES / "eight-gpus-fsdp2.yaml"), "-m", "memreason"])
    for name, value in prepare_multi_gpu_env(_validate_launch_command(words)[0]).items():
        if name.startswith(("FSDP", "ACCELERATE")):
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize("path", sorted(MACHINES.glob("*.yaml")), ids=lambda path: path.stem)
def test_files_for_machines_are_what_accelerate_reads(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    words = launch_command_parser().parse_args(["--config_file", str(path), "-m", "memreason", "train", "demo"])
    read = _validate_launch_command(words)[0]
    eight, two, shared = "eight" in path.name, "two" in path.name, "fsdp2" in path.name
    assert (read.num_processes, read.num_machines) == (16, 2) if two else (8 if eight else 1, 1)
    assert (bool(read.use_fsdp), bool(read.multi_gpu)) == (shared, not shared and (eight or two))
    if shared:
        assert prepare_multi_gpu_env(read)["FSDP_VERSION"] == "2"


def test_fsdp2_is_as_one_process_and_either_takes_up_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", BASES["untied"])
    alone = tiny_recipe(tmp_path, base, **SETTINGS, **shared_by(1), output_dir=str(tmp_path / "alone"))
    pipeline.train(alone)
    two = tiny_recipe(tmp_path, base, **SETTINGS, **shared_by(2), output_dir=str(tmp_path / "two"))
    as_stopped_at(alone.folder, 4, two.folder)
    with monkeypatch.context() as only_there:
        fsdp2(only_there)
        assert train_together(tmp_path, two, 2) == pytest.approx(curve(alone.folder), abs=EXACT)
    for name, value in weights(alone.folder).items():
        assert torch.allclose(weights(two.folder)[name], value, atol=1e-3), name  # AdamW blows rounding up
    mine, theirs = optimizer(alone.folder)["state"], optimizer(two.folder)["state"]
    assert mine.keys() == theirs.keys()
    for number, own in mine.items():
        for name, value in own.items():
            assert torch.allclose(theirs[number][name], value, atol=1e-5), (number, name)
    manifest = json.loads((two.folder / "manifest.json").read_text())
    assert manifest["best"]["by"] == "eval_acc on validation"  # answered while the weights were shared out


@pytest.mark.soak
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_one_process_takes_up_what_two_left(tmp_path: Path, way: str) -> None:
    base = save_base(tmp_path / "base")  # tied: one matrix is in two layers
    settings = SETTINGS | {"train.eval_strategy": "no", "train.fsdp": way == "fsdp2"}
    two = tiny_recipe(tmp_path, base, **settings, **shared_by(2), output_dir=str(tmp_path / "two"))
    whole = train_together(tmp_path, two, 2)
    alone = tiny_recipe(tmp_path, base, **settings, **shared_by(1), output_dir=str(tmp_path / "alone"))
    alone = alone.model_copy(update={"train": alone.train.model_copy(update={"fsdp": None})})
    as_stopped_at(two.folder, 4, alone.folder)
    pipeline.train(alone)
    assert curve(alone.folder) == pytest.approx(whole, abs=EXACT)


def test_a_run_goes_on_with_other_processes_but_not_with_other_steps(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    settings = SETTINGS | {"train.eval_strategy": "no"}
    recipe = tiny_recipe(tmp_path, base, **settings, **shared_by(1))
    pipeline.train(recipe)
    stopped = as_stopped_at(recipe.folder, 4, tmp_path / "stopped")
    other = tiny_recipe(tmp_path, base, **settings, **shared_by(2), output_dir=str(stopped))
    with pytest.raises(RecipeError, match=r"its steps took 8 examples, these would take 4\. Let train\.per_device"):
        pipeline.train(other)
    halves = {**shared_by(2), "train.gradient_accumulation_steps": 2}
    pipeline.train(tiny_recipe(tmp_path, base, **settings, **halves, output_dir=str(stopped)))
    assert curve(stopped) == pytest.approx(curve(recipe.folder), abs=EXACT)


LONG = {**SETTINGS, "data.validation": 0, "train.eval_strategy": "no", "train.max_steps": 60, "train.save_steps": 5}


def killed_and_taken_up(folder: Path, way: str, first: int, then: int) -> None:
    """Train with so many processes, lose one of them, go on with others: the curve is that of an unbroken run."""
    base = save_base(folder / "base")
    settings = {**LONG, "train.save_total_limit": 2}
    pipeline.train(tiny_recipe(folder, base, **settings, **shared_by(1), output_dir=str(folder / "whole")))
    settings["train.fsdp"] = way == "fsdp2"
    recipe = tiny_recipe(folder, base, **settings, **shared_by(first))
    with memreason("train", recipe_file(folder, recipe), before=launched(first)) as process:
        wait_until(lambda: list(recipe.folder.glob("checkpoint-*/trainer_state.json")), process)
        (victim, *_) = workers(process.pid)
        start = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        code, _, errors = finished(process)
    assert code != 0
    assert time.monotonic() - start < 40  # torchrun gives the others 30 seconds
    ours = [line for line in errors.splitlines() if re.match(r"error: |\[rank|Traceback.*memreason", line)]
    assert len(ours) == first - 1, errors
    assert all(re.match(r"error: process \d: another process of this run has ended", line) for line in ours)
    assert not (recipe.folder / "trainer_state.json").exists()
    again = tiny_recipe(folder, base, **settings, **shared_by(then))
    if then == 1:
        again = again.model_copy(update={"train": again.train.model_copy(update={"fsdp": None})})
        pipeline.train(again)
    else:
        train_together(folder, again, then)
    assert curve(recipe.folder) == pytest.approx(curve(folder / "whole"), abs=EXACT)


def workers(launcher: int) -> list[int]:
    """Processes of a launcher, by their ids."""
    return [int(number) for number in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


def test_a_killed_process_ends_the_other_and_the_run_goes_on(tmp_path: Path) -> None:
    killed_and_taken_up(tmp_path, "ddp", 2, 1)


@pytest.mark.soak
@pytest.mark.parametrize(("first", "then"), [(2, 2), (4, 2), (2, 4), (4, 1)])
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_killed_processes_and_others_that_go_on(tmp_path: Path, way: str, first: int, then: int) -> None:
    killed_and_taken_up(tmp_path, way, first, then)


@pytest.mark.soak
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("method", ["full", "lora", "prompt-tuning", "lora+prompt-tuning"])
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
@pytest.mark.parametrize("base", ["tied", "untied"])
def test_every_method_is_as_one_process(tmp_path: Path, base: str, way: str, method: str, processes: int) -> None:
    model = save_base(tmp_path / "base", BASES[base])
    settings = {**SETTINGS, "method.name": method, "train.learning_rate": 1e-3}
    alone = tiny_recipe(tmp_path, model, **settings, **shared_by(1), output_dir=str(tmp_path / "alone"))
    pipeline.train(alone)
    settings["train.fsdp"] = way == "fsdp2"
    many = tiny_recipe(tmp_path, model, **settings, **shared_by(processes))
    assert train_together(tmp_path, many, processes) == pytest.approx(curve(alone.folder), abs=EXACT)


@pytest.mark.parametrize(
    ("method", "plugin", "named"),
    [
        ("prefix-tuning", {}, "virtual tokens"),
        ("lora", {"activation_checkpointing": True}, "train.gradient_checkpointing"),
        ("full", {"cpu_ram_efficient_loading": True}, "tied embeddings"),
        ("full", {"fsdp_version": 1}, "version 1"),
    ],
)
def test_what_cannot_be_shared_out_is_named(byte_codec: Codec, method: Any, plugin: dict[str, Any], named: str) -> None:
    model = tiny_model(len(byte_codec.tokenizer))
    add_rows(model, byte_codec)
    learnt = trainable(model, byte_codec, MethodRecipe(name=method))
    plain = {"fsdp_version": 2, "activation_checkpointing": False, "cpu_ram_efficient_loading": False}
    with pytest.raises(RecipeError, match=named) as caught:
        check_shardable(SimpleNamespace(**{**plain, **plugin}), learnt)
    assert len(caught.value.problems) == 1
    if method != "prefix-tuning":
        check_shardable(SimpleNamespace(**plain), learnt)


@pytest.mark.soak
def test_two_processes_intervene_as_one(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, save_base(tmp_path / "base"), **{"eval.n": 5, "eval.max_new_tokens": 24})
    run = pipeline.train(recipe)
    shutil.copytree(run, tmp_path / "two")
    with memreason("probe", str(run)) as alone:
        code, _, errors = finished(alone)
    assert code == 0, errors
    with memreason("probe", str(tmp_path / "two"), before=launched(2)) as both:
        code, _, errors = finished(both)
    assert code == 0, errors
    one, two = (
        {path.name: path.read_text() for path in place.glob("checkpoint-*/eval/*/given-*.jsonl")}
        for place in (run, tmp_path / "two")
    )
    assert one and one == two


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_rows_that_were_seen_already_are_not_supervised(count: int) -> None:
    rows: list[Example] = [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    for batch in (pack(rows), collate(rows, 0)):
        kept = first_rows(batch, count)
        assert torch.equal(kept["input_ids"], batch["input_ids"])
        for name in ("labels", "shift_labels"):
            taught = (pack if batch["labels"].shape[0] == 1 else partial(collate, pad_id=0))(rows[:count] or rows)[name]
            wanted = (taught != IGNORED).sum() if count else 0
            assert (kept[name] != IGNORED).sum() == wanted, (name, count)


def test_only_a_lost_process_is_called_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer.")
    with pytest.raises(RuntimeError, match="reset"), together():  # of a run of one process
        raise lost
    two = SimpleNamespace(num_processes=2, process_index=1)
    monkeypatch.setattr("memreason.finetune.processes.PartialState", lambda: two)
    with pytest.raises(ProcessError, match="Connection reset by peer"), together():
        raise lost
    with pytest.raises(RuntimeError, match="shapes"), together():
        raise RuntimeError("shapes cannot be multiplied")
