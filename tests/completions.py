"""A server on loopback that completes prompts as vLLM, llama.cpp, a server of text alone and one of chats alone do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from stub import Replies, listening

Json = dict[str, Any]
Trouble = tuple[int, Json, dict[str, str]] | None  # status, body and headers instead of an answer; None: the line drops
OFF = {"retry-after-ms": "5"}  # so that a test need not wait as long as a user


@dataclass
class Completions:
    """What the server knows: the tokens that follow a prompt, and how it reads and writes text. It counts who asks."""

    tokenizer: PreTrainedTokenizerBase
    eos: int
    following: Callable[[list[int]], list[int]]
    style: str = "vllm"
    models: tuple[str, ...] = ("toy",)
    template: Callable[[str], str] = str  # a chat's only message -> the prompt
    written: Callable[[str], str] = str  # a text -> what is sent of it
    listing: bool = True  # whether it names its models
    seconds: float = 0.0
    troubles: list[Trouble] = field(default_factory=list)  # of the next questions
    last: int | None = None  # how many questions it answers before it refuses all
    asked: list[Json] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    flying: int = 0
    most: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def questions(self) -> list[Json]:
        """What was asked, without the check of the blocks."""
        return [body for body in self.asked if body["max_tokens"] > 1]

    def answer(self, path: str, body: Json) -> tuple[int, Json]:
        chat = path.endswith("/chat/completions")
        prompt = body.get("prompt", "")
        if body.get("model", self.models[0]) not in self.models:
            return 404, error(f"The model `{body['model']}` does not exist.")
        if self.style == "chat" and not chat:
            return 404, error("Not Found")
        if self.style in ("text", "chat") and not set(body) <= PLAIN:
            return 422, error(f"Unexpected fields in the request: {set(body) - PLAIN}")
        if self.style == "text" and not isinstance(prompt, str):
            return 400, error("prompt must be a string.")
        if chat:
            prompt = self.template(body["messages"][0]["content"])
        ids = prompt if isinstance(prompt, list) else list(self.tokenizer(prompt)["input_ids"])
        made = self.following(ids)[: body["max_tokens"]]
        ended = made[-1:] == [self.eos]
        shown = made[:-1] if ended else made
        text = self.written(self.tokenizer.decode(shown, clean_up_tokenization_spaces=False))
        choice: Json = {"index": 0, "finish_reason": "stop" if ended else "length"}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if self.style == "vllm" and body.get("return_token_ids"):
            assert body["return_tokens_as_token_ids"] and body["logprobs"] == 2
            names = [f"token_id:{token}" for token in made]
            logprobs = [logprob(n) for n in range(len(made))]
            top = [{name: value, "token_id:9": -3.0} for name, value in zip(names, logprobs, strict=True)]
            choice["logprobs"] = {"tokens": names, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": []}
            choice |= {"token_ids": made, "prompt_token_ids": ids}
        if self.style == "llama.cpp" and body.get("logprobs"):
            content = [
                {"id": token, "token": "x", "logprob": logprob(n), "top_logprobs": [{"id": 9, "logprob": -3.0}]}
                for n, token in enumerate(shown)
                if not self.partial(token)
            ]
            choice["logprobs"] = {"content": content}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(made)}
        return 200, {"object": "text_completion", "choices": [choice], "usage": usage}

    def partial(self, token: int) -> bool:
        """llama.cpp leaves out tokens that are a part of a character."""
        return "�" in self.tokenizer.decode([token])


PLAIN = {"model", "prompt", "messages", "max_tokens", "temperature", "top_p", "seed"}


def logprob(place: int) -> float:
    return -0.01 * (place + 1)


def error(message: str) -> Json:
    return {"error": {"message": message, "type": "invalid_request_error", "code": None, "param": None}}


def from_table(answers: Mapping[tuple[int, ...], list[int]]) -> Callable[[list[int]], list[int]]:
    """What follows each known prompt; behind any other one token."""
    return lambda ids: answers.get(tuple(ids), ids[:1])


@contextmanager
def completing(known: Completions) -> Iterator[Completions]:
    lock = threading.Lock()

    class Handler(Replies):
        def do_GET(self) -> None:
            if not known.listing:
                return self.reply(500, error("Cache directory not found"), OFF)
            return self.reply(
                200, {"object": "list", "data": [{"id": name, "object": "model"} for name in known.models]}
            )

        def do_POST(self) -> None:
            body = json.loads(self.body())
            with lock:
                known.asked.append(body)
                known.paths.append(self.path)
                known.keys.append(self.headers["Authorization"])
                known.flying += 1
                known.most = max(known.most, known.flying)
                late = known.troubles and body["max_tokens"] > 1
                trouble: Trouble | bool = known.troubles.pop(0) if late else False
            time.sleep(known.seconds)
            with lock:
                known.flying -= 1
            if trouble is None:
                self.close_connection = True
                self.connection.close()
            elif trouble is False:
                over = known.last is not None and len(known.questions()) > known.last
                self.reply(*((418, error("a teapot")) if over else known.answer(self.path, body)))
            else:
                assert isinstance(trouble, tuple)
                self.reply(*trouble)

    with listening(Handler) as known.port:
        yield known
