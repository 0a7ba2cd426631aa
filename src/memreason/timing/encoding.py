"""Encoding: streamed traces against bare `encode_batch_fast` on the same texts, and the memory that streaming takes.

Both encode the same slices of traces in turn, in calls of the same size. The bare call gets its texts ready made and
throws its encodings away. With `vary_lines` no text but answers comes twice; without, lines come again as they do in
atlas, and are encoded once a chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import psutil

from memreason.core.recipe import load_recipe
from memreason.core.trace import Step, Trace
from memreason.data.atlas import make_atlas
from memreason.encode.base import load_tokenizer
from memreason.encode.codec import Codec
from memreason.encode.examples import CHUNK, stream_examples
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_tokens

__all__ = ["measure"]

SLICES = 10
MAX_LENGTH = 1024


def make_traces(count: int, *, vary_lines: bool) -> Iterator[Trace]:
    """Traces of atlas over and over, with a number behind each question and, if asked to, each line."""
    known = make_atlas("train", 2000)
    for n in range(count):
        trace = known[n % len(known)]
        question = replace(trace.question, text=f"{trace.question.text} ({n})", id=str(n))
        lines = tuple(Step(step.kinds, f"{step.text} ({n})") for step in trace.steps) if vary_lines else trace.steps
        yield Trace(question, lines)


def text_chunks(codec: Codec, traces: Sequence[Trace], chunk: int) -> list[list[str]]:
    """The texts that are encoded in one call, for each chunk of traces."""
    rows = [[part for part, _ in codec.pieces(trace) if isinstance(part, str)] for trace in traces]
    return [[text for row in rows[start : start + chunk] for text in row] for start in range(0, len(rows), chunk)]


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the clock, and of all cores together: the second hardly minds what else the machine does."""
    start, spent = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - spent


def measure_rates(codec: Codec, count: int = 100_000, *, vary_lines: bool = True, chunk: int = CHUNK) -> dict[str, Any]:
    """Traces a second, bare and streamed, and their ratio: median and extremes over the slices, by clock and CPU."""
    traces = make_traces(count, vary_lines=vary_lines)
    spent: dict[str, list[tuple[float, float]]] = {"bare": [], "streamed": []}

    def encode_bare(texts: list[list[str]]) -> None:
        for some in texts:
            codec.text_tokenizer.encode_batch_fast(some, add_special_tokens=False)

    def encode_streamed(some: list[Trace]) -> None:
        for _ in stream_examples(codec, some, MAX_LENGTH, chunk=chunk):
            pass

    for turn in range(SLICES):
        some = list(islice(traces, count // SLICES))
        texts = text_chunks(codec, some, chunk)
        work = [("bare", partial(encode_bare, texts)), ("streamed", partial(encode_streamed, some))]
        # The second finds the words of the first in the tokenizer's cache: they take turns at it.
        for name, encode in work if turn % 2 else reversed(work):
            spent[name].append(seconds(encode))
    bare, streamed = (np.array(spent[name]) for name in ("bare", "streamed"))  # (slices, clock and CPU)
    ratios = bare / streamed
    return {
        "traces": count,
        "bare": float(count / bare[:, 0].sum()),
        "streamed": float(count / streamed[:, 0].sum()),
        "ratio": float(np.median(ratios[:, 0])),
        "ratios": [float(ratios[:, 0].min()), float(ratios[:, 0].max())],
        "cpu_ratio": float(np.median(ratios[:, 1])),
    }


def measure_memory(codec: Codec, count: int = 100_000) -> dict[str, Any]:
    """Bytes of resident memory that streaming grew by after its first tenth, and that keeping all rows would take."""
    resident, kept, done = [], 0, 0
    process = psutil.Process()
    for part in stream_examples(codec, make_traces(count, vary_lines=True), MAX_LENGTH):
        done += len(part.rows)
        kept += sum(array.nbytes for array in (part.rows.ids, part.rows.supervised, part.rows.lengths))
        if done >= count // 10:
            resident.append(process.memory_info().rss)
    return {"traces": done, "growth": max(resident) - resident[0], "resident": max(resident), "kept": kept}


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Traces to ids, streamed, against bare `encode_batch_fast` on the same texts."""
    recipe = load_recipe(spec["recipe"])
    codec = add_tokens(TokenScheme(), load_tokenizer(recipe.model.base))
    memory = measure_memory(codec, spec["traces"])
    return {**measure_rates(codec, spec["traces"]), "memory": memory}
