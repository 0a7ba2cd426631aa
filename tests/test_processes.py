"""Real processes: what is killed or stopped goes on as if nothing had happened, and two processes do what one does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conftest import save_base, tiny_recipe
from memreason import pipeline
from memreason.core.recipe import Recipe
from memreason.encode.base import load_model, load_tokenizer
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_rows, add_tokens
from memreason.finetune.checkpoint import save_checkpoint
from memreason.finetune.methods import trainable

PATIENCE = 180  # seconds that a process may take on a busy machine before a test gives up
VOLATILE = {"seconds", "answered_before", "peak_memory", "checkpoint", "folder"}
CURVE = {
    "train.max_steps": 40,
    "train.save_strategy": "steps",
    "train.save_steps": 3,  # no divisor of the epoch's 6 steps but 3: checkpoints in the middle of epochs too
    "train.save_total_limit": 3,
    "method.lora_dropout": 0.1,  # the random state is part of what is resumed
}


@contextmanager
def memreason(*words: str, before: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """`python -m memreason words`, killed if the block leaves it running."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, *before, "-m", "memreason", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, out, errors


def wait_until(there: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


def curve(run: Path) -> dict[int, float]:
    """Step -> loss, from the log of a finished run."""
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def recipe_file(folder: Path, recipe: Recipe) -> str:
    path = folder / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    return str(path)


@pytest.fixture
def interrupted(tmp_path: Path) -> tuple[str, Path, dict[int, float]]:
    """A recipe's file, its run folder, and the curve that it has when nothing interrupts it."""
    base = save_base(tmp_path / "base")
    pipeline.train(tiny_recipe(tmp_path, base, **{**CURVE, "output_dir": str(tmp_path / "whole")}))
    whole = curve(tmp_path / "whole")
    assert list(whole) == list(range(1, 41))
    return recipe_file(tmp_path, tiny_recipe(tmp_path, base, **CURVE)), tmp_path / "run", whole


def test_killed_training_goes_on_the_same_curve(interrupted: tuple[str, Path, dict[int, float]]) -> None:
    recipe, run, whole = interrupted
    with memreason("train", recipe) as process:
        wait_until(lambda: list(run.glob("checkpoint-*/trainer_state.json")), process)
        process.send_signal(signal.SIGKILL)
    assert not (run / "trainer_state.json").exists()
    with memreason("train", recipe) as process:
        code, _, errors = finished(process)
    assert code == 0, errors
    assert curve(run) == whole
    assert not (run / ".partial").exists()


def test_ctrl_c_stops_cleanly_and_goes_on(interrupted: tuple[str, Path, dict[int, float]]) -> None:
    recipe, run, whole = interrupted
    with memreason("train", recipe) as process:
        wait_until(lambda: list(run.glob("checkpoint-*/trainer_state.json")), process)
        process.send_signal(signal.SIGINT)
        code, out, errors = finished(process)
    assert code == 130
    said = [line for line in errors.splitlines() if line.strip() and "Loading weights" not in line]
    assert said == ["stopped; run the same command again to go on"]
    assert "Traceback" not in out
    assert not (run / "trainer_state.json").exists()
    with memreason("train", recipe) as process:
        code, _, errors = finished(process)
    assert code == 0, errors
    assert curve(run) == whole


def untrained_checkpoint(folder: Path, recipe: Recipe) -> Path:
    """A checkpoint as it is before the first step: enough to be evaluated."""
    codec = add_tokens(TokenScheme(), load_tokenizer(recipe.model.base))
    model = load_model(recipe.model.base, dtype="fp32")
    add_rows(model, codec)
    save_checkpoint(folder, trainable(model, codec, recipe.method), codec, recipe)
    return folder


def test_killed_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    settings = {"eval.n": 40, "eval.batch_size": 2, "eval.max_new_tokens": 48}
    checkpoint = untrained_checkpoint(tmp_path / "one", tiny_recipe(tmp_path, base, **settings))
    shutil.copytree(checkpoint, tmp_path / "two")
    whole = json.loads(json.dumps(pipeline.evaluate(tmp_path / "two")))
    with memreason("eval", str(checkpoint)) as process:
        wait_until(lambda: any(p.read_text().count("\n") > 1 for p in checkpoint.glob("eval/*/samples.jsonl")), process)
        process.send_signal(signal.SIGKILL)
    (samples,) = checkpoint.glob("eval/*/samples.jsonl")
    kept = [line for line in samples.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert 2 <= len(kept) < 40
    with samples.open("a") as torn:
        torn.write('{"id": "cut in the mid')
    with memreason("eval", str(checkpoint)) as process:
        code, _, errors = finished(process)
    assert code == 0, errors
    results = json.loads((samples.parent / "results.json").read_text())
    assert results["answered_before"] == len(kept)
    assert {k: v for k, v in results.items() if k not in VOLATILE} == {
        k: v for k, v in whole.items() if k not in VOLATILE
    }
    lines = samples.read_text().splitlines(keepends=True)
    assert set(kept) <= set(lines)
    assert len({json.loads(line)["id"] for line in lines}) == len(lines) == 40


def test_two_processes_train_and_evaluate_as_one(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    shared = {
        "train.max_steps": 6,
        "train.train_sampling_strategy": "random",  # grouping by length depends on the batch size
        "train.save_strategy": "steps",
        "train.save_steps": 3,
        "eval.n": 9,  # odd: one process has a question more than the other
        "eval.batch_size": 2,
    }
    one = tiny_recipe(
        tmp_path, base, **shared, **{"output_dir": str(tmp_path / "one"), "train.per_device_train_batch_size": 8}
    )
    alone = pipeline.run(one)
    two = tiny_recipe(tmp_path, base, **shared)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    with memreason("run", recipe_file(tmp_path, two), before=launcher) as process:
        code, _, errors = finished(process)
    assert code == 0, errors
    together, apart = curve(tmp_path / "run"), curve(tmp_path / "one")
    assert list(together) == list(range(1, 7))
    assert together == pytest.approx(apart, abs=1e-5)
    folder = tmp_path / "run" / Path(alone["folder"]).relative_to(tmp_path / "one")
    assert [path.name for path in sorted(folder.glob("samples*"))] == ["samples.jsonl"]
    mine, theirs = (
        [json.loads(line) for line in (place / "samples.jsonl").read_text().splitlines()]
        for place in (folder, Path(alone["folder"]))
    )
    assert [line["id"] for line in mine] == [line["id"] for line in theirs]
    assert len({line["id"] for line in mine}) == 9
    results = json.loads((folder / "results.json").read_text())
    assert results["accuracy"] == alone["accuracy"]
