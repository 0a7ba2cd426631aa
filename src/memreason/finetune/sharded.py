"""FSDP2: weights that every process holds a share of, as the trainer, the engine and a checkpoint need them.

A checkpoint has one form, whatever the number of processes and the way in which they shared the work: whole adapters,
and the optimizer's whole state. Accelerate would write folders that only FSDP reads, whose index is a pickle.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from memreason.core.errors import RecipeError

__all__ = ["ShardedTrainer", "check_shardable", "is_sharded", "trained_weights", "unsharded"]


def _shard_on_cpu(state: Any, arguments: dict[str, Any] | None) -> None:
    """Let FSDP2 work on CPUs too, which torch can and Accelerate's state leaves out: it would fall back to copies.

    `state` is the accelerator's, `arguments` those of the plugin (None: what `accelerate launch` put into the
    environment).
    """
    asked = arguments is not None or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    plugin = getattr(state, "fsdp_plugin", None)
    if asked and plugin is None and state.distributed_type == DistributedType.MULTI_CPU:
        plugin = FullyShardedDataParallelPlugin(**(arguments or {}))
        state.distributed_type = state._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = plugin
        if state.mixed_precision != "no":
            plugin.set_mixed_precision(state.mixed_precision)


def check_shardable(plugin: Any, model: Any) -> None:
    """Raises RecipeError for what cannot be shared out: each by its name."""
    learnt = getattr(model, "active_peft_config", None)
    quantised = bool(getattr(model, "is_quantized", False))
    tied = bool(plugin.cpu_ram_efficient_loading and model.config.tie_word_embeddings)
    wrong = {
        "FSDP version 1 is not supported: fsdp_version: 2 in accelerate's file": plugin.fsdp_version != 2,
        "FSDP2 shares out no quantised weights: leave model.quantize or FSDP out": quantised,
        "FSDP2 does not share out virtual tokens: train copies of the model": learnt and learnt.is_prompt_learning,
        "fsdp_cpu_ram_efficient_loading does not go with tied embeddings: set it to false": tied,
        "fsdp_activation_checkpointing hides adapters from PEFT, which would not save them: leave it out and give "
        "train.gradient_checkpointing": plugin.activation_checkpointing and learnt,
    }
    if problems := [problem for problem, found in wrong.items() if found]:
        raise RecipeError(problems, "train")


@contextmanager
def _bare_embeddings(model: Any) -> Iterator[None]:
    """Meanwhile a model names the matrices inside its row layers as its embeddings.

    Accelerate looks there for tied ones, which must be shared out together, and takes the layers' for two.
    """
    for name in ("get_input_embeddings", "get_output_embeddings"):
        layer = getattr(model, name)()
        layer = getattr(layer, "token_adapter", layer)
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        object.__setattr__(model, name, partial(_same, base))
    try:
        yield
    finally:
        del model.get_input_embeddings, model.get_output_embeddings


def _same(layer: Any) -> Any:
    return layer


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Meanwhile every process holds the whole model, and computes without the others: to answer its own questions."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for part in parts for group in part._get_fsdp_state()._fsdp_param_groups]
    before = [group.post_forward_mesh_info for group in groups]
    for part in parts:
        part.unshard()
    for group in groups:
        group.post_forward_mesh_info = None  # do not share out again behind a forward pass
    try:
        yield
    finally:
        for group, info in zip(groups, before, strict=True):
            group.post_forward_mesh_info = info
        for part in parts:
            part.reshard()


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """What was trained, whole, on the CPU of the first process; all take part."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    whole: Any = get_model_state_dict(model, options=options)
    return dict(whole)


def _gathered(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with whole tensors, as one process alone would have it; all take part."""
    return dict(tree_map(lambda value: value.full_tensor().cpu() if isinstance(value, DTensor) else value, state))


def _shared_out(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The other way: each process takes its share of an optimizer's whole state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def share(value: Any, like: Any) -> Any:
        if not (isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape):
            return value
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)

    shares = {
        number: {name: share(value, parameters[number]) for name, value in own.items()}
        for number, own in state["state"].items()
    }
    return {**state, "state": shares}


class ShardedTrainer(Trainer):
    """Transformers' Trainer with FSDP2 on every device, and checkpoints that do not depend on it."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        _shard_on_cpu(self.accelerator.state, self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self.is_fsdp_enabled and resume_from_checkpoint is not None:  # while the weights are whole
            self.is_fsdp_enabled = False
            super()._load_from_checkpoint(resume_from_checkpoint)
            self.is_fsdp_enabled = True
        with _bare_embeddings(self.model) if self.is_fsdp_enabled else nullcontext():
            parent: Any = super()
            return parent._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:  # else done above
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        state = _gathered(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        read = partial(torch.load, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(_shared_out(read(Path(checkpoint) / OPTIMIZER_NAME), self.optimizer))
        self.lr_scheduler.load_state_dict(read(Path(checkpoint) / SCHEDULER_NAME))
