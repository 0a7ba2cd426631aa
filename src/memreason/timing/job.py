"""A recipe on a kind of device: how it would be trained there, and the passes that this takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from memreason.core.recipe import Recipe
from memreason.encode.base import pick_dtype
from memreason.fast.attention import may_pack
from memreason.finetune.methods import network_of
from memreason.finetune.prepare import scheme_of
from memreason.finetune.train import DEFAULTS
from memreason.timing.hardware import Hardware
from memreason.timing.passes import Shape, decode_pass, train_pass
from memreason.timing.rehearsal import Pass, rehearse
from memreason.timing.skeleton import alike, dtype_of, skeleton, with_layers
from memreason.timing.workload import Workload, batches, pieces

__all__ = ["Job", "Passes"]

CAPS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # with them the trainer leaves the head in place


class Passes(NamedTuple):
    """Passes forth and back of one device: how many an epoch has, whether a step takes several of them, their tokens
    on average, those of padding included, and a usual and the largest one."""

    an_epoch: int
    several: bool
    tokens: float
    usual: Shape
    largest: Shape


@dataclass(frozen=True)
class Job:
    """A recipe, its model's configuration, its data's lengths, and the devices."""

    recipe: Recipe
    config: Any
    load: Workload
    machine: Hardware

    @property
    def given(self) -> dict[str, Any]:
        """Training arguments: Transformers' own, our defaults, the recipe's."""
        first = {"gradient_accumulation_steps": 1, "max_steps": -1, "train_sampling_strategy": "random"}
        return {**first, **DEFAULTS, **(self.recipe.train.model_extra or {})}

    @property
    def dtype(self) -> torch.dtype:
        """Of the base weights."""
        return pick_dtype(self.recipe.model.dtype) if self.machine.cpu else dtype_of(self.recipe)

    @property
    def half(self) -> torch.dtype | None:
        """Of autocast; None without it."""
        asked = self.given.get("fp16") or self.given.get("bf16")
        return torch.bfloat16 if (self.dtype == torch.bfloat16 if asked is None else asked) else None

    @property
    def sharded(self) -> bool:
        return bool(self.given.get("fsdp")) and self.machine.count > 1

    @property
    def steps(self) -> tuple[int, int, float]:
        """Optimizer steps, examples of one, and how often all the data is seen."""
        given = self.given
        each = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"] * self.machine.count
        an_epoch = -(-len(self.load.lengths) // each)
        if given["max_steps"] > 0:
            return given["max_steps"], each, given["max_steps"] / an_epoch
        return int(an_epoch * given["num_train_epochs"]), each, float(given["num_train_epochs"])

    def model(self, layers: int | None = None, **changes: Any) -> Any:
        """The skeleton, of all layers or of some; `changes` are fields of the method."""
        method = self.recipe.method.model_copy(update=changes)
        recipe = self.recipe.model_copy(update={"method": method})
        config = self.config if layers is None else with_layers(self.config, layers)
        return skeleton(recipe, config, scheme_of(recipe), self.load.tokenizer, self.dtype)

    @cached_property
    def passes(self) -> Passes:
        """The passes of one epoch."""
        model, recipe = self.model(min(2, self.config.num_hidden_layers)), self.recipe
        learnt = getattr(model, "active_peft_config", None)
        packed = self.machine.cpu and not (learnt and learnt.is_prompt_learning) and may_pack(network_of(model))
        whole = not self.sharded and not any(getattr(self.config, name, None) for name in CAPS)
        size, order = self.given["per_device_train_batch_size"], self.given["train_sampling_strategy"]
        found: list[tuple[int, ...]] = []
        for batch in batches(self.load.lengths, size, order, recipe.seed):
            found += pieces(batch, recipe.train.pass_tokens) if packed else [tuple(batch.tolist())]
        shapes = sorted((Shape(one, self.load.supervised, packed, whole, self.half) for one in found), key=_tokens)
        mean = sum(map(_tokens, shapes)) / len(shapes)
        usual = min(shapes, key=lambda shape: abs(shape.tokens - mean))
        several = self.given["gradient_accumulation_steps"] > 1 or len(found) > -(-len(self.load.lengths) // size)
        return Passes(-(-len(found) // self.machine.count), several, mean, usual, shapes[-1])

    def rehearsed(self, shape: Shape) -> Pass:
        """A pass of training."""
        return self._rehearse(shape, train_pass(shape), shape.pairs)

    def decoding(self, rows: int) -> Pass:
        """A pass that gives each of `rows` rows a token; on a CPU LoRA is merged meanwhile."""
        lora = self.machine.cpu and "lora" in self.recipe.method.name
        return self._rehearse(rows, decode_pass(rows), 0, **({"name": "full"} if lora else {}))

    @cached_property
    def _known(self) -> dict[Shape | int, Pass]:
        return {}

    def _rehearse(self, key: Shape | int, run: Any, pairs: float, **changes: Any) -> Pass:
        if key not in self._known:
            few, layers = alike(self.config), self.config.num_hidden_layers
            self._known[key] = rehearse(
                lambda n: self.model(n, **changes), layers, run, pairs, few=few, kept=self.passes.several
            )
        return self._known[key]

    def changed(self, count: int | None = None, **changes: Any) -> Job:
        """The same with other fields of the recipe, such as `{"model.quantize": "4bit"}`, or on more devices."""
        values = self.recipe.model_dump()
        for key, value in changes.items():
            stage, name = key.split(".")
            values[stage][name] = value
        machine = replace(self.machine, count=count or self.machine.count)
        return replace(self, recipe=Recipe.model_validate(values), machine=machine)


def _tokens(shape: Shape) -> int:
    return shape.tokens
