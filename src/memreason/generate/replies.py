"""What an OpenAI-compatible server answered: ids, log-probabilities, or in plain words what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import openai

__all__ = ["KEY", "ids_of", "said"]

KEY = "OPENAI_API_KEY"
Json = Mapping[str, Any]


def ids_of(choice: Json, spent: int | None, eos: int) -> tuple[list[int], list[dict[int, float]]] | None:
    """Generated ids, and for each the log-probabilities that came with it, by id; None if they are not there, or not
    all of the `spent` ones: llama.cpp has no entry for a token that holds a part of a character."""
    logprobs = choice.get("logprobs") or {}
    entries: list[Json] = logprobs.get("content") or []  # llama.cpp, and every chat
    if not entries:  # vLLM: {"tokens": ["token_id:7"], "token_logprobs": [-0.1], "top_logprobs": [{"token_id:7": …}]}
        columns = [logprobs.get(name) or [] for name in ("tokens", "token_logprobs", "top_logprobs")]
        entries = [
            {
                "token": token,
                "logprob": value,
                "top_logprobs": [{"token": t, "logprob": v} for t, v in (top or {}).items()],
            }
            for token, value, top in zip(*columns, strict=False)
        ]
    ids = choice.get("token_ids") or [_id(entry) for entry in entries]
    if not ids or None in ids:
        return None
    ended = choice.get("finish_reason") == "stop" and ids[-1] != eos  # it counts the end, and does not show it
    if spent is not None and spent != len(ids) + ended:
        return None
    tables = [
        {
            token: one["logprob"]
            for one in (*(entry.get("top_logprobs") or ()), entry)
            if (token := _id(one)) is not None
        }
        for entry in entries
    ]
    return ids, tables if len(tables) == len(ids) else []


def _id(entry: Json) -> int | None:
    """The id of a token as llama.cpp gives it, or in vLLM's spelling."""
    name, _, number = str(entry.get("token")).partition(":")
    spelled = int(number) if name == "token_id" and number.isdigit() else None
    return int(entry["id"]) if isinstance(entry.get("id"), int) else spelled


def said(error: openai.APIError, key: str = "") -> str:
    """What the SDK's error means, without the key: some servers send it back."""
    text = " ".join(str(error).split())
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        text = f"the key in {KEY} was refused (HTTP {error.status_code})"
    elif isinstance(error, openai.APITimeoutError):
        text = "no reply. Answered questions are kept: run it again, with fewer in flight (--eval.batch_size)"
    elif isinstance(error, openai.APIConnectionError):
        text = f"no connection ({error.__cause__ or text}). Is it running, and is --eval.base_url right (…/v1)? "
        text += "Answered questions are kept"
    elif isinstance(error, openai.NotFoundError):
        text = f"not found; is --eval.base_url right (…/v1)? It says: {text}"
    return (text.replace(key, "***") if key else text)[:400]
