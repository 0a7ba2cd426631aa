"""A checkpoint of the published system (arXiv 2411.13504) becomes one of ours, with the same logits and prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from memreason.core.errors import CheckpointError
from memreason.core.files import file_hash, new_folder, read_json, write_json, writing
from memreason.core.recipe import Recipe
from memreason.data.tasks import task_named
from memreason.encode.base import DTYPES, identity, load_config, load_model, load_tokenizer
from memreason.encode.codec import Codec
from memreason.encode.vocab import add_rows
from memreason.fast.rows import row_layers
from memreason.finetune.checkpoint import save_checkpoint
from memreason.finetune.imported_blocks import bind, read_blocks
from memreason.finetune.imported_rows import Rows, kept_bias, place, read_rows
from memreason.finetune.methods import row_indices
from memreason.finetune.unpickle import read_tensors

__all__ = ["import_checkpoint"]

log = logging.getLogger("memreason")
CONFIG, PICKLED, SAFE = "adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"
RECORD = "imported.json"
KEPT = {  # what a LoRA configuration of PEFT 0.4 to 0.12 says about what is computed
    *("r", "lora_alpha", "lora_dropout", "target_modules", "fan_in_fan_out", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "layers_to_transform", "layers_pattern"),
}
REFUSED = {"bias": "none", "modules_to_save": None, "use_dora": False, "layer_replication": None}
COPIES = ("original_embedding", "original_linear", "new_embedding", "new_linear")  # newer PEFT saves these too


def import_checkpoint(
    source: Path | str,
    base: str,
    out: Path | str,
    *,
    task: str = "strategyqa",
    revision: str | None = None,
    drop_bias: bool = False,
    unsafe_weights: bool = False,
    warn: Callable[[str], None] = log.warning,
) -> Path:
    """Write a published checkpoint as one of ours to `out`, an empty folder, which it returns.

    `task` is what it was trained on and says how questions are printed; `warn` is told what could not be kept as it
    was. The random bias of its head stays, in the scheme, unless it is to be dropped. Nothing is unpickled but tensors.
    Raises CheckpointError for what is missing, torn, foreign or does not fit the base (`out` is then not there), and
    StorageError if `out` holds files.
    """
    source, out = Path(source), Path(out)
    task_named(task)
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder")
    with new_folder(out) as folder:
        blocks, lora = read_blocks(source), _lora_fields(source)
        pinned = identity(base, revision)
        codec, order = bind(blocks, load_tokenizer(base, revision=pinned["revision"]), task, warn=warn)
        first = min(codec.describe().values())
        config = load_config(base, revision=pinned["revision"]).get_text_config()
        rows = read_rows(source, len(order), config.vocab_size, tied=config.tie_word_embeddings)
        used = first + len(order) > config.vocab_size
        # On a tied base, too, the published head has new rows of its own.
        model_fields = {"base": base, "untie": used and not rows.tied, "unsafe_weights": unsafe_weights, **pinned}
        recipe = _recipe(codec, task, model_fields, lora)
        model = load_model(**recipe.model.model_dump() | {"dtype": _stored(config)})
        rows = place(rows, model, first, order, warn=warn)
        bias = kept_bias(rows.bias, drop=drop_bias, warn=warn)
        codec = Codec(replace(codec.scheme, row_bias=bias), codec.tokenizer)
        add_rows(model, codec)
        adapted = _adapted(model, codec, lora, source)
        _put_rows(adapted, rows)
        with writing(out):
            save_checkpoint(folder, adapted, codec, recipe)
            write_json(folder / RECORD, _record(source, recipe, codec, rows))
    return out


def _stored(config: Any) -> str:
    """The dtype in which a base lies on disk: rows that are taken from it must not be rounded to this machine's."""
    return next((name for name, dtype in DTYPES.items() if dtype == config.dtype), "fp32")


def _lora_fields(source: Path) -> dict[str, Any] | None:
    """What adapter_config.json says, or None for a checkpoint of rows alone. Fields that say nothing here are left."""
    path = source / CONFIG
    if not path.is_file():
        return None
    given = read_json(path)
    kind = given.get("peft_type") if isinstance(given, dict) else type(given).__name__
    if kind != "LORA" or not isinstance(given.get("target_modules"), str | list):
        raise CheckpointError(f"{path}: LoRA and its target_modules are needed, got peft_type {kind}")
    for name, usual in REFUSED.items():
        if given.get(name) not in (usual, None):
            raise CheckpointError(f"{path}: {name} is {given[name]!r}, which the published code never trains")
    return {name: given[name] for name in sorted(KEPT) if given.get(name) is not None}


def _recipe(codec: Codec, task: str, model: dict[str, Any], lora: dict[str, Any] | None) -> Recipe:
    """The recipe that the checkpoint would have been trained by here."""
    scheme = codec.scheme
    method: dict[str, Any] = {"name": "prompt-tuning"}
    if lora is not None:
        modules, ours = lora["target_modules"], ("lora_r", "lora_alpha", "lora_dropout")
        given = {"lora_r": lora.get("r", 8), **lora}  # 8 is PEFT's own default
        method = {name: given[name] for name in ours if name in given}
        method |= {"name": "lora+prompt-tuning", "lora_module": [modules] if isinstance(modules, str) else modules}
    tokens = {name: getattr(scheme, name) for name in ("n_prefix", "n_special", "kinds", "placement")}
    values = {"name": "imported", "data": {"task": task}, "model": model, "tokens": tokens, "method": method}
    return Recipe.model_validate(values)


def _adapted(model: Any, codec: Codec, lora: dict[str, Any] | None, source: Path) -> Any:
    """The base model with the checkpoint's LoRA, and places for its rows."""
    layers = row_indices(model, codec)
    if lora is None:
        ids = next(iter(layers.values()))
        return get_peft_model(model, TrainableTokensConfig(token_indices=ids, target_modules=list(layers)))
    try:
        config = LoraConfig(**lora, trainable_token_indices=layers, task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{source / CONFIG}: does not fit the base model ({str(error).splitlines()[0]})"
        ) from error
    found = _lora_weights(source)
    wanted = {
        name.replace(".default", ""): parameter for name, parameter in adapted.named_parameters() if "lora_" in name
    }
    for path, names in ((source, wanted.keys() - found.keys()), (source / CONFIG, found.keys() - wanted.keys())):
        if names:
            raise CheckpointError(f"{path}: LoRA of another base model or configuration; {min(names)} is only in one")
    for name, parameter in wanted.items():
        if parameter.shape != found[name].shape:
            raise CheckpointError(
                f"{source}: LoRA of another base model: {name} is {tuple(found[name].shape)}, "
                f"here {tuple(parameter.shape)} is needed"
            )
        parameter.data = found[name].float()
    return adapted


def _lora_weights(source: Path) -> dict[str, Tensor]:
    path = next((source / name for name in (SAFE, PICKLED) if (source / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{source}: holds {CONFIG}, but neither {SAFE} nor {PICKLED}")
    try:
        found = load_file(path) if path.name == SAFE else read_tensors(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read; it is torn, or something else ({error})") from error
    found = {name: value for name, value in found.items() if not any(copy in name for copy in COPIES)}
    for name, value in found.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds what is no number")
    return found


def _put_rows(adapted: Any, rows: Rows) -> None:
    for layer in row_layers(adapted):
        if not layer.tied_adapter:
            own = rows.embedding if isinstance(layer.get_base_layer(), nn.Embedding) else rows.head
            layer.trainable_tokens_delta["default"].data = own.clone()


def _record(source: Path, recipe: Recipe, codec: Codec, rows: Rows) -> dict[str, Any]:
    """Where it came from."""
    files = sorted(path for path in source.iterdir() if path.suffix in (".pt", ".bin", ".safetensors", ".json"))
    return {
        "versions": {name: version(name) for name in ("memreason", "torch", "transformers", "peft")},
        **{name: getattr(recipe.model, name) for name in ("base", "revision", "fingerprint")},
        "tokens": codec.describe(),
        "files": {path.name: file_hash(path) for path in files},
        "bias": {
            "kept": bool(codec.scheme.row_bias),
            "max": float(rows.bias.abs().max()),
            "mean": float(rows.bias.abs().mean()),
        },
    }
