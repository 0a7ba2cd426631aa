"""A teacher made of our own engine: the model to be trained, or one that was, writes its traces itself.

Self-distillation: only traces with the right answer are kept (the checks see to that), and the model never sees it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memreason.core.labelling import TeacherRecipe
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question, Trace
from memreason.encode.base import load_model, load_tokenizer
from memreason.encode.codec import Codec
from memreason.encode.scheme import TokenScheme
from memreason.finetune.checkpoint import load_checkpoint
from memreason.generate.engines import generate
from memreason.generate.onward import PromptCodec
from memreason.generate.rows import Generation
from memreason.label.request import Reply, Request

__all__ = ["LocalTeacher", "local_teacher"]

Answer = Callable[[Sequence[Request]], list[Reply]]


class LocalTeacher:
    """Gathers what is asked at the same time and answers it as one batch, in a thread of its own."""

    def __init__(self, answer: Answer, size: int) -> None:
        self.answer, self.size = answer, size
        self.waiting: list[tuple[Request, asyncio.Future[Reply]]] = []
        self.working: asyncio.Task[None] | None = None

    async def ask(self, request: Request) -> Reply:
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((request, future))
        if self.working is None or self.working.done():
            self.working = asyncio.create_task(self._work())
        reply: Reply = await future
        return reply

    async def _work(self) -> None:
        while self.waiting:
            await asyncio.sleep(0.02)  # the others that are about to ask
            batch, self.waiting = self.waiting[: self.size], self.waiting[self.size :]
            try:
                replies: list[Reply] | Exception = await asyncio.to_thread(self.answer, [one for one, _ in batch])
            except Exception as error:
                replies = error
            for n, (_, future) in enumerate(batch):
                if future.done():  # a run that is stopped cancels its requests
                    continue
                if isinstance(replies, Exception):
                    future.set_exception(replies)
                else:
                    future.set_result(replies[n])

    async def close(self) -> None:
        if self.working is not None:
            await asyncio.gather(self.working, return_exceptions=True)


def local_teacher(
    path: str, questions: Mapping[str, Question], recipe: TeacherRecipe, sample: int, size: int
) -> LocalTeacher:
    """Of a run or checkpoint, which writes tagged traces as it learnt to, else of a base model by its chat template.

    `questions` by id. Greedy at temperature 0; a question's second try is drawn, as it would else come out the same.
    """
    answer = _of_checkpoint(path, questions) if is_run(path) else _of_base(path, questions)

    def reply(requests: Sequence[Request]) -> list[Reply]:
        made: dict[int, Reply] = {}
        for turn in sorted({request.turn for request in requests}):
            places = [n for n, request in enumerate(requests) if request.turn == turn]
            replies = answer([requests[n] for n in places], _settings(recipe, sample, turn, size))
            made |= zip(places, replies, strict=True)
        return [made[n] for n in range(len(requests))]

    return LocalTeacher(reply, size)


def is_run(path: str) -> bool:
    """Whether a teacher's name is a run or checkpoint of ours."""
    folder = Path(path)
    return (folder / "manifest.json").is_file() or (folder / "token_scheme.json").is_file()


def _settings(recipe: TeacherRecipe, sample: int, turn: int, size: int) -> EvalRecipe:
    temperature = recipe.temperature or (0.7 if turn else 0.0)
    return EvalRecipe(
        decoding="sample" if temperature else "greedy",
        temperature=temperature or 1.0,
        top_p=recipe.top_p or 1.0,
        max_new_tokens=recipe.max_tokens,
        batch_size=size,
        seed=1000 * sample + turn,
    )


def _of_checkpoint(path: str, questions: Mapping[str, Question]) -> Callable[..., list[Reply]]:
    loaded = load_checkpoint(path)

    def answer(requests: Sequence[Request], settings: EvalRecipe) -> list[Reply]:
        made = _generated(loaded.model, loaded.codec, requests, questions, settings)
        return [_reply_of(loaded.codec.parse(one.question, one.ids), len(one.ids)) for one in made]

    return answer


def _reply_of(trace: Trace, tokens: int) -> Reply:
    """A tagged trace in the words of the `self` protocol."""
    lines = [f"{step.kinds[0].capitalize()}: {step.text}" for step in trace.steps if step.kinds]
    said = [f"The answer is: {trace.prediction}"] if trace.prediction else []
    return Reply("\n".join(lines + said), completion_tokens=tokens)


def _generated(
    model: Any, codec: Codec, requests: Sequence[Request], questions: Mapping[str, Question], settings: EvalRecipe
) -> list[Generation]:
    """One generation for each request, in their order."""
    asked = [questions[request.question] for request in requests]
    made = {one.question.id: one for batch in generate(model, codec, asked, settings) for one in batch}
    return [made[request.question] for request in requests]


def _of_base(path: str, questions: Mapping[str, Question]) -> Callable[..., list[Reply]]:
    tokenizer = load_tokenizer(path)
    model: Any = load_model(path)
    plain = Codec(TokenScheme(n_prefix=0, n_special=0), tokenizer)

    def answer(requests: Sequence[Request], settings: EvalRecipe) -> list[Reply]:
        codec = PromptCodec(plain, {request.question: _chat_ids(tokenizer, request) for request in requests})
        return [_reply(one, codec) for one in _generated(model, codec, requests, questions, settings)]

    return answer


def _chat_ids(tokenizer: Any, request: Request) -> list[int]:
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(list(request.messages), add_generation_prompt=True, return_dict=False)
        return list(ids)
    text = "\n\n".join(message["content"] for message in request.messages)
    return list(tokenizer(text + "\n")["input_ids"])


def _reply(generation: Generation, codec: Codec) -> Reply:
    ids = generation.ids
    ended = bool(ids) and ids[-1] == codec.eos_id
    text = codec.decode(ids[:-1] if ended else ids)
    return Reply(text, "stop" if ended else "length", completion_tokens=len(ids))
