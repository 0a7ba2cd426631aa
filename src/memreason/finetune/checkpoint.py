"""Weights, tokenizer, scheme and recipe: written and read together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from memreason.core.errors import CheckpointError
from memreason.core.files import write_text
from memreason.core.recipe import Recipe, load_recipe
from memreason.encode.base import bare_tokenizer, load_model, load_tokenizer, pick_dtype, text_fingerprint
from memreason.encode.codec import Codec
from memreason.encode.scheme import SCHEME_FILE, TokenScheme
from memreason.encode.vocab import add_rows
from memreason.fast.rows import rows_beside

__all__ = ["Checkpoint", "checkpoints_in", "load_checkpoint", "resolve", "save_checkpoint"]

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A trained model ready to generate, with what it was trained as."""

    folder: Path
    model: nn.Module
    codec: Codec
    recipe: Recipe


def save_checkpoint(folder: Path, model: Any, codec: Codec, recipe: Recipe) -> None:
    """Write a checkpoint: adapters in safetensors without the embedding, or the whole model after full training."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder), save_embedding_layers=False, safe_serialization=True)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    else:
        model.save_pretrained(folder)
    codec.tokenizer.save_pretrained(folder)
    codec.scheme.save(folder)
    write_text(folder / "recipe.yaml", recipe.to_yaml())


def checkpoints_in(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. One is complete when its trainer state is there."""
    found = [p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in found if (p / "trainer_state.json").is_file()), key=lambda p: int(p.name.split("-")[1]))


def resolve(path: Path | str) -> Path:
    """A run means its best checkpoint; a checkpoint means itself. Raises CheckpointError otherwise."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such run or checkpoint")
    if (path / SCHEME_FILE).is_file() or (path / ADAPTER).is_file():
        return path
    manifest = path / "manifest.json"
    if manifest.is_file():
        best = json.loads(manifest.read_text(encoding="utf-8")).get("best")
        if best and (path / best["checkpoint"]).is_dir():
            return path / str(best["checkpoint"])
    complete = checkpoints_in(path)
    if not complete:
        raise CheckpointError(f"{path}: holds no complete checkpoint. Train it first, or name a checkpoint-N folder.")
    return complete[-1]


def load_checkpoint(path: Path | str, *, base: str | None = None, **model_changes: Any) -> Checkpoint:
    """Read a run or checkpoint. `base` and `model_changes` (dtype, quantize, offload) override its recipe.

    Raises CheckpointError for a missing or foreign scheme and for a base model of another shape.
    """
    folder = resolve(path)
    scheme = TokenScheme.load(folder)
    recipe = load_recipe(folder / "recipe.yaml")
    codec = Codec(scheme, _tokenizer(folder))
    settings = recipe.model.model_copy(update=model_changes | ({"base": base} if base else {}))
    if not (folder / ADAPTER).is_file():
        with _readable(folder, "its weights cannot be read"):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=pick_dtype(settings.dtype)).eval()
        return Checkpoint(folder, model, codec, recipe)
    if base:
        _check_tokenizer(base, folder, recipe, scheme)
    loaded = load_model(**settings.model_dump(), seed=recipe.seed)
    add_rows(loaded, codec)
    with _readable(folder, f"adapter_model.safetensors is broken or does not fit the base model {settings.base}"):
        adapted = PeftModel.from_pretrained(loaded, str(folder)).eval()
    rows_beside(adapted)
    return Checkpoint(folder, adapted, codec, recipe)


@contextmanager
def _readable(folder: Path, problem: str) -> Iterator[None]:
    """Transformers, PEFT and safetensors each raise classes of their own for files that they cannot use."""
    try:
        yield
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{folder}: {problem} ({reason})") from error


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    with _readable(folder, "its tokenizer cannot be read"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def _check_tokenizer(base: str, folder: Path, recipe: Recipe, scheme: TokenScheme) -> None:
    """A base that is named by hand may have the right shape and still another vocabulary."""
    tokenizer = load_tokenizer(base, trust_remote_code=recipe.model.trust_remote_code)
    if scheme.tokenizer and text_fingerprint(bare_tokenizer(tokenizer)) != scheme.tokenizer:
        raise CheckpointError(f"{folder}: trained on {recipe.model.base}, with another tokenizer than {base} has")
