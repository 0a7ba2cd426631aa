"""The engine "openai": an exported model behind any OpenAI-compatible server, a request for each row.

How a server is asked is found out once, with the first row, from the best way to the poorest: the prompt as ids (vLLM,
llama.cpp), as text, as a user's message (the chat template of the exported tokenizer makes the prompt of it); each with
what servers know beyond OpenAI's fields, then without. Ids and log-probabilities are read where the answer holds them.

The engine "chat" asks any chat model, which was not trained here: the question is a user's message, demonstrations are
earlier turns, and of what comes back only the text counts.

What comes as text is read by our tokenizer, which knows the blocks. Trap: these ids spell the same text, but need not
be those that were generated, so they have no figures (nan). What the server made of a prompt is checked by its count
of tokens: a tokenizer without the blocks takes them apart.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from typing import Any, NamedTuple

import openai

from memreason.core.errors import EngineError
from memreason.core.stages import EvalRecipe
from memreason.encode.codec import Codec
from memreason.encode.scheme import ANSWER
from memreason.generate.replies import KEY, ids_of, said
from memreason.generate.rows import Row

__all__ = ["complete"]

TRIES = 8  # again, after 0.5 to 8 s or as long as the server says: 40 s in all, and a failing one has recovered
TIMEOUT = openai.Timeout(3600, connect=5)  # of a question that waits its turn on a slow server
Json = Mapping[str, Any]
# Beyond OpenAI's fields: blocks survive (vLLM), ids come out (vLLM), nothing but the settings shapes the choice.
BEYOND = {
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
}
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0}


def complete(model: Any, codec: Codec, waiting: deque[Row], settings: EvalRecipe) -> Iterator[list[Row]]:
    """Ask for each row, `settings.batch_size` at a time; yield them as they are answered.

    Requests that fail are sent again. Raises EngineError for a server that is not there, serves another model, or
    loses blocks. `model` is not needed.
    """
    rows = [*waiting]
    waiting.clear()
    if not rows:
        return
    key = os.environ.get(KEY, "").strip()
    client = openai.OpenAI(base_url=settings.base_url, api_key=key or "none", max_retries=TRIES, timeout=TIMEOUT)
    pool = ThreadPoolExecutor(settings.batch_size)
    try:
        server = _way_of(client, codec, settings, rows[0])
        yield rows[:1]
        bodies = [server.body(row) for row in rows[1:]]  # all, before one is sent: each may be refused
        flying = {pool.submit(server.answer, *pair): pair[0] for pair in zip(rows[1:], bodies, strict=True)}
        for done in as_completed(flying):
            done.result()
            yield [flying[done]]
    except openai.APIError as error:
        raise EngineError(f"{settings.base_url}: {said(error, key)}") from error
    finally:
        client.close()
        pool.shutdown(cancel_futures=True)


class _Server(NamedTuple):
    """A server, and the way to ask it. `beyond`: with fields that OpenAI's own API does not have."""

    client: openai.OpenAI
    codec: Codec
    settings: EvalRecipe
    model: str | None
    way: str
    beyond: bool

    def body(self, row: Row) -> Json:
        settings, extras = self.settings, {}
        sampling: dict[str, Any] = {
            "greedy": {"temperature": 0.0},
            "sample": {
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "seed": row.random.initial_seed() % 2**31,
            },
            "model-default": {},
        }[settings.decoding]
        if self.beyond:
            chat = {} if self.way == "words" else {"logprobs": True, "top_logprobs": 2}
            figures = chat if self.way in ("chat", "words") else {"logprobs": 2}
            extras = BEYOND | figures | (NEUTRAL if sampling else {})
        named = {"model": self.model} if self.model else {}
        return {**named, **WAYS[self.way](self.codec, row), "max_tokens": row.limit, **sampling, **extras}

    def answer(self, row: Row, body: Json) -> None:
        """Fill in a row. Raises EngineError for a prompt that was read otherwise, and for lost blocks."""
        found, eos = self.post(body), self.codec.eos_id
        try:
            choice, usage = found["choices"][0], found.get("usage") or {}
        except (TypeError, KeyError, IndexError) as error:
            raise EngineError(f"{self.settings.base_url}: no completion came back, but {str(found)[:200]}") from error
        if self.way == "words":
            ids = [*self.codec.encode(self.reply(choice)), *([] if choice.get("finish_reason") == "length" else [eos])]
            row.limit = max(row.limit, len(ids))  # its tokens were counted there: these may be more, and all count
            row.fill(ids, [], eos)
            return
        read = choice.get("prompt_token_ids") or found.get("prompt_token_ids")
        count = len(read) if read else usage.get("prompt_tokens")
        if count != len(row.pending) or (read and list(read) != row.pending):
            raise EngineError(
                f"{self.settings.base_url}: it reads a prompt of {len(row.pending)} tokens as {count}. Is what it "
                "serves the exported model (memreason export), with its tokenizer?"
            )
        spent = usage.get("completion_tokens")
        ids, figures = ids_of(choice, spent, eos) or (self.reread(choice, spent), [])
        if not ids or (choice.get("finish_reason") == "stop" and ids[-1] != eos):
            ids, figures = [*ids, eos], [*figures, {}] if figures else []
        row.fill(ids, figures, eos)

    def post(self, body: Json) -> Any:
        path = "/chat/completions" if "messages" in body else "/completions"
        return self.client.post(path, cast_to=object, body=body)

    def reply(self, choice: Json) -> str:
        return str(choice.get("text") or (choice.get("message") or {}).get("content") or "")

    def reread(self, choice: Json, spent: int | None) -> list[int]:
        """Ids of an answer's text. `spent`: how many were generated."""
        text = self.reply(choice)
        ids: list[int] = self.codec.tokenizer(text, add_special_tokens=False)["input_ids"]
        tagged = self.codec.places.keys() & set(ids) or not self.codec.blocks.get(ANSWER)
        if not tagged and spent is not None and spent - len(ids) >= 2:
            raise EngineError(
                f"{self.settings.base_url}: blocks are lost in its text, which has {len(ids)} of {spent} tokens: "
                f"{text[:60]!r}. It must keep special tokens (llama.cpp: --special), or give token ids, as vLLM does."
            )
        return ids


def _text(codec: Codec, row: Row) -> str:
    """A prompt as text, without what the server's tokenizer puts before it. Raises EngineError where that text would be
    read otherwise: a question that spells a block (law 1)."""
    behind = row.pending[len(codec.opening_special_ids) :]
    text = str(codec.tokenizer.decode(behind, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if list(codec.tokenizer(text)["input_ids"]) != row.pending:
        raise EngineError(
            f"question {row.question.id} ({row.question.text[:50]!r}): it is read as other tokens if it is text. Does "
            "it spell a block? This server takes no ids: leave the question out, or use one that does, such as vLLM"
        )
    return text


def _message(codec: Codec, row: Row) -> str:
    """The part of a prompt that is the user's. Raises EngineError for one that goes on from given lines."""
    # Codec's own: a codec that gives lines (onward.py) calls all of it the question
    if row.pending != Codec.question_ids(codec, row.question) + Codec.opening(codec):
        raise EngineError("this server takes chat messages only, which cannot hold the lines that are given here")
    return codec.scheme.message(row.question)


def _turns(codec: Codec, row: Row) -> list[Json]:
    """A prompt as messages: each demonstration as a turn of its own, then the question, with their instruction."""
    _message(codec, row)  # refuses what goes on from given lines
    turns: list[Json] = []
    for trace in codec.demonstrations.of(row.question) if codec.demonstrations else []:
        turns.append({"role": "user", "content": codec.said(trace.question)})
        turns.append({"role": "assistant", "content": codec.decode(codec.render(trace)[:-1]).strip()})
    return [*turns, {"role": "user", "content": codec.said(row.question)}]


WAYS: dict[str, Callable[[Codec, Row], Json]] = {
    "ids": lambda codec, row: {"prompt": row.pending},
    "text": lambda codec, row: {"prompt": _text(codec, row)},
    "chat": lambda codec, row: {"messages": [{"role": "user", "content": _message(codec, row)}]},
    "words": lambda codec, row: {"messages": _turns(codec, row)},
}
ASKED = {"openai": ("ids", "text", "chat"), "chat": ("words",)}  # the ways of an engine, from the best
REFUSALS = {400, 404, 405, 415, 422, 500, 501}  # of a way to ask; 500 after as many tries as any failure


def _way_of(client: openai.OpenAI, codec: Codec, settings: EvalRecipe, row: Row) -> _Server:
    """The first way that the server takes, the row answered. Raises EngineError if it takes none."""
    listed = _listed(client)
    if len(listed) > 1 and not settings.served_model:
        raise EngineError(f"{settings.base_url}: serves {', '.join(listed)}. Which? Give --eval.served_model NAME")
    name = settings.served_model or (listed[0] if listed else None)
    refused: openai.APIStatusError | None = None
    for way, beyond in product(ASKED[settings.engine], (True, False)):
        server = _Server(client, codec, settings, name, way, beyond)
        try:
            if way in ("ids", "text"):
                _check_blocks(server)
            server.answer(row, server.body(row))
            return server
        except openai.APIStatusError as error:
            if error.status_code not in REFUSALS:
                raise
            refused = refused or error
    assert refused is not None
    serves = f" It serves {', '.join(listed)}, and was asked for {name}." if listed and name not in listed else ""
    raise EngineError(f"{settings.base_url}: {said(refused)}.{serves}") from refused


def _listed(client: openai.OpenAI) -> list[str]:
    """Names of the models that the server has; none where it does not tell, or cannot (Transformers' answers 500 where
    there is no hub cache)."""
    try:
        return [one.id for one in client.with_options(max_retries=2, timeout=30).models.list()]
    except openai.APIStatusError as error:
        if error.status_code not in REFUSALS:
            raise
        return []


def _check_blocks(server: _Server) -> None:
    """All blocks as a text must be as many tokens as they are. Raises EngineError for another tokenizer."""
    codec, tokens = server.codec, server.codec.scheme.tokens
    if not tokens:
        return
    named = {"model": server.model} if server.model else {}
    found = server.post({**named, "prompt": "".join(tokens), "max_tokens": 1})
    count = ((found.get("usage") if isinstance(found, dict) else None) or {}).get("prompt_tokens")
    if count not in (len(tokens), len(tokens) + len(codec.opening_special_ids)):
        raise EngineError(
            f"{server.settings.base_url}: its tokenizer does not hold the blocks: {''.join(tokens)} are {len(tokens)} "
            f"tokens, and it counts {count}. Serve the exported model (memreason export)"
        )
