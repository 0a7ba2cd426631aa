"""One thread that owns the model and answers for ever: rows of several users join between two passes."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from memreason.core.errors import MemreasonError
from memreason.core.stages import EvalRecipe
from memreason.core.trace import MEMORY, Question, Step, Trace
from memreason.data.atlas import memory_line_true
from memreason.encode.codec import Codec
from memreason.generate.answer import with_sources
from memreason.generate.decode import decode
from memreason.generate.onward import PromptCodec, begun_ids
from memreason.generate.rows import Row, start
from memreason.measure.confidence import line_figures
from memreason.measure.score import score_trace

__all__ = ["UNKNOWN", "Live", "Request"]

log = logging.getLogger("memreason")
UNKNOWN = "?"  # stands for the gold answer of a user's own question
NO_PHRASE = "answer line without its phrase"  # a fault that Codec.parse names


class Request:
    """A question that a client waits for: its row, the ids given before what is generated, and how to wake the client.

    `gone` is set when the client left, `ended` when nothing more will come, `error` if the model failed.
    """

    def __init__(
        self, codec: Codec, question: Question, steps: Sequence[Step] | None, settings: EvalRecipe, room: int | None
    ) -> None:
        self.codec, self.question = codec, question
        self.gone = self.ended = False
        self.error, self.began = "", time.monotonic()
        self.wake: Callable[[], None] = _nobody
        self.given = codec.opening() if steps is None else begun_ids(codec, Trace(question, tuple(steps)))
        if steps is not None:
            codec = PromptCodec(codec, {question.id: codec.question_ids(question) + self.given})
        self.row: Row = start(codec, question, 0, settings, room, self._leaves)

    def _leaves(self, _: Sequence[int]) -> bool:
        """Asked at each token, also in the middle of a pass (a whole batch, where Transformers decodes)."""
        self.wake()
        return self.gone

    def mark(self) -> tuple[int, int]:
        """Differs where there is more to tell than before."""
        return len(self.row.taken), len(self.row.retrieved)

    def so_far(self) -> dict[str, Any]:
        """What stands there by now, as one JSON object.

        Lines that were given or retrieved have no confidence; of a retrieved one `own` is what the model had written.
        `fact` is whether a whole memory line is true, where that is known (atlas); `verdict` that of the whole answer,
        where the gold one is known; `begun` whether the model has written anything yet.
        """
        ended = self.ended  # before the ids: what is called done must be whole
        taken, given = list(self.row.taken), len(self.given)
        parsed = self.codec.parse(self.question, [*self.given, *(one.token for one in taken)])
        places = [one._replace(place=given + one.place, end=given + one.end) for one in self.row.retrieved]
        trace, recalled = with_sources(parsed, places)
        own = {one["step"]: one["text"] for one in recalled.get("recalled", ())}
        begun = not ended and NO_PHRASE in trace.faults  # of the answer's phrase only a part stands there
        names = {"logprobs": "logprob", "entropies": "entropy", "margins": "margin"}
        figures = {name: [_known(getattr(one, field)) for one in taken] for name, field in names.items()}
        found = line_figures({"meta": {**trace.meta, "given": given}, **figures})
        return {
            "id": self.question.id,
            "question": self.question.text,
            "choices": list(self.question.choices) if self.question.choices else None,
            "answer": None if self.question.answer == UNKNOWN else self.question.answer,
            "verdict": score_trace(trace).verdict if ended and self.question.answer != UNKNOWN else None,
            "steps": [self._line(trace, place, line["logprob"], own) for place, line in enumerate(found)],
            "prediction": "" if begun else trace.prediction,
            "faults": list(trace.faults) if ended else [],
            "begun": bool(taken),
            "done": ended,
            **({"error": self.error} if self.error else {}),
        }

    def _line(self, trace: Trace, place: int, logprob: float | None, own: Mapping[int, str]) -> dict[str, Any]:
        step, whole = trace.steps[place], self.ended or trace.prediction or place < len(trace.steps) - 1
        line = {**step.to_json(), "confidence": None if logprob is None else round(math.exp(logprob), 4)}
        line |= {"own": own[place]} if place in own else {}
        if MEMORY in step.kinds:
            line["fact"] = memory_line_true(step.text) if whole and self.question.task == "atlas" else None
        return line


def _known(value: float) -> float | None:
    """None for nan: of a token that the model did not choose nothing is known."""
    return None if math.isnan(value) else value


def _nobody() -> None:
    """Wakes no one."""


class Live:
    """The model at work. `limit` is how many requests may be open, in flight or waiting for a place; `engine` is
    `decode`, or what retrieves memory lines on the way (generate/recall.py)."""

    def __init__(
        self,
        model: Any,
        codec: Codec,
        settings: EvalRecipe,
        *,
        limit: int,
        engine: Callable[..., Iterator[list[Row]]] = decode,
    ) -> None:
        self.model, self.codec, self.limit, self.engine = model, codec, limit, engine
        self.settings = settings.model_copy(update={"n_samples": 1})
        self.room = getattr(model.config, "max_position_embeddings", None)
        self.open: list[Request] = []
        self.waiting: deque[Row] = deque()
        self.closing = False
        self.seconds = 1.0  # that an answer took lately
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="memreason-live", daemon=True)
        self.thread.start()

    def request(self, question: Question, steps: Sequence[Step] | None = None) -> Request:
        """A request that is not open yet; with steps, one that goes on behind them. Its row's limit is below 1 if the
        question leaves no room for an answer. Raises ModelError if lines of this scheme carry no blocks or not these.
        """
        return Request(self.codec, question, steps, self.settings, self.room)

    def put(self, request: Request, wake: Callable[[], None]) -> bool:
        """Open a request; False if as many are open as may be, or none is taken any more.

        `wake` is called from the thread of the model at each token, and when the row has ended.
        """
        with self.changed:
            if self.closing or len(self.open) >= self.limit:
                return False
            request.wake = wake
            self.open.append(request)
            self.waiting.append(request.row)
            self.changed.notify()
        return True

    def leave(self, request: Request) -> None:
        """The client is gone: its row ends with the next token."""
        with self.changed:
            request.gone, request.wake = True, _nobody
            self.changed.notify()

    def retry_after(self) -> int:
        """Seconds after which a place may be free."""
        turns = len(self.open) / self.settings.batch_size
        return max(1, math.ceil(self.seconds * turns))

    def close(self) -> None:
        """Take no new requests; the thread ends when the open ones have ended."""
        with self.changed:
            self.closing = True
            self.changed.notify()

    def drop(self) -> None:
        """End what is open with its next token."""
        self.close()
        for request in list(self.open):
            self.leave(request)

    def _work(self) -> None:
        again = True
        while again:
            try:
                for ended in self.engine(self.model, self.codec, self.waiting, self.settings, more=self._more):
                    self._tell(ended)
                again = False
            except Exception as error:  # what one request does must not end the service: all are told, it goes on
                log.exception("the model failed")
                ours = isinstance(error, MemreasonError)  # such as of a retrieval server
                self._fail(str(error) if ours else f"the model failed: {type(error).__name__}: {error}")
                again = self._more()

    def _more(self) -> bool:
        """Wait until a row waits for a place, or none will any more."""
        with self.changed:
            self._drop_gone()
            while not self.waiting and not self.closing:
                self.changed.wait()
                self._drop_gone()
            return bool(self.waiting)

    def _drop_gone(self) -> None:
        """Requests whose clients left before a place was free. Only this thread takes rows out of the queue."""
        waiting = {id(row) for row in self.waiting}
        for request in [one for one in self.open if one.gone and id(one.row) in waiting]:
            self._end(request)
        kept = [row for row in self.waiting if id(row) in {id(one.row) for one in self.open}]
        if len(kept) < len(self.waiting):
            self.waiting.clear()
            self.waiting.extend(kept)

    def _tell(self, ended: Sequence[Row]) -> None:
        """After a pass: end what ended and wake every client."""
        with self.changed:
            done = {id(row) for row in ended}
            told = list(self.open)
            for request in told:
                if id(request.row) in done:
                    self.seconds += (time.monotonic() - request.began - self.seconds) / 8
                    self._end(request)
            self._drop_gone()
        for request in told:
            request.wake()

    def _end(self, request: Request) -> None:
        request.ended = True
        self.open.remove(request)

    def _fail(self, reason: str) -> None:
        """Every open request ends with this reason."""
        with self.changed:
            self.waiting.clear()
            told = list(self.open)
            for request in told:
                request.error = reason
                self._end(request)
        for request in told:
            request.wake()
