"""Methods differ in one function: a base model with its rows becomes a trainable one."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TrainableTokensConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import PreTrainedModel

from memreason.core.errors import ModelError
from memreason.core.stages import MethodRecipe
from memreason.encode.codec import Codec
from memreason.encode.scheme import PREFIX
from memreason.fast.rows import row_layers, rows_beside

__all__ = ["is_adapted", "lora_modules", "merged", "network_of", "row_indices", "trainable"]

LORA_MODULES = {
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "atten": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def trainable(model: Any, codec: Codec, method: MethodRecipe, *, checkpointing: bool = False) -> Any:
    """The model with what `method` trains set to require gradients, those parameters in fp32.

    full: everything. lora: LoRA alone. prompt-tuning: the new rows alone (with blocks only at the
    front: PEFT's virtual tokens). lora+prompt-tuning: both. prefix-tuning: virtual keys and values.
    prompting: nothing.
    Raises ModelError if no layer of the model has a name that LoRA is to be put on.
    """
    if method.name == "prompting":
        return model
    if method.name == "full":
        if model.dtype == torch.float16:  # fp16 weights lose AdamW's small steps, and GradScaler refuses them
            nn.Module.float(model)
        return model
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(codec.scheme.noise_seed)  # LoRA's first values depend on the recipe alone
            adapted = get_peft_model(model, CONFIGS[method.name](model, codec, method), autocast_adapter_dtype=True)
    except ValueError as error:
        raise ModelError(f"method {method.name}: {str(error).splitlines()[0]}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # AdamW on bf16 rows rounds its small steps away
    rows_beside(adapted)
    if checkpointing:
        adapted.enable_input_require_grads()
    return adapted


def row_indices(model: PreTrainedModel, codec: Codec) -> dict[str, list[int]]:
    """{input layer: ids, output layer: ids}: a bare list would leave an untied head untrained."""
    ids = [i for block in codec.blocks.values() for i in block]
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    layers = [model.get_input_embeddings()]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not layers[0].weight:
        layers.append(head)
    return {names[id(layer)]: ids for layer in layers}


def lora_modules(method: MethodRecipe) -> list[str]:
    """Names of the layers that carry LoRA."""
    named = method.lora_module
    return list(LORA_MODULES[named] if isinstance(named, str) else named)


def _lora(model: PreTrainedModel, codec: Codec, method: MethodRecipe, *, rows: bool = False) -> Any:
    return LoraConfig(
        r=method.lora_r,
        lora_alpha=method.lora_alpha,
        lora_dropout=method.lora_dropout,
        target_modules=lora_modules(method),
        trainable_token_indices=row_indices(model, codec) if rows and codec.blocks else None,
        task_type="CAUSAL_LM",
    )


def _rows(model: PreTrainedModel, codec: Codec, method: MethodRecipe) -> Any:
    if not codec.blocks:
        raise ModelError("method prompt-tuning trains planning tokens, but the recipe adds none (tokens.add)")
    if codec.scheme.placement == "only_at_front":
        return PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=codec.scheme.n_prefix,
            prompt_tuning_init=PromptTuningInit.TEXT,
            prompt_tuning_init_text=PREFIX,
            tokenizer_name_or_path=model.config._name_or_path,
        )
    layers = row_indices(model, codec)  # tied or not, both layers hold the same ids
    ids = next(iter(layers.values()))
    return TrainableTokensConfig(token_indices=ids, target_modules=list(layers), task_type="CAUSAL_LM")


def _prefix(model: PreTrainedModel, codec: Codec, method: MethodRecipe) -> Any:
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=max(1, codec.scheme.n_prefix))


CONFIGS: dict[str, Any] = {
    "lora": _lora,
    "prompt-tuning": _rows,
    "lora+prompt-tuning": lambda model, codec, method: _lora(model, codec, method, rows=True),
    "prefix-tuning": _prefix,
}


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """The adapters written into the matrices while generating; afterwards the matrices are what they were, bit by bit.

    Trained rows always: exact, also in bf16. LoRA on a CPU alone, where its small products cost a third of a pass:
    W + scale B A is summed in fp32 and rounded to W's dtype. The adapted W wait as they were meanwhile, for which a
    GPU's memory is too dear. Quantised matrices keep their LoRA beside them.
    """
    rows: list[Any] = [layer for layer in row_layers(model) if not layer.merged]
    lora: list[Any] = [layer for layer in model.modules() if type(layer) is LoraLinear and not layer.merged]
    lora = [layer for layer in lora if layer.get_base_layer().weight.device.type == "cpu"]
    weights = [layer.get_base_layer().weight for layer in rows + lora]
    before = [weight.data for weight in weights]
    for weight in weights[len(rows) :]:
        weight.data = weight.data.clone()  # PEFT adds LoRA in place
    for layer in rows + lora:
        layer.merge()
    try:
        with _unwrapped(model, lora):
            yield
    finally:
        for layer, weight, data in zip(rows + lora, weights, before, strict=True):
            weight.data = data
            layer.merged_adapters.clear()


@contextmanager
def _unwrapped(model: nn.Module, layers: Collection[Any]) -> Iterator[None]:
    """Meanwhile what these layers of PEFT's wrap is called in their place, but for those that somebody has hooked: of a
    pass with one row their calls alone are a fifteenth."""
    bare = {one for one in layers if not ("forward" in vars(one) or one._forward_hooks or one._forward_pre_hooks)}
    children: list[Any] = [(parent, *child) for parent in model.modules() for child in parent.named_children()]
    places = [(parent, name, one) for parent, name, one in children if one in bare]
    for parent, name, one in places:
        setattr(parent, name, one.get_base_layer())
    try:
        yield
    finally:
        for parent, name, one in places:
            setattr(parent, name, one)


def network_of(model: Any) -> Any:
    """The Transformers model inside an adapted one; itself otherwise."""
    return model.get_base_model() if is_adapted(model) else model


def is_adapted(model: nn.Module) -> bool:
    return isinstance(model, PeftModel)
