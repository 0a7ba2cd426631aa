"""`memreason export`: a checkpoint becomes what other tools load, and gets its name only when it was checked.

It is written aside, and renamed at the end: a check that fails, Ctrl-C or a kill leave nothing under the final name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, GenerationConfig

from memreason.core.files import new_folder, write_json, write_text
from memreason.core.recipe import Recipe
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question
from memreason.encode.base import DTYPES
from memreason.encode.codec import Codec
from memreason.encode.vocab import bias_rows
from memreason.finetune.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from memreason.publish import gate
from memreason.publish.card import model_card
from memreason.publish.chat import chat_template
from memreason.publish.merge import hand_bias_over, merge, refuse_sparse, refuse_virtual_tokens

__all__ = ["Figures", "Step", "export_model", "greedy", "noting", "unheard", "write_model"]

Figures = dict[str, str]  # check -> what it found
Step = Callable[[str, str], None]  # a check's name, and what it found


def unheard(name: str, found: str) -> None:
    """For whom the checks need not be told."""


def noting(tell: Step) -> tuple[Figures, Step]:
    """A table of what was found, and what puts a passed check into it and tells of it."""
    found = Figures()

    def passed(name: str, what: str) -> None:
        found[name] = what
        tell(name, what)

    return found, passed


def export_model(
    path: Path | str,
    out: Path,
    questions: Sequence[Question],
    *,
    base: str | None = None,
    dtype: str = "bf16",
    name: str | None = None,
    tell: Step = unheard,
) -> Figures:
    """Merge a run or checkpoint and write it to `out` as one plain Transformers model, with tokenizer, chat template,
    generation config and card (which calls it `name`); returns what the checks found, also in export.json. It is a
    checkpoint here as well.

    Merging is done in fp32 on the unquantised base, also where training was quantised; `dtype` is what is stored.
    Raises CheckpointError if there is nothing to merge, ExportError if a check fails, StorageError if
    `out` holds files already.
    """
    loaded = load_checkpoint(path, base=base, dtype="fp32", quantize=None, offload=False)
    refuse_sparse(loaded)
    refuse_virtual_tokens(loaded)
    settings, (found, passed) = greedy(loaded.recipe), noting(tell)
    with new_folder(out) as folder:
        before = gate.ask_adapter(loaded, questions, settings)
        model = merge(loaded)
        passed("logits of the adapter", gate.check_logits(model, before))
        write_model(folder, out, model, loaded, dtype)
        written: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], use_safetensors=True).eval()
        passed("rows", gate.check_rows(written, loaded.codec))
        passed("new rows", gate.check_new_rows(written, loaded.codec, before))
        passed("weights", gate.check_weights(written, model))
        passed("blocks", gate.check_blocks(folder, loaded.codec))
        del model
        stored = None  # in fp32 traces must be the adapter's own
        if dtype != "fp32":
            stored = written.float()
            bias_rows(stored, loaded.codec)
        passed("traces", gate.check_traces(folder, loaded.codec, before, settings, written=stored))
        write_json(folder / "export.json", {"from": str(loaded.folder), "dtype": dtype, "checks": found})
        write_text(folder / "README.md", model_card("hf", name or out.name, loaded, found))
    return found


def greedy(recipe: Recipe) -> EvalRecipe:
    """How the checks generate: as plain as Transformers does."""
    return EvalRecipe(batch_size=recipe.eval.batch_size, max_new_tokens=recipe.eval.max_new_tokens)


def write_model(folder: Path, name: Path, merged: Any, loaded: Checkpoint, dtype: str) -> None:
    """Weights, tokenizer with the chat template, generation config, scheme and recipe; `name` is the final folder."""
    codec, recipe = loaded.codec, loaded.recipe
    merged.to(DTYPES[dtype])
    hand_bias_over(merged, codec)
    merged.generation_config = _generation(merged, codec, recipe)
    codec.tokenizer.chat_template = chat_template(codec)
    plain = {"base": str(name), "revision": None, "fingerprint": None, "quantize": None, "dtype": dtype}
    changes: dict[str, Any] = {
        "model": recipe.model.model_copy(update=plain),
        "method": recipe.method.model_copy(update={"name": "full"}),
    }
    save_checkpoint(folder, merged, codec, recipe.model_copy(update=changes))


def _generation(merged: Any, codec: Codec, recipe: Recipe) -> GenerationConfig:
    """Greedy, to the end of a trace; a bias of imported rows stays."""
    eos = codec.eos_id
    pad = codec.tokenizer.pad_token_id
    bias = getattr(merged.generation_config, "sequence_bias", None)
    return GenerationConfig(
        bos_token_id=codec.tokenizer.bos_token_id,
        eos_token_id=eos,
        pad_token_id=eos if pad is None else pad,
        do_sample=False,
        max_new_tokens=recipe.eval.max_new_tokens,
        **({"sequence_bias": bias} if bias else {}),
    )
