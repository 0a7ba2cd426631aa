"""Generating on from steps that are given: what a trace would have become with other lines above."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from torch import nn

from memreason.core.errors import ModelError
from memreason.core.recipe import EvalRecipe
from memreason.core.trace import Question, Trace
from memreason.encode.scheme import Codec
from memreason.generate.engine import generate

__all__ = ["PromptCodec", "continue_traces"]


class PromptCodec(Codec):
    """A codec that gives each question, by its id, a prompt of its own."""

    def __init__(self, codec: Codec, prompts: Mapping[str, Sequence[int]]) -> None:
        self.__dict__.update(codec.__dict__)  # the same tables: nothing is made anew
        self.prompts = prompts

    def question_ids(self, question: Question) -> list[int]:
        return list(self.prompts[question.id])


def continue_traces(model: nn.Module, codec: Codec, begun: Sequence[Trace], settings: EvalRecipe) -> Iterator[Trace]:
    """Each question once, its given steps kept and everything behind them generated. In no particular order.

    Raises ModelError for a scheme whose lines carry no blocks: a given line would not say what it is.
    """
    if codec.scheme.placement != "each_step":
        raise ModelError(f"placement {codec.scheme.placement}: lines can be given only where each carries its block")
    given = {trace.question.id: codec.step_ids(trace.steps) for trace in begun}
    asked = [trace.question for trace in begun]
    prompts = {question.id: codec.question_ids(question) + given[question.id] for question in asked}
    batches = generate(model, PromptCodec(codec, prompts), asked, settings.model_copy(update={"n_samples": 1}))
    for one in chain.from_iterable(batches):
        yield codec.parse(one.question, given[one.question.id] + one.ids)
