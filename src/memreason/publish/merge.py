"""A checkpoint as one plain Transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

from memreason.core.errors import CheckpointError
from memreason.encode.base import DTYPES
from memreason.finetune.checkpoint import load_checkpoint, save_checkpoint

__all__ = ["merge"]


def merge(path: Path | str, out: Path | str, *, base: str | None = None, dtype: str = "fp32") -> Path:
    """Write the adapter of a run or checkpoint into its base weights and save them to `out`, which it returns.

    The folder loads with plain AutoModelForCausalLM and AutoTokenizer, and as a checkpoint here. Merging is done
    in fp32 on the unquantised base, also where training was quantised; `dtype` is what is stored. Raises
    CheckpointError for methods whose virtual tokens stand outside the weights, and if `out` holds files already.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out}: holds files already; give an empty folder")
    loaded = load_checkpoint(path, base=base, dtype="fp32", quantize=None)
    model: Any = loaded.model
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise CheckpointError(
                f"{loaded.folder}: {loaded.recipe.method.name} trains virtual tokens that stand outside the weights; "
                "there is nothing to merge. Use the checkpoint with its base model."
            )
        model = model.merge_and_unload()  # type: ignore[operator]
    model.to(DTYPES[dtype])
    recipe = loaded.recipe
    plain = {"base": str(out), "quantize": None, "dtype": dtype}
    merged = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update=plain),
            "method": recipe.method.model_copy(update={"name": "full"}),
        }
    )
    save_checkpoint(out, model, loaded.codec, merged)
    return out
