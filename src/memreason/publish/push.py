"""An exported folder goes to the hub, private unless it is said otherwise."""

from __future__ import annotations

from pathlib import Path

import httpx2
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported, without saying so

from memreason.core.errors import ExportError

__all__ = ["check_pushable", "push"]

KEPT = "The export itself is whole: "


def check_pushable(name: str) -> None:
    """Raises ExportError for a name that is none and where there is no token, before an export takes its minutes."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ExportError(f"--push {name}: OWNER/NAME is needed ({str(error).splitlines()[0]})") from error
    if name.count("/") != 1:
        raise ExportError(f"--push {name}: OWNER/NAME is needed")
    if not get_token():
        raise ExportError(f"--push {name}: no token; set HF_TOKEN or run `hf auth login`")


def push(folder: Path, name: str, *, public: bool = False) -> str:
    """Upload a folder to the repository `name` (OWNER/NAME), which is made if need be; returns its address.

    The token is that of HF_TOKEN or of `hf auth login`. Raises ExportError if the hub refuses or is not reached.
    """
    check_pushable(name)
    api = HfApi()
    try:
        address = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="memreason export")
    except HfHubHTTPError as error:
        raise ExportError(f"--push {name}: the hub refused ({str(error).splitlines()[0]}). {KEPT}{folder}") from error
    except httpx2.TransportError as error:
        raise ExportError(f"--push {name}: the hub is not reached ({error}). {KEPT}{folder}") from error
    return str(address)
