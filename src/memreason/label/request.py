"""What goes to a teacher and what comes back: Request, Reply, and the JSON that a reply must hold."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import json_repair

from memreason.core.labelling import TeacherRecipe
from memreason.label.prompting import Messages

__all__ = ["Failed", "Reply", "Request", "content_of", "key_of"]

THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)  # of a reasoning model whose server does not part it off
FENCED = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)
REFUSAL = re.compile(r"\W*(?:i['’]?m sorry|i am sorry|sorry,|i can(?:no|['’])t|i am unable|as an ai\b)", re.IGNORECASE)


@dataclass(frozen=True)
class Request:
    """Messages for a purpose. With a `schema`, the reply must be one JSON object of that shape."""

    purpose: str
    question: str  # its id
    messages: Messages
    schema: dict[str, Any] | None = None
    turn: int = 0  # replies that were refused before

    def body(self, teacher: TeacherRecipe) -> dict[str, Any]:
        """The request as chat completions take it, less how JSON is asked for, which servers differ in."""
        body: dict[str, Any] = {"model": teacher.model, "messages": list(self.messages)}
        body[teacher.tokens_field] = teacher.max_tokens
        given = {"temperature": teacher.temperature, "top_p": teacher.top_p}
        return body | {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Reply:
    """What a teacher said, and what it took. `content` is None where it said nothing."""

    content: str | None
    finish_reason: str = "stop"
    refusal: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    endpoint: str = ""


@dataclass
class Failed(Exception):
    """A reply that cannot be used. `name` is counted, `reason` is told to the teacher."""

    name: str
    reason: str


def key_of(request: Request, teacher: TeacherRecipe, sample: int, weights: str = "") -> str:
    """Names a request in the journal: 32 hex digits of body, schema, purpose, sample and the weights of a model that
    runs here; not of the endpoint."""
    parts = [request.body(teacher), request.schema, request.purpose, request.question, sample, weights]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def content_of(reply: Reply, request: Request) -> Any:
    """The reply's text, or with a schema the object that it holds. Raises Failed for what is no whole reply."""
    text = THOUGHT.sub("", reply.content or "", count=1).strip()
    if reply.refusal or (text and REFUSAL.match(text)):
        raise Failed("refused", "the reply was a refusal")
    if reply.finish_reason == "length":
        raise Failed("truncated", "the reply was cut off at the limit of tokens; be shorter")
    if not text:
        raise Failed("no_content", f"the reply was empty (finish reason {reply.finish_reason!r})")
    if request.schema is None:
        return text
    found = _object(text)
    missing = [name for name in request.schema["required"] if not isinstance(found, dict) or name not in found]
    if missing:
        raise Failed("not_json", f"the reply is not one JSON object with {' and '.join(missing)}")
    return found


def _object(text: str) -> Any:
    """As it stands, from a fenced block, or repaired from the first brace on."""
    for candidate in (text, *FENCED.findall(text)[:1]):
        try:
            return json.loads(candidate)
        except ValueError:
            continue
    return json_repair.loads(text[text.find("{") :]) if "{" in text else None
