"""Generating on from ids or steps that are given: what a trace would have become with other lines above."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from torch import nn

from memreason.core.errors import ModelError
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question, Trace
from memreason.encode.codec import Codec
from memreason.generate.engines import generate

__all__ = ["PromptCodec", "begun_ids", "continue_traces"]


class PromptCodec(Codec):
    """A codec that gives each question, by its id, a prompt of its own, with nothing put behind it."""

    def __init__(self, codec: Codec, prompts: Mapping[str, Sequence[int]]) -> None:
        self.__dict__.update(codec.__dict__)  # the same tables: nothing is made anew
        self.prompts = prompts

    def question_ids(self, question: Question) -> list[int]:
        return list(self.prompts[question.id])

    def opening(self) -> list[int]:
        return []


def begun_ids(codec: Codec, trace: Trace) -> list[int]:
    """Ids of a trace's steps and of the block that opens what comes next.

    Raises ModelError for a scheme whose lines carry no blocks: a given line would not say what it is.
    """
    if codec.scheme.placement != "each_step":
        raise ModelError(f"placement {codec.scheme.placement}: lines can be given only where each carries its block")
    return codec.step_ids(trace.steps) + codec.opening()


def continue_traces(
    model: nn.Module,
    codec: Codec,
    questions: Sequence[Question],
    given: Mapping[str, Sequence[int]],
    settings: EvalRecipe,
) -> Iterator[Trace]:
    """Each question once, in no particular order: the ids given for it (by its id) and what is generated behind."""
    prompts = {question.id: codec.question_ids(question) + list(given[question.id]) for question in questions}
    once = settings.model_copy(update={"n_samples": 1})
    for one in chain.from_iterable(generate(model, PromptCodec(codec, prompts), questions, once)):
        yield codec.parse(one.question, [*given[one.question.id], *one.ids])
