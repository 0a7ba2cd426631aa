"""Questions to traces: shared out over processes, kept on disk batch by batch, resumable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from memreason.core.files import append_jsonl, read_jsonl, write_jsonl
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question, Trace
from memreason.encode.codec import Codec
from memreason.generate.engines import generate
from memreason.generate.rows import Engine, Generation, Retrieved

__all__ = ["answer_questions", "read_samples", "with_sources"]

Sample = dict[str, Any]


def answer_questions(
    model: nn.Module,
    codec: Codec,
    questions: Sequence[Question],
    settings: EvalRecipe,
    *,
    label: str = "answering",
    folder: Path | None = None,
    engine: Engine | None = None,
) -> list[Trace]:
    """Generate a trace for each question, shared out over processes, each question answered once.

    `engine` takes the place of the one that the settings name. With a folder, every batch is appended to its samples
    and a second call goes on where the first stopped.
    """
    state = PartialState()
    done = read_samples(folder) if folder else []
    state.wait_for_everyone()  # all have read before one writes
    skip = frozenset(_key(line) for line in done)
    mine = list(questions)[state.process_index :: state.num_processes]
    own = "samples.jsonl" if state.is_main_process else f"samples-{state.process_index}.jsonl"
    if codec.demonstrations:
        codec.demonstrations.rank(mine)
    fresh: list[Sample] = []
    training = model.training
    model.eval()
    left = sum((question.id, n) not in skip for question in mine for n in range(settings.n_samples))
    with tqdm(total=left, desc=label, unit="q", disable=not state.is_main_process) as bar:
        for batch in generate(model, codec, mine, settings, skip=skip, engine=engine):
            lines = [_sample(codec, generation) for generation in batch]
            if folder is not None:
                append_jsonl(folder / own, lines)
            fresh += lines
            bar.update(len(lines))
    model.train(training)
    lines = _in_order(done + (gather_object(fresh) if state.num_processes > 1 else fresh), questions)
    if folder is not None and state.is_main_process:
        _settle(folder, lines)
    state.wait_for_everyone()
    return [Trace.from_json(line) for line in lines]


def read_samples(folder: Path) -> list[Sample]:
    """The samples of an evaluation folder, those of every process."""
    paths = sorted(folder.glob("samples*.jsonl"))
    return [line for path in paths for _, line in read_jsonl(path, torn_tail=True)]


def _key(line: Sample) -> tuple[str, int]:
    return line["id"], line["meta"]["sample"]


def _in_order(lines: list[Sample], questions: Sequence[Question]) -> list[Sample]:
    order = {question.id: number for number, question in enumerate(questions)}
    once = {_key(line): line for line in lines if line["id"] in order}
    return [once[key] for key in sorted(once, key=lambda key: (order[key[0]], key[1]))]


def _settle(folder: Path, lines: list[Sample]) -> None:
    """All is answered: one file in the order of the questions. The other processes' files go last."""
    write_jsonl(folder / "samples.jsonl", lines)
    for path in folder.glob("samples-*.jsonl"):
        path.unlink()


def _sample(codec: Codec, generation: Generation) -> Sample:
    """One line of samples.jsonl: the trace, its ids, and log-probability, entropy and margin of each generated one.

    meta: `sample` (which of n), `given` (ids of the opening block, which has no log-probability), `spans` (for each
    step the place of its ids, so that `ids[a:b]` and `logprobs[a - given : b - given]` are the step's) and `bodies`
    (where its text begins, behind its blocks). Ids of a retrieved line have no figures (null); its step has the
    passage's id as `source`, and `recalled` holds what the model had written there: step, text, sureness.
    """
    trace, recalled = with_sources(codec.parse(generation.question, generation.ids), generation.retrieved)
    if not generation.logprobs:
        trace = replace(trace, faults=("question over the limit",))
    given = len(generation.ids) - len(generation.logprobs)
    return {
        **trace.to_json(),
        "ids": generation.ids,
        "logprobs": _rounded(generation.logprobs, 5),
        "entropies": _rounded(generation.entropies, 4),
        "margins": _rounded(generation.margins, 4),
        "meta": {**generation.question.meta, **trace.meta, **recalled, "sample": generation.sample, "given": given},
    }


def _rounded(values: Sequence[float], digits: int) -> list[float | None]:
    return [round(value, digits) if math.isfinite(value) else None for value in values]


def with_sources(trace: Trace, retrieved: Sequence[Retrieved]) -> tuple[Trace, dict[str, Any]]:
    """A parsed trace with the sources of its retrieved lines, and {"recalled": the model's own lines there}, if any.

    Places of `retrieved` are those among the ids that were parsed.
    """
    steps, recalled = list(trace.steps), []
    for number, (first, last) in enumerate(trace.meta["spans"]):
        for one in retrieved:
            if first <= one.place < last:
                steps[number] = replace(steps[number], source=one.source)
                recalled.append({"step": number, "text": one.own, "sureness": round(one.sureness, 5)})
    return replace(trace, steps=tuple(steps)), {"recalled": recalled} if recalled else {}
