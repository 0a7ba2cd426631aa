"""Estimates of memory and time against trainings that are run: python benchmarks/estimated.py [--json] [NAME ...]

Each training runs in a process of its own, between two measurements of the machine, whose mean is what the estimate
is given. All of it on one thread and in seconds of the processor, not of the clock: other jobs then count less. The
reach of a processor (`CPU_REACH` in `timing/hardware.py`) was set on the first row alone, and the others check it; how
often a place in its heap is lost (`LOST` in `timing/heap.py`) with all of them in view. Bounds: memory 15 %, time 30 %.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from memreason.core.recipe import Recipe, load_recipe
from memreason.encode.base import load_tokenizer
from memreason.fast.memory import peak_memory
from memreason.finetune.prepare import prepare, trainable_model
from memreason.finetune.train import train
from memreason.timing import hardware
from memreason.timing.estimate import estimate
from memreason.timing.machine import best_seconds

Case = dict[str, Any]
CASES: dict[str, Case] = {
    "LoRA on all": {"train.max_steps": 8},
    "LoRA on all, 30M": {"model.base": "SMALL", "train.max_steps": 12},
    "rows alone": {"method.name": "prompt-tuning", "train.max_steps": 6},
    "everything": {"method.name": "full", "train.max_steps": 6},
    "LoRA on mlp, 1,230 tokens a pass": {
        "method.lora_module": "mlp",
        "train.per_device_train_batch_size": 40,
        "train.pass_tokens": 2048,
        "train.max_steps": 3,
    },
    "LoRA on all, checkpointed": {"train.gradient_checkpointing": True, "train.max_steps": 4},
}


def small(folder: Path) -> str:
    """A Llama of 30 million parameters with random weights."""
    tokenizer = load_tokenizer("smollm2-135m")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def apart(job: str, case: Case) -> dict[str, float]:
    """One of JOBS in a process of its own."""
    command = [sys.executable, __file__, job, json.dumps(case)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def probe(_case: Case) -> dict[str, float]:
    """FLOP/s of fp32 products and bytes a second of reads, each the best of several, in seconds of the processor."""
    left, right, large = torch.randn(2048, 2048), torch.randn(2048, 2048), torch.randn(64 * 2**20)
    best = partial(best_seconds, clock=time.process_time)
    return {"gemm": 2 * 2048**3 / best(lambda: left @ right.T), "read": large.nbytes / best(large.sum)}


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds of the processor at the start and after each step."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.at = self.at or [time.process_time()]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.at.append(time.process_time())


def run(case: Case) -> dict[str, float]:
    recipe, clock = recipe_of(case), Clock()
    ready = prepare(recipe)
    train(recipe, trainable_model(recipe, ready.codec), ready.codec, ready.examples.rows, callbacks=[clock])
    return {"took": clock.at[-1] - clock.at[0], "peak": peak_memory()}


def recipe_of(case: Case) -> Recipe:
    shared = {"model.dtype": "fp32", "train.eval_strategy": "no", "train.save_strategy": "no"}
    with tempfile.TemporaryDirectory() as folder:
        return load_recipe("demo", {**shared, "train.disable_tqdm": True, "output_dir": folder, **case})


def compare(case: Case) -> dict[str, float]:
    """What was estimated and what came: bytes and seconds."""
    before, came, after = apart("probe", case), apart("run", case), apart("probe", case)
    rates = tuple((before[name] + after[name]) / 2 for name in ("gemm", "read"))
    hardware._processor = lambda _dtype: rates  # type: ignore[assignment,return-value]
    found = estimate(recipe_of(case), gpus="cpu")
    seconds = sum(found["seconds"]["training"]) / 2
    return {**came, "memory": found["memory"]["total"], "seconds": seconds, "gemm": rates[0], "read": rates[1]}


def line(name: str, row: dict[str, float]) -> str:
    memory, took = row["memory"] / row["peak"] - 1, row["seconds"] / row["took"] - 1
    return (
        f"{name:<33} memory {row['memory'] / 2**30:5.2f} GiB, came {row['peak'] / 2**30:5.2f} ({memory:+4.0%})   "
        f"time {row['seconds']:6.1f} s, came {row['took']:6.1f} ({took:+4.0%})   {row['gemm'] / 1e9:.0f} GFLOP/s"
    )


JOBS = {"probe": probe, "run": run}


def main() -> None:
    words = sys.argv[1:]
    if words and words[0] in JOBS:
        print(json.dumps(JOBS[words[0]](json.loads(words[1]))))
        return
    names = [word for word in words if word != "--json"] or list(CASES)
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = small(Path(scratch))
        for name in names:
            rows[name] = compare({key: base if value == "SMALL" else value for key, value in CASES[name].items()})
            print(line(name, rows[name]), file=sys.stderr, flush=True)
    if "--json" in words:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
