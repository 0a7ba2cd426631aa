"""`memreason export --to gguf`: a run through llama.cpp's own converter, and what must hold of the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from memreason.core.errors import ExportError
from memreason.core.files import new_folder, read_json, write_json, write_text
from memreason.core.trace import Question
from memreason.encode.codec import Codec
from memreason.finetune.checkpoint import open_checkpoint
from memreason.publish.card import model_card
from memreason.publish.converter import convert, converter
from memreason.publish.export import Figures, Step, export_model, unheard

__all__ = ["GGUF", "check_file", "export_gguf"]

GGUF = "model.gguf"
USER_DEFINED = 4  # of llama.cpp's token types: matched in a text, and printed


def export_gguf(
    path: Path | str,
    out: Path,
    questions: Sequence[Question],
    *,
    base: str | None = None,
    kind: str = "f16",
    script: Path | None = None,
    name: str | None = None,
    tell: Step = unheard,
) -> Figures:
    """Export a run or checkpoint as Transformers' model (with every check of that) and convert it: `out`/model.gguf.

    `kind` is a type that the converter writes itself: f32, f16, bf16 or q8_0; `script` a converter of one's own.
    Raises ExportError if the converter refuses the model, or if the file fails a check.
    """
    source, script = open_checkpoint(path), script or converter()
    if not script.is_file():
        raise ExportError(f"--converter {script}: no such file")
    with new_folder(out) as folder:
        plain = folder / "plain"
        found = export_model(path, plain, questions, base=base, dtype="fp32", tell=tell)
        exported = open_checkpoint(plain)
        convert(script, plain, folder / GGUF, kind, out.name)
        _rank_pieces(folder / GGUF, plain)
        found["GGUF"] = check_file(folder / GGUF, exported.codec)
        tell("GGUF", found["GGUF"])
        for file in plain.iterdir():
            if file.suffix in (".safetensors", ".md") or file.name in ("export.json", "model.safetensors.index.json"):
                file.unlink()
            else:
                file.replace(folder / file.name)  # tokenizer, scheme and recipe: what a client of a server needs
        plain.rmdir()
        changes = {"model": exported.recipe.model.model_copy(update={"base": str(out / GGUF)})}
        write_text(folder / "recipe.yaml", exported.recipe.model_copy(update=changes).to_yaml())
        write_json(folder / "export.json", {"from": str(source.folder), "type": kind, "checks": found})
        write_text(folder / "README.md", model_card("gguf", name or out.name, source, found))
    return found


def _rank_pieces(file: Path, model: Path) -> None:
    """Give the pieces of a SentencePiece vocabulary their scores, in place.

    Transformers 5 saves no tokenizer.model, and without one the converter gives every piece the same score: llama.cpp,
    which joins the pieces of the highest score first, would then read texts as other ids. A piece's score in such a
    model is its rank, and that is the order of the merges.
    """
    fields = GGUFReader(file, "r+").fields
    if fields["tokenizer.ggml.model"].contents() != "llama":
        return
    bpe = read_json(model / "tokenizer.json")["model"]
    scores = fields["tokenizer.ggml.scores"]
    for rank, merge in reversed(list(enumerate(bpe["merges"]))):  # a piece that two merges make has the first one's
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        scores.parts[scores.data[bpe["vocab"][left + right]]][0] = np.float32(-rank)


def check_file(file: Path, codec: Codec) -> str:
    """Every block's tokens are single ids that are read in texts and printed; end and template are the trained ones."""
    reader: Any = GGUFReader(file)
    names = ("tokens", "token_type", "eos_token_id")
    tokens, types, eos = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in names)
    for token, i in codec.describe().items():
        if (tokens[i], types[i]) != (token, USER_DEFINED):
            raise ExportError(f"--to gguf: id {i} is {tokens[i]!r} of type {types[i]}, not {token}")
    if eos != codec.eos_id:
        raise ExportError(f"--to gguf: the file ends at id {eos}, not at {codec.eos_id}")
    if reader.fields["tokenizer.chat_template"].contents() != codec.tokenizer.chat_template:
        raise ExportError("--to gguf: the file has another chat template")
    rows = next(int(tensor.shape[-1]) for tensor in reader.tensors if tensor.name == "token_embd.weight")
    if rows != len(tokens):
        raise ExportError(f"--to gguf: the file has {rows:,} rows for {len(tokens):,} tokens")
    size = file.stat().st_size / 2**20
    return f"{len(codec.describe())} tokens of blocks single and printed, {rows:,} rows, {size:.0f} MiB"
