"""A recipe's model without its numbers: built on the meta device from the real configuration, and counted exactly."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import yaml
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from memreason.core.recipe import Recipe
from memreason.encode.base import DTYPES, load_config
from memreason.encode.scheme import PREFIX, TokenScheme
from memreason.finetune.methods import network_of, trainable

__all__ = [
    "Quantised", "Sizes", "alike", "configuration", "dtype_of", "out_of_reach", "shipped_size", "sizes", "skeleton",
    "with_layers",
]  # fmt: skip

TABLE = Path(__file__).with_name("models.yaml")
# Bytes a weight: int8; nf4 with an fp32 scale for each 64. An int8 matrix has an fp32 scale for each row beside.
BYTES = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}


class Sizes(NamedTuple):
    """Parameters, and bytes of weights (all, and those trained), gradients and optimiser states before any sharding."""

    parameters: int
    trained: int
    weights: int
    trained_weights: int
    gradients: int
    optimizer: int
    layer: int  # weights of the largest decoder layer
    outside: int  # weights outside the decoder layers


class Quantised(nn.Linear):
    """A matrix that bitsandbytes would hold in 8 or 4 bits: what its product keeps, and makes on the way back."""

    keeps = True  # int8 keeps its input for the way back though no gradient needs it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _QuantisedProduct.apply(x, self.weight, self.keeps)  # type: ignore[no-untyped-call]
        return found if self.bias is None else found + self.bias.to(found.dtype)


class _QuantisedProduct(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: torch.Tensor, weight: torch.Tensor, keeps: bool) -> torch.Tensor:
        context.weight, context.dtype, context.shape = weight, x.dtype, x.shape
        context.save_for_backward(*([x] if keeps else []))
        return (x.reshape(-1, x.shape[-1]).to(weight.dtype) @ weight.T).to(x.dtype).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        whole = torch.empty_like(context.weight).copy_(context.weight)  # de-quantised for the product
        back = gradient.reshape(-1, gradient.shape[-1]).to(whole.dtype) @ whole
        return back.to(context.dtype).view(context.shape), None, None


@cache
def _table() -> dict[str, dict[str, Any]]:
    return {name: row for row in yaml.safe_load(TABLE.read_text(encoding="utf-8")) for name in row["ids"]}


def shipped_size(base: str) -> int | None:
    """How many entries the tokenizer of a model of the table has."""
    return int(_table()[base]["tokenizer"]) if base in _table() else None


def out_of_reach(recipe: Recipe) -> bool:
    """Whether a model is one of the table that was never fetched: the hub, which may be gated, is not asked."""
    model = recipe.model
    cached = model.base in _table() and isinstance(try_to_load_from_cache(model.base, "config.json"), str)
    return model.base in _table() and not (model.revision or cached)


def configuration(recipe: Recipe) -> Any:
    """The configuration of a recipe's base model: of a folder, a file or the hub, or that of the table.

    Raises ModelError if it is neither there nor in the table.
    """
    model = recipe.model
    if out_of_reach(recipe):
        return AutoConfig.for_model(**_table()[model.base]["config"])
    return load_config(model.base, revision=model.revision, trust_remote_code=model.trust_remote_code)


def alike(config: Any) -> bool:
    """Whether all decoder layers are of one kind, so that a few of them tell of all."""
    kinds = set(getattr(config, "layer_types", None) or ["one"])
    names = ("sliding_window", "num_experts", "num_local_experts", "first_k_dense_replace")
    return len(kinds) == 1 and not any(getattr(config, name, None) for name in names)


def with_layers(config: Any, count: int) -> Any:
    """The same with fewer decoder layers."""
    fewer = copy.deepcopy(config)
    fewer.num_hidden_layers = count
    if getattr(fewer, "layer_types", None):
        fewer.layer_types = fewer.layer_types[:count]
    return fewer


def skeleton(recipe: Recipe, config: Any, scheme: TokenScheme, tokenizer_size: int, dtype: torch.dtype) -> Any:
    """The trainable model of a recipe on the meta device: rows, adapters and dtypes as in training."""
    quantize = recipe.model.quantize
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        count = tokenizer_size + len(scheme.tokens)
        if scheme.tokens and count > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(count, mean_resizing=False)
        if quantize:
            _quantise(model, quantize)
        ids = iter(range(tokenizer_size, count))
        blocks = {name: [next(ids) for _ in block] for name, block in scheme.blocks.items()}
        if recipe.method.name == "prompt-tuning" and scheme.placement == "only_at_front":
            return _fronted(model, len(scheme.blocks[PREFIX]))
        checkpointing = bool((recipe.train.model_extra or {}).get("gradient_checkpointing"))
        codec: Any = SimpleNamespace(scheme=scheme, blocks=blocks)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})  # as the Trainer does
        return trainable(model, codec, recipe.method, checkpointing=checkpointing)


def _fronted(model: Any, count: int) -> Any:
    """Virtual tokens; PEFT would start them from a text, for which it loads the tokenizer."""
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count))


def _quantise(model: Any, bits: str) -> None:
    """As bitsandbytes and PEFT leave it: every linear layer but the head quantised, all else in fp32, all frozen."""
    head = model.get_output_embeddings()
    for layer in model.modules():
        if type(layer) is nn.Linear and layer is not head:
            layer.__class__ = Quantised
            setattr(layer, "keeps", bits == "8bit")  # noqa: B010
    whole = {id(layer.weight) for layer in model.modules() if type(layer) is Quantised}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if id(parameter) not in whole:
            parameter.data = parameter.data.float()


def sizes(model: Any, recipe: Recipe) -> Sizes:
    """Counted on a whole skeleton: tied matrices once, quantised ones at their size."""
    bits = recipe.model.quantize
    small = {id(m.weight): m for m in model.modules() if isinstance(m, Quantised)}

    def held(parameter: nn.Parameter) -> int:
        if id(parameter) not in small or bits is None:
            return parameter.numel() * parameter.element_size()
        return int(parameter.numel() * BYTES[bits]) + (4 * len(parameter) if bits == "8bit" else 0)

    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    network = network_of(model)
    names = set(network._no_split_modules or ())
    layers = [sum(held(p) for p in m.parameters()) for m in network.modules() if type(m).__name__ in names]
    weights = sum(map(held, parameters))
    own = sum(p.numel() * p.element_size() for p in trained)
    states = _states(str((recipe.train.model_extra or {}).get("optim", "adamw")))
    return Sizes(
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in trained),
        weights,
        own,
        own,
        int(sum(p.numel() * (p.element_size() * 2 if states is None else states) for p in trained)),
        max(layers, default=0),
        weights - sum(layers),
    )


def _states(optimizer: str) -> float | None:
    """Bytes of optimiser states a parameter; None: two of the parameter's own dtype, as AdamW keeps them."""
    known = {"8bit": 2.0, "sgd": 0.0, "adafactor": 0.1, "lion": 4.0}
    return next((size for name, size in known.items() if name in optimizer), None)


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Of the base weights on a GPU. A CPU chooses by trying: see `pick_dtype`."""
    return DTYPES.get(recipe.model.dtype, torch.bfloat16)
