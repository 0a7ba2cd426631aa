"""`memreason export --to adapter`: adapter and new rows for plain PEFT, over the base model as the hub has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from memreason.core.errors import ExportError
from memreason.core.files import new_folder, write_json, write_text
from memreason.core.trace import Question
from memreason.encode.base import load_model, locate
from memreason.encode.vocab import add_rows
from memreason.finetune.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from memreason.finetune.methods import network_of, trainable
from memreason.publish import gate
from memreason.publish.card import model_card
from memreason.publish.chat import chat_template
from memreason.publish.export import Figures, Step, greedy, noting, unheard
from memreason.publish.merge import refuse_sparse

__all__ = ["export_adapter"]


def export_adapter(
    path: Path | str,
    out: Path,
    questions: Sequence[Question],
    *,
    base: str | None = None,
    name: str | None = None,
    tell: Step = unheard,
) -> Figures:
    """Write the adapter of a run or checkpoint, with its new rows and tokenizer, to `out`: megabytes.

    Rows that were not trained (method lora) go with it, as PEFT's trainable tokens: the base model does not have them.
    Raises ExportError for a model that was trained in full, or if a check fails.
    """
    loaded = load_checkpoint(path, base=base, dtype="fp32", quantize=None, offload=False)
    refuse_sparse(loaded)
    if not isinstance(loaded.model, PeftModel):
        raise ExportError(f"{loaded.folder}: holds the whole model, no adapter; use --to hf")
    head = network_of(loaded.model).get_output_embeddings()
    if loaded.codec.blocks and any(name.endswith("bias") for name, _ in head.named_parameters()):
        raise ExportError(f"{loaded.folder}: PEFT drops the bias of a head that holds new rows; use --to hf")
    settings, codec, (found, passed) = greedy(loaded.recipe), loaded.codec, noting(tell)
    named = base or loaded.recipe.model.base

    with new_folder(out) as folder:
        before = gate.ask_adapter(loaded, questions, settings)
        codec.tokenizer.chat_template = chat_template(codec)
        save_checkpoint(folder, _with_rows(loaded, named), codec, loaded.recipe)
        passed("blocks", gate.check_blocks(folder, codec))
        where, extra = locate(named)
        if extra:
            raise ExportError(f"{named}: a GGUF file is no base for PEFT; use --to hf")
        passed("traces", gate.check_traces(folder, codec, before, settings, base=where))
        write_json(folder / "export.json", {"from": str(loaded.folder), "checks": found})
        write_text(folder / "README.md", model_card("adapter", name or out.name, loaded, found))
    return found


def _with_rows(loaded: Checkpoint, base: str) -> Any:
    """The adapted model; LoRA over rows that were not trained becomes LoRA and trainable tokens that hold them."""
    recipe, codec = loaded.recipe, loaded.codec
    if recipe.method.name != "lora" or not codec.blocks:
        return loaded.model
    settings = recipe.model.model_copy(update={"base": base, "dtype": "fp32", "quantize": None})
    model = load_model(**settings.model_dump(), seed=recipe.seed)
    add_rows(model, codec)
    whole = trainable(model, codec, recipe.method.model_copy(update={"name": "lora+prompt-tuning"}))
    states = (get_peft_model_state_dict(one, save_embedding_layers=False) for one in (whole, loaded.model))
    set_peft_model_state_dict(whole, {name: value for state in states for name, value in state.items()})
    return whole
