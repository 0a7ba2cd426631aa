"""What of a GGUF file is checked, written by the public writer: for a converter made in the tests, quick to start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter


def write_file(
    file: Path, tokens: Sequence[str], types: Sequence[int], eos: int, template: str, rows: Any, kind: str = "gpt2"
) -> Path:
    writer = GGUFWriter(file, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(list(tokens))
    writer.add_token_scores([-1000.0] * len(tokens))
    writer.add_token_types(list(types))
    writer.add_eos_token_id(eos)
    writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
