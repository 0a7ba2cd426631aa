"""One Trainer run for every method."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from memreason.core.errors import RecipeError
from memreason.core.files import writing
from memreason.core.recipe import Recipe
from memreason.encode.base import pick_dtype
from memreason.encode.codec import Codec
from memreason.encode.examples import Example, collate
from memreason.fast.memory import keep_freed_memory
from memreason.finetune.callbacks import Bar, StopCleanly, Warmup
from memreason.finetune.checkpoint import checkpoints_in
from memreason.finetune.processes import check_same_folder, together
from memreason.finetune.trainer import Evaluate, TraceTrainer, best_step, unanswered

__all__ = ["train", "training_arguments"]

log = logging.getLogger("memreason")

DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "logging_steps": 5,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "report_to": "none",
    "disable_tqdm": False,  # else Transformers drops the bar at log level error
    "ddp_find_unused_parameters": False,  # every method uses all that it trains
    "remove_unused_columns": False,
}


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """TrainingArguments of a recipe: our defaults, then its fields. Raises RecipeError for a bad value."""
    values = {**DEFAULTS, **(recipe.train.model_extra or {}), "output_dir": str(recipe.folder), "seed": recipe.seed}
    if not torch.cuda.is_available():
        # fp16 needs a GPU; bf16 autocast is its counterpart here, if the CPU multiplies it at all.
        half = values.pop("fp16", False) or values.pop("bf16", None)
        wanted = half if half is not None else pick_dtype(recipe.model.dtype) == torch.bfloat16
        values["bf16"] = bool(wanted)
        values["use_cpu"] = not torch.accelerator.is_available()
    elif "fp16" not in values and "bf16" not in values:
        values["bf16"] = pick_dtype(recipe.model.dtype) == torch.bfloat16
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"train: {str(error).splitlines()[0]}") from error


def train(
    recipe: Recipe,
    model: nn.Module,
    codec: Codec,
    examples: Sequence[Example],
    evaluate: Evaluate | None = None,
    *,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train `model` (see methods.trainable) and write checkpoints into the run folder, resuming if there are some.

    Returns {"best": checkpoint name, "history": the Trainer's log, "metrics": speed and peak}. Raises
    KeyboardInterrupt after a clean stop, StorageError if a checkpoint could not be written, ProcessError if another
    process is lost.
    """
    keep_freed_memory()
    arguments = training_arguments(recipe)
    if (recipe.train.model_extra or {}).get("fp16") and not arguments.fp16 and PartialState().is_main_process:
        log.warning("train.fp16 needs a GPU: training in bf16 autocast here")
    if evaluate is None:
        arguments.eval_strategy = arguments.eval_strategy.__class__("no")
    pad = codec.tokenizer.pad_token_id if codec.tokenizer.pad_token_id is not None else codec.eos_id
    stop = StopCleanly()
    trainer = TraceTrainer(
        model=model,
        args=arguments,
        codec=codec,
        recipe=recipe,
        answer=evaluate,
        train_dataset=examples,
        eval_dataset=[],
        data_collator=partial(collate, pad_id=int(pad), parting=codec.parting),
        callbacks=[stop, Warmup(), *callbacks],
    )
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Bar)
    # Without the optimizer's state (save_only_model) the Trainer would go on, silently on another curve.
    earlier = [c for c in checkpoints_in(recipe.folder) if (c / "optimizer.pt").is_file()][-1:]
    arguments.eval_on_start = arguments.eval_strategy == "epoch" and any(map(unanswered, earlier))
    check_same_folder(recipe.folder, earlier[0] if earlier else None)
    with stop.listening(), together():
        done = trainer.train(resume_from_checkpoint=str(earlier[0]) if earlier else None)
    if stop.stopped:
        raise KeyboardInterrupt
    if trainer.args.should_save:
        with writing(recipe.folder / "trainer_state.json"):
            trainer.save_state()
    step = best_step(trainer.state.log_history)
    complete = checkpoints_in(recipe.folder)
    chosen = recipe.folder / f"checkpoint-{step}"
    best = chosen.name if chosen in complete else (complete[-1].name if complete else None)
    return {"best": best, "history": trainer.state.log_history, "metrics": done.metrics}
