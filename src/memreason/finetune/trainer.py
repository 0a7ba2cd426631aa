"""Transformers' Trainer on packed traces, with atomic checkpoints and accuracy as its metric."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from memreason.core.errors import ModelError
from memreason.core.files import read_json, writing
from memreason.core.recipe import Recipe
from memreason.encode.codec import Codec
from memreason.encode.examples import first_rows, pack, split_packed
from memreason.encode.pieces import IGNORED
from memreason.fast.attention import PACKED, attending, packs
from memreason.fast.compiling import compile_layers, compiling, pays
from memreason.fast.loss import chunked_loss, head_of, headless, takes_hidden_states
from memreason.fast.sparse import FLEX, UNMASKED, sparse_masks, takes_blocks, takes_masks
from memreason.finetune.checkpoint import checkpoints_in, save_checkpoint
from memreason.finetune.methods import network_of
from memreason.finetune.sharded import ShardedTrainer, check_shardable, is_sharded, trained_weights, unsharded

__all__ = ["Evaluate", "TraceTrainer", "best_step", "unanswered"]

Evaluate = Callable[[nn.Module], dict[str, float]]


class TraceTrainer(ShardedTrainer):
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
        # On a CPU; a GPU without FlashAttention is as fast with padded batches.
        on_cpu = self.args.device.type == "cpu"
        self.packed = on_cpu and not (learnt is not None and learnt.is_prompt_learning) and packs(network)
        if codec.parting and not (self.packed or takes_masks(network)):
            raise ModelError(f"tokens.sparse_attention: {network.config.model_type} {UNMASKED}")
        # The CPU has no backward pass of it.
        self.flex = bool(codec.parting) and self.args.device.type == "cuda" and takes_blocks(network)
        if self.is_fsdp_enabled:
            check_shardable(self.accelerator.state.fsdp_plugin, arguments["model"])
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # a head's matrix is whole inside the model alone
        self.headless = not sharded and takes_hidden_states(network)
        self.layers: dict[Any, Any] = {}  # compiled decoder layers, if that pays
        if self.packed:
            self.data_collator = partial(pack, parting=codec.parting)
            wanted = recipe.train.compile
            if wanted is None:
                wanted = not self.args.gradient_checkpointing and pays(_tokens_ahead(self.args, self.train_dataset))
            self.layers = compile_layers(network) if wanted else {}

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        return super().get_batch_samples(map(self._once, epoch_iterator), num_batches, device)

    def _once(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """An epoch that the processes cannot share out evenly is filled up with its first examples: these teach nothing
        a second time."""
        each, processes = self.args.per_device_train_batch_size, self.accelerator.num_processes
        examples: Any = self.train_dataset
        left = len(examples) % (each * processes)  # Accelerate's own figure is wrong behind a resume
        last = self.accelerator.gradient_state.end_of_dataloader and not self.args.dataloader_drop_last
        if processes == 1 or not left or not last:
            return batch
        return first_rows(batch, max(0, left - self.accelerator.process_index * each))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One pass forth and back for each piece of `train.pass_tokens`; gradients are exchanged with the last."""
        network = network_of(self.accelerator.unwrap_model(model))
        if not self.packed:
            with attending(network, FLEX) if self.flex else nullcontext():
                return super().training_step(model, inputs, num_items_in_batch)
        *pieces, last = split_packed(inputs, self.recipe.train.pass_tokens)
        with attending(network, PACKED), compiling(self.layers):
            with self.accelerator.no_sync(model) if pieces else nullcontext():
                losses = [super(TraceTrainer, self).training_step(model, part, num_items_in_batch) for part in pieces]
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
        network = network_of(self.accelerator.unwrap_model(model))
        if "since" in wanted and not self.packed:
            wanted["attention_mask"] = sparse_masks(network, wanted.pop("since"), wanted["attention_mask"])
        head = network.get_output_embeddings()
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
        if self.control.should_save:  # first, so that what goes wrong while answering does not cost the epoch
            self._save_checkpoint(self.model, None)
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        with unsharded(model):
            metrics = self.answer(model)
        model.train(training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        model = self.accelerator.unwrap_model(self.model)
        state = trained_weights(model) if is_sharded(model) else None
        if self.args.should_save:
            save_checkpoint(Path(output_dir or str(self.args.output_dir)), model, self.codec, self.recipe, state)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write aside, then rename: a kill never leaves half a checkpoint under its final name."""
        run = Path(str(self.args.output_dir))
        final, aside, limit = run / f"checkpoint-{self.state.global_step}", run / ".partial", self.args.save_total_limit
        if final in checkpoints_in(run):  # saved before it was evaluated: its history has grown since
            if self.args.should_save:
                with writing(final):
                    self.state.save_to_json(str(final / ".partial"))
                    (final / ".partial").replace(final / TRAINER_STATE_NAME)
                self._keep_few(run)
            self.accelerator.wait_for_everyone()
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
        if self.args.should_save:
            self._keep_few(run)
        self.accelerator.wait_for_everyone()

    def _keep_few(self, run: Path) -> None:
        """The last `save_total_limit` checkpoints, and the best one beside them."""
        best = best_step(self.state.log_history)
        others = [folder for folder in checkpoints_in(run) if folder.name != f"checkpoint-{best}"]
        for old in others[: -self.args.save_total_limit] if self.args.save_total_limit else ():
            shutil.rmtree(old)


def _tokens_ahead(arguments: TrainingArguments, examples: Any) -> int:
    """About how many tokens one process will train on."""
    first = [len(examples[n]["input_ids"]) for n in range(min(len(examples), 200))]
    a_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    seen = arguments.max_steps * a_step if arguments.max_steps > 0 else arguments.num_train_epochs * len(examples)
    return int(seen * sum(first) / len(first))


@contextmanager
def _full_disk_as_oserror() -> Iterator[None]:
    """safetensors and torch.save report a full disk in classes of their own."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if not re.search(r"os error \d+|inline_container|PytorchStreamWriter", str(error)):
            raise
        raise OSError(str(error).splitlines()[0]) from error


def best_step(history: Sequence[dict[str, Any]]) -> int | None:
    """The step of the highest eval_acc, the earliest of equals."""
    scored = [(entry["eval_acc"], -entry["step"]) for entry in history if "eval_acc" in entry]
    return -max(scored)[1] if scored else None


def unanswered(checkpoint: Path) -> bool:
    """Whether a checkpoint of a finished epoch lacks its accuracy: the run ended while its questions were answered."""
    state = read_json(checkpoint / TRAINER_STATE_NAME)
    answered = {entry["step"] for entry in state["log_history"] if "eval_acc" in entry}
    return float(state["epoch"]).is_integer() and state["global_step"] not in answered
