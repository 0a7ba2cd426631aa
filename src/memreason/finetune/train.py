"""One Trainer run for every method."""

from __future__ import annotations

import logging
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from memreason.core.errors import RecipeError
from memreason.core.files import writing
from memreason.core.recipe import Recipe
from memreason.encode.base import pick_dtype
from memreason.encode.examples import Example, collate, pack, split_packed
from memreason.encode.pieces import IGNORED
from memreason.encode.scheme import Codec
from memreason.fast.attention import PACKED, attending, packs
from memreason.fast.compiling import compile_layers, compiling, pays
from memreason.fast.loss import chunked_loss, head_of, headless, takes_hidden_states
from memreason.fast.memory import keep_freed_memory
from memreason.finetune.checkpoint import checkpoints_in, save_checkpoint
from memreason.finetune.methods import network_of

__all__ = ["Evaluate", "train", "training_arguments"]

Evaluate = Callable[[nn.Module], dict[str, float]]
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


class _TraceTrainer(Trainer):
    """Trainer on packed traces where the model allows it (see the room `fast`), with atomic checkpoints, and accuracy
    as its metric."""

    def __init__(self, *, codec: Codec, recipe: Recipe, answer: Evaluate | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.codec, self.recipe, self.answer = codec, recipe, answer
        self.model_accepts_loss_kwargs = True  # loss is summed over supervised tokens, divided once a step
        learnt = getattr(arguments["model"], "active_peft_config", None)
        # PEFT puts virtual prompt tokens in front of the inputs, so that columns move to the right.
        self.virtual = learnt.num_virtual_tokens if learnt is not None and learnt.peft_type == "PROMPT_TUNING" else 0
        network = network_of(arguments["model"])
        self.packed = not (learnt is not None and learnt.is_prompt_learning) and _packed(network)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # a head's matrix is whole inside the model alone
        self.headless = not sharded and takes_hidden_states(network)
        self.layers: dict[Any, Any] = {}  # compiled decoder layers, if that pays
        if self.packed:
            self.data_collator = pack
            wanted = recipe.train.compile
            if wanted is None:
                wanted = not self.args.gradient_checkpointing and pays(_tokens_ahead(self.args, self.train_dataset))
            self.layers = compile_layers(network) if wanted else {}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One pass forth and back for each piece of `train.pass_tokens`; gradients are exchanged with the last."""
        if not self.packed:
            return super().training_step(model, inputs, num_items_in_batch)
        *pieces, last = split_packed(inputs, self.recipe.train.pass_tokens)
        network = network_of(self.accelerator.unwrap_model(model))
        with attending(network, PACKED), compiling(self.layers):
            with self.accelerator.no_sync(model) if pieces else nullcontext():
                losses = [super(_TraceTrainer, self).training_step(model, part, num_items_in_batch) for part in pieces]
            losses.append(super().training_step(model, last, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        labels = inputs["shift_labels"]
        # The union of supervised columns: question columns need no logits over the vocabulary.
        columns = (labels != IGNORED).any(dim=0).nonzero().squeeze(-1)
        wanted = {name: values for name, values in inputs.items() if name not in ("labels", "shift_labels")}
        head = network_of(self.accelerator.unwrap_model(model)).get_output_embeddings()
        with headless(head) if self.headless else nullcontext():
            outputs = model(**wanted, use_cache=False, logits_to_keep=columns + self.virtual)
        kept = labels[:, columns] != IGNORED
        found, gold = outputs.logits[kept], labels[:, columns][kept]
        loss = (
            chunked_loss(found, gold, head_of(head))
            if self.headless
            else nn.functional.cross_entropy(found.float(), gold, reduction="sum")
        )
        loss = loss / (num_items_in_batch if num_items_in_batch is not None else len(gold))
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *_args: Any, **_keywords: Any) -> dict[str, float]:
        assert self.answer is not None
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        metrics = self.answer(model)
        model.train(training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        save_checkpoint(Path(output_dir or str(self.args.output_dir)), model, self.codec, self.recipe)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write aside, then rename: a kill never leaves half a checkpoint under its final name."""
        run = Path(str(self.args.output_dir))
        final, aside, limit = run / f"checkpoint-{self.state.global_step}", run / ".partial", self.args.save_total_limit
        if final in checkpoints_in(run):
            return
        self.args.output_dir, self.args.save_total_limit = str(aside), None
        try:
            with writing(final), _full_disk_as_oserror():
                if self.args.should_save:
                    shutil.rmtree(aside, ignore_errors=True)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    shutil.rmtree(final, ignore_errors=True)
                    (aside / final.name).replace(final)
        finally:
            self.args.output_dir, self.args.save_total_limit = str(run), limit
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
        if self.args.should_save and limit:
            best = _best_step(self.state.log_history)
            for old in [c for c in checkpoints_in(run) if c.name != f"checkpoint-{best}"][:-limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


def _tokens_ahead(arguments: TrainingArguments, examples: Any) -> int:
    """About how many tokens one process will train on."""
    first = [len(examples[n]["input_ids"]) for n in range(min(len(examples), 200))]
    a_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    seen = arguments.max_steps * a_step if arguments.max_steps > 0 else arguments.num_train_epochs * len(examples)
    return int(seen * sum(first) / len(first))


def _packed(network: Any) -> bool:
    """Whether traces are packed: on a CPU; a GPU without FlashAttention is as fast with padded batches."""
    if network.device.type != "cpu":
        return False
    return packs(network)


@contextmanager
def _full_disk_as_oserror() -> Iterator[None]:
    """safetensors and torch.save report a full disk in classes of their own."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if not re.search(r"os error \d+|inline_container|PytorchStreamWriter", str(error)):
            raise
        raise OSError(str(error).splitlines()[0]) from error


def _best_step(history: Sequence[dict[str, Any]]) -> int | None:
    """The step of the highest eval_acc, the earliest of equals."""
    scored = [(entry["eval_acc"], -entry["step"]) for entry in history if "eval_acc" in entry]
    return -max(scored)[1] if scored else None


class _StopCleanly(TrainerCallback):  # type: ignore[misc]
    """The first Ctrl-C (or SIGTERM) ends after this step with a checkpoint; the second at once."""

    stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        signals: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread():  # only the main thread can be told of signals
            signals = ()
        previous = {number: signal.signal(number, self._note) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        if PartialState().is_main_process:
            print("\nStopping after this step; press Ctrl-C again to stop at once.", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if PartialState().num_processes > 1:  # all stop at the same step, or the others wait for ever
            self.stopped = any(gather_object([self.stopped]))
        if self.stopped:
            # An epoch that is complete is evaluated and saved at its end: a resumed run would not evaluate it again.
            control.should_save = control.should_save or not float(state.epoch).is_integer()
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stopped:
            control.should_save = True
            control.should_evaluate = control.should_evaluate and float(state.epoch).is_integer()


class _Bar(ProgressCallback):  # type: ignore[misc]
    """Steps, rate and time left, with the loss behind them instead of a line for each log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.training_bar is not None and logs:
            shown = {name: logs[name] for name in ("loss", "eval_acc") if name in logs}
            self.training_bar.set_postfix({name: f"{float(value):.3f}" for name, value in shown.items()})


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
    KeyboardInterrupt after a clean stop, StorageError if a checkpoint could not be written.
    """
    keep_freed_memory()
    arguments = training_arguments(recipe)
    if (recipe.train.model_extra or {}).get("fp16") and not arguments.fp16 and PartialState().is_main_process:
        log.warning("train.fp16 needs a GPU: training in bf16 autocast here")
    if evaluate is None:
        arguments.eval_strategy = arguments.eval_strategy.__class__("no")
    pad = codec.tokenizer.pad_token_id if codec.tokenizer.pad_token_id is not None else codec.eos_id
    stop = _StopCleanly()
    trainer = _TraceTrainer(
        model=model,
        args=arguments,
        codec=codec,
        recipe=recipe,
        answer=evaluate,
        train_dataset=examples,
        eval_dataset=[],
        data_collator=partial(collate, pad_id=int(pad)),
        callbacks=[stop, *callbacks],
    )
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_Bar)
    # Without the optimizer's state (save_only_model) the Trainer would go on, silently on another curve.
    earlier = [str(c) for c in checkpoints_in(recipe.folder) if (c / "optimizer.pt").is_file()]
    with stop.listening():
        done = trainer.train(resume_from_checkpoint=earlier[-1] if earlier else None)
    if stop.stopped:
        raise KeyboardInterrupt
    if trainer.args.should_save:
        with writing(recipe.folder / "trainer_state.json"):
            trainer.save_state()
    step = _best_step(trainer.state.log_history)
    complete = checkpoints_in(recipe.folder)
    chosen = recipe.folder / f"checkpoint-{step}"
    best = chosen.name if chosen in complete else (complete[-1].name if complete else None)
    return {"best": best, "history": trainer.state.log_history, "metrics": done.metrics}
