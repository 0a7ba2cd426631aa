"""Training, timed: ours, a plain Trainer loop and TRL's SFTTrainer, on the same examples in the same order.

The baselines are what a careful user gets from the public libraries with their documented options.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from transformers import Trainer, TrainerCallback, TrainingArguments

from memreason.core.recipe import Recipe, load_recipe
from memreason.encode.base import load_model
from memreason.encode.examples import collate
from memreason.encode.vocab import add_rows
from memreason.fast.compiling import ENOUGH, pays
from memreason.fast.memory import peak_memory
from memreason.fast.rows import row_layers
from memreason.finetune.methods import lora_modules, network_of
from memreason.finetune.prepare import prepare, trainable_model
from memreason.finetune.train import train

__all__ = ["train_memreason", "train_plain", "train_trl"]

Spec = dict[str, Any]
Figures = dict[str, Any]


COMPILING = 4  # passes until a model is compiled for all lengths


class _Clock(TrainerCallback):  # type: ignore[misc]
    """When each optimizer step ended, and when the first passes did, which warm up and are not counted."""

    def __init__(self, warming: int = 1) -> None:
        self.ends: list[float] = []
        self.warming, self.passes, self.start = warming, 0, 0.0

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.passes += 1
        if self.passes == self.warming:
            self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.on_substep_end()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        return self.ends[-1] - self.start


def _recipe(spec: Spec, folder: str, **changes: Any) -> Recipe:
    shared = {
        "output_dir": folder,
        "data.validation": 0.0,
        "train.max_steps": spec["steps"],
        "train.save_strategy": "no",
        "train.train_sampling_strategy": "sequential",
        "train.disable_tqdm": True,
        "train.logging_steps": 1,
        "train.per_device_train_batch_size": spec["batch"],
    }
    return load_recipe(spec["recipe"], {**shared, **dict(spec.get("overrides", [])), **changes})


def _trained(clock: _Clock, rows: list[Any], history: list[dict[str, Any]], spec: Spec, micro: int) -> Figures:
    """Figures of a training job that took the rows in their order, `micro` in a pass; what warms up is left out."""
    counted = rows[micro * clock.warming : spec["batch"] * spec["steps"]]
    tokens = sum(len(row["input_ids"]) for row in counted)
    return {
        "examples": len(counted),
        "tokens": tokens,
        "seconds": clock.seconds,
        "tokens_per_second": tokens / clock.seconds,
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "step_tokens": [
            sum(len(row["input_ids"]) for row in rows[n : n + spec["batch"]])
            for n in range(spec["batch"], len(rows), spec["batch"])
        ],
        "step_seconds": [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)],
        "peak_memory": peak_memory(),
    }


def train_memreason(spec: Spec) -> Figures:
    """Ours, through the trainer that `memreason train` runs."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(spec, folder, **{"train.compile": pays(ENOUGH)})  # as in a run of usual length
        ready = prepare(recipe)
        rows = _in_order(ready.examples.rows, spec)
        model = trainable_model(recipe, ready.codec)
        done = train(recipe, model, ready.codec, rows, callbacks=[clock])
    parameters = sum(parameter.numel() for parameter in network_of(model).parameters())
    return {**_trained(clock, rows, done["history"], spec, spec["batch"]), "parameters": parameters}


def train_plain(spec: Spec) -> Figures:
    """A plain Trainer loop in the published shape: fp32, batch 1, accumulated, padded, logits of every position."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(spec, folder, **{"model.dtype": "fp32"})
        ready = prepare(recipe)
        rows = _in_order(ready.examples.rows, spec)
        model = trainable_model(recipe, ready.codec)
        for layer in row_layers(model):
            layer.__class__ = TrainableTokensLayer  # PEFT's own way of computing the rows
        trainer = Trainer(
            model=model,
            args=_arguments(folder, spec, batch=1, accumulation=spec["batch"]),
            train_dataset=rows,
            data_collator=lambda batch: {k: v for k, v in collate(batch, 0).items() if k != "shift_labels"},
            callbacks=[clock],
        )
        trainer.train()
    return _trained(clock, rows, trainer.state.log_history, spec, 1)


def train_trl(spec: Spec) -> Figures:
    """TRL's SFTTrainer with LoRA alone (it cannot train rows on a tied head), in the precision and batch of `spec`.

    `compile`: with `torch_compile`, which takes minutes the first time.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    clock = _Clock(COMPILING if spec["compile"] else 1)
    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(spec, folder)
        ready = prepare(recipe)
        rows = _in_order(ready.examples.rows, spec)
        bf16 = spec["dtype"] == "bf16"
        model = load_model(recipe.model.base, dtype=spec["dtype"])
        add_rows(model, ready.codec)
        data = Dataset.from_list([{name: list(row[name]) for name in ("input_ids", "labels")} for row in rows])
        method = recipe.method
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                **_arguments(folder, spec, batch=spec["micro"], accumulation=spec["batch"] // spec["micro"]).to_dict()
                | {"bf16": bf16, "max_length": None, "gradient_checkpointing": False, "torch_compile": spec["compile"]}
                | {"dataset_kwargs": {"skip_prepare_dataset": True}}
            ),
            train_dataset=data,
            processing_class=ready.codec.tokenizer,
            peft_config=LoraConfig(
                r=method.lora_r,
                lora_alpha=method.lora_alpha,
                lora_dropout=method.lora_dropout,
                target_modules=lora_modules(method),
                task_type="CAUSAL_LM",
            ),
            callbacks=[clock],
        )
        trainer.train()
    return _trained(clock, rows, trainer.state.log_history, spec, spec["micro"])


def _in_order(rows: Any, spec: Spec) -> list[Any]:
    """The examples of all steps, repeated if there are too few."""
    wanted = spec["steps"] * spec["batch"]
    return [rows[n % len(rows)] for n in range(wanted)]


def _arguments(folder: str, spec: Spec, *, batch: int, accumulation: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=spec["steps"],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        remove_unused_columns=False,
    )
