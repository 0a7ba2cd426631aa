"""Which files a base model's name means: the commit of a hub model, the fingerprint of what lies on this disk."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from memreason.core.errors import ModelError
from memreason.core.files import read_json

__all__ = ["fingerprint", "hub_commit", "hub_token"]

BLOCK, BLOCKS = 4096, 16
REFUSALS: dict[type[Exception], str] = {  # what the hub says -> what that means; the first that fits counts
    GatedRepoError: "the hub gives it only to those who accepted its terms: do so there, then set HF_TOKEN",
    RepositoryNotFoundError: "the hub has no such model, or a private one: then set HF_TOKEN",
    RevisionNotFoundError: "the hub has no revision {revision} of it",
    HFValidationError: "that is no name of a hub model",
}


def hub_token() -> str | None:
    """The user's own, if it can be one: an unusable token must fail only where one is needed."""
    token = os.environ.get("HF_TOKEN")
    return token if token and token.isascii() and " " not in token else None


@cache
def hub_commit(name: str, revision: str | None) -> tuple[str, Path | None]:
    """The commit that a revision of a hub model (None: main) is, and its folder in the cache if no hub can be asked.

    One quick question in a process: Transformers asks for many files, and long, before it gives up. Raises ModelError
    with what to do.
    """
    here = _cached(name, revision)
    if here and constants.HF_HUB_OFFLINE:
        return here.name, here
    try:
        found = HfApi().model_info(name, revision=revision, timeout=10, token=hub_token())
    except tuple(REFUSALS) as error:
        said = next(text for kind, text in REFUSALS.items() if isinstance(error, kind))
        raise ModelError(f"{name}: {said.format(revision=revision)}") from error
    except (OfflineModeIsEnabled, httpx2.HTTPError, OSError) as error:
        if here:
            return here.name, here
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        if isinstance(error, HfHubHTTPError):
            why = f"the hub refuses ({str(error).strip().splitlines()[0]})"
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"{name}: {why}, and there is no such folder, nor is it in the hub's cache{at} ({constants.HF_HUB_CACHE}). "
            "Fetch it once with a network (hf download), or name a local folder or GGUF file."
        ) from error
    return str(found.sha), None


def _cached(name: str, revision: str | None) -> Path | None:
    """The folder of a commit in the hub's cache."""
    try:
        path = hf_hub_download(name, "config.json", revision=revision, local_files_only=True)
    except (EntryNotFoundError, HFValidationError):
        return None
    return Path(path).parent


def fingerprint(path: Path) -> str:
    """Sixteen hex digits that name a GGUF file's, or a folder's, model, in milliseconds whatever its size.

    Covered are the configuration (less the version that wrote it) and of every weight file its size and 16 blocks of
    4 KiB, evenly spread from its first byte to its last. Other weights of the same shape differ in them; a few values
    changed between two blocks do not show. Names, dates and the tokenizer are not covered.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        config = read_json(path / "config.json")
        config = {
            name: value for name, value in config.items() if name not in ("transformers_version", "_name_or_path")
        }
        digest.update(json.dumps(config, sort_keys=True).encode())
    for file in _weight_files(path):
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as handle:
            for n in range(BLOCKS):
                handle.seek(max(0, size - BLOCK) * n // (BLOCKS - 1))
                digest.update(handle.read(BLOCK))
    return digest.hexdigest()[:16]


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
