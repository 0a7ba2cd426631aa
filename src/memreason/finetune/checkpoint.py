"""Weights, tokenizer, scheme and recipe: written and read together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TrainerState

from memreason.core.errors import CheckpointError
from memreason.core.files import new_folder, write_text
from memreason.core.recipe import Recipe, load_recipe
from memreason.core.stages import EvalRecipe
from memreason.encode.base import bare_tokenizer, load_config, load_model, load_tokenizer, pick_dtype, text_fingerprint
from memreason.encode.codec import Codec
from memreason.encode.demonstrations import read_demonstrations
from memreason.encode.scheme import SCHEME_FILE, TokenScheme
from memreason.encode.vocab import add_rows, bias_rows
from memreason.fast.rows import rows_beside
from memreason.finetune.spread import spread

__all__ = [
    "Checkpoint", "Elsewhere", "checkpoint_for", "checkpoints_in", "load_checkpoint", "open_checkpoint", "resolve",
    "save_checkpoint", "save_untrained", "with_weights",
]  # fmt: skip

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A trained model ready to generate, with what it was trained as."""

    folder: Path
    model: nn.Module
    codec: Codec
    recipe: Recipe


class Elsewhere(nn.Module):
    """Stands for a model whose weights another engine holds: it has none, only a folder and a configuration.

    `changes` are the arguments of load_checkpoint that read it as it is meant."""

    def __init__(self, folder: Path, base: str, changes: dict[str, Any]) -> None:
        super().__init__()
        self.name_or_path, self.base, self.changes = str(folder), base, changes

    @cached_property
    def config(self) -> Any:
        """Raises CheckpointError, or ModelError where an adapter's base cannot be found."""
        folder = Path(self.name_or_path)
        if not (folder / "config.json").is_file():  # an adapter, or nothing that was trained
            return load_config(self.base)
        with _readable(folder, "its configuration cannot be read"):
            return AutoConfig.from_pretrained(folder)


def save_checkpoint(
    folder: Path, model: Any, codec: Codec, recipe: Recipe, state: dict[str, Tensor] | None = None
) -> None:
    """Write a checkpoint: adapters in safetensors without the embedding, or the whole model after full training.

    `state` stands in for the model's own weights where it holds but a share of them."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    else:
        model.save_pretrained(folder, state_dict=state)
    _save_terms(folder, codec, recipe)


def _save_terms(folder: Path, codec: Codec, recipe: Recipe) -> None:
    """All but weights."""
    codec.tokenizer.save_pretrained(folder)
    codec.scheme.save(folder)
    if codec.demonstrations:
        codec.demonstrations.save(folder)
    write_text(folder / "recipe.yaml", recipe.to_yaml())


def save_untrained(run: Path, codec: Codec, recipe: Recipe) -> str:
    """A checkpoint of what is not trained: all but weights, which are the base's. Returns its name."""
    whole = run / "checkpoint-0"
    if not whole.is_dir():  # it may be there, of a run that was killed behind it
        with new_folder(whole) as folder:
            _save_terms(folder, codec, recipe)
            TrainerState().save_to_json(str(folder / "trainer_state.json"))
    TrainerState().save_to_json(str(run / "trainer_state.json"))
    return whole.name


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
    return with_weights(open_checkpoint(path, base=base), base=base, **model_changes)


def open_checkpoint(path: Path | str, *, base: str | None = None, **model_changes: Any) -> Checkpoint:
    """The same without weights, which another engine holds. Raises CheckpointError for its scheme or tokenizer."""
    folder = resolve(path)
    scheme = TokenScheme.load(folder)
    recipe = load_recipe(folder / "recipe.yaml")
    model = Elsewhere(folder, base or recipe.model.base, {"base": base, **model_changes})
    shown = read_demonstrations(folder, recipe.data, scheme.demonstrations)
    return Checkpoint(folder, model, Codec(scheme, _tokenizer(folder), shown), recipe)


def checkpoint_for(
    settings: EvalRecipe | None, path: Path | str, *, base: str | None = None, **model_changes: Any
) -> Checkpoint:
    """A checkpoint to evaluate: with weights if the engine of the settings (None: those of its recipe) needs them."""
    opened = open_checkpoint(path, base=base, **model_changes)
    used = settings or opened.recipe.eval
    here = used.engine == "local" and not used.ray
    return with_weights(opened, base=base, **model_changes) if here else opened


def with_weights(opened: Checkpoint, *, base: str | None = None, **model_changes: Any) -> Checkpoint:
    """Read the weights of an opened checkpoint. Raises CheckpointError for a base model of another shape."""
    folder, codec, recipe = opened.folder, opened.codec, opened.recipe
    named = {"base": base, "revision": None, "fingerprint": None} if base else {}
    settings = recipe.model.model_copy(update=model_changes | named)
    if recipe.method.name == "prompting":
        if base:
            _check_tokenizer(base, folder, recipe, codec.scheme)
        return _placed(opened, load_model(**settings.model_dump(), seed=recipe.seed).eval(), False)
    if not (folder / ADAPTER).is_file():
        with _readable(folder, "its weights cannot be read"):
            weights = {"dtype": pick_dtype(settings.dtype), "use_safetensors": True}
            model: Any = AutoModelForCausalLM.from_pretrained(folder, **weights).eval()
        bias_rows(model, codec)
        return _placed(opened, model, settings.offload)
    if base:
        _check_tokenizer(base, folder, recipe, codec.scheme)
    early = bool(settings.offload and settings.quantize)  # bitsandbytes quantises onto devices; else it comes last
    loaded = load_model(**settings.model_dump() | {"offload": early}, seed=recipe.seed)
    add_rows(loaded, codec)
    with _readable(folder, f"adapter_model.safetensors is broken or does not fit the base model {settings.base}"):
        adapted = PeftModel.from_pretrained(loaded, str(folder)).eval()
    rows_beside(adapted)
    return _placed(opened, adapted, not early and settings.offload)


def _placed(opened: Checkpoint, model: Any, offload: bool | dict[str, str]) -> Checkpoint:
    if offload:
        spread(model, offload)
    return replace(opened, model=model)


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
