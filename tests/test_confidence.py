"""How sure the model was of each line: figures by hand, AUROC against pairs counted, bins that hold every line."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch

from memreason.core.trace import Question, Step, Trace
from memreason.encode.codec import Codec
from memreason.generate.choose import take
from memreason.measure.confidence import auroc, checked_lines, confidence_table, line_figures


def sample(codec: Codec, trace: Trace, logprobs: list[float], **meta: Any) -> dict[str, Any]:
    """A line of samples.jsonl whose tokens have these log-probabilities, in turn."""
    ids = codec.render(trace)
    given = len(codec.opening())
    drawn = list(itertools.islice(itertools.cycle(logprobs), len(ids) - given))
    parsed = codec.parse(trace.question, ids)
    figures = {"logprobs": drawn, "entropies": [-value for value in drawn], "margins": [1 + value for value in drawn]}
    return {**parsed.to_json(), "ids": ids, **figures, "meta": {**parsed.meta, "given": given, **meta}}


def test_a_lines_figures_are_those_of_its_text_alone(codec: Codec, trace: Trace) -> None:
    one = sample(codec, trace, [0.0])
    for step, (start, end), body in zip(trace.steps, one["meta"]["spans"], one["meta"]["bodies"], strict=True):
        assert one["ids"][start:body] == list(codec.block("prefix", *step.kinds))
        assert codec.decode(one["ids"][body:end]).strip() == step.text
        given = one["meta"]["given"]
        one["logprobs"][start - given : body - given] = [-99.0] * (body - max(start, given))  # of blocks: never read
        one["logprobs"][body - given : end - given] = [-0.5] * (end - body)
    assert [line["logprob"] for line in line_figures(one)] == pytest.approx([-0.5, -0.5])
    assert [line["entropy"] for line in line_figures(one)] == pytest.approx([0.0, 0.0])


def test_lines_that_were_not_generated_have_no_figures(byte_codec: Codec, trace: Trace) -> None:
    one = sample(byte_codec, trace, [-0.1])
    body, (_, end) = one["meta"]["bodies"][0], one["meta"]["spans"][0]
    for name in ("logprobs", "entropies", "margins"):
        one[name][body - 1 : end - 1] = [None] * (end - body)
    first, second = line_figures(one)
    assert first == {"logprob": None, "entropy": None, "margin": None}
    assert second["logprob"] == pytest.approx(-0.1)


def test_auroc_counts_pairs() -> None:
    drawn = random.Random(0)
    for _ in range(50):
        scores = [drawn.choice([0.1, 0.2, 0.3, 0.4]) for _ in range(12)]
        which = [drawn.random() < 0.4 for _ in range(12)]
        pairs = [
            (a, b) for a, x in zip(scores, which, strict=True) for b, y in zip(scores, which, strict=True) if x > y
        ]
        wanted = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs) if pairs else None
        assert auroc(scores, which) == (None if wanted is None else pytest.approx(wanted))


def lines(codec: Codec, count: int, sure: dict[bool, float]) -> list[dict[str, Any]]:
    """Samples about Peru, every third of which is false; `sure` gives the log-probability of a true and a false one."""
    found = []
    for n in range(count):
        true = n % 3 > 0
        text = f"The capital of Peru is {'Lima' if true else 'Cusco'}."
        trace = Trace(Question(f"Is it Lima? {n}", "True"), (Step(("memory",), text), Step(("reason",), "So it is.")))
        found.append(sample(codec, trace, [sure[true] - 0.001 * n], group=f"group {n % 5}"))
    return found


def test_sureness_that_tells_false_lines_apart(byte_codec: Codec) -> None:
    found = confidence_table(lines(byte_codec, 30, {True: -0.1, False: -1.0}))
    assert found is not None
    assert (found["n"], found["false"], found["auroc"], found["auroc_interval"]) == (30, 10, 1.0, [1.0, 1.0])
    assert {name: one["auroc"] for name, one in found["aurocs"].items()} == dict.fromkeys(found["aurocs"], 1.0)
    bins = found["bins"]
    assert sum(one["n"] for one in bins) == 30 and [one["share_true"] for one in bins] == sorted(
        one["share_true"] for one in bins
    )
    assert all(one["low"] <= one["mean_confidence"] <= one["high"] for one in bins)
    assert bins[0]["low"] == pytest.approx(math.exp(-1.027))
    turned = confidence_table(lines(byte_codec, 30, {True: -1.0, False: -0.1}))
    assert turned is not None and turned["auroc"] == 0.0


def test_only_lines_that_can_be_checked_count(byte_codec: Codec) -> None:
    (one,) = lines(byte_codec, 1, {True: -0.1, False: -0.1})
    assert [line["text"] for line in checked_lines([one])] == ["The capital of Peru is Cusco."]
    one["steps"][0]["source"] = "a passage"
    assert confidence_table([one]) is None
    unknown = Trace(Question("Is it?", "True"), (Step(("memory",), "Cats purr."),))
    assert confidence_table([sample(byte_codec, unknown, [-0.1])]) is None


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_entropy_and_margin_of_a_token(rows: int) -> None:
    torch.manual_seed(rows)
    logits = torch.randn(rows, 40) * 3
    chosen = torch.randint(0, 40, (rows,))
    probabilities = logits.double().softmax(dim=-1)
    for n, one in enumerate(take(logits.clone(), chosen.tolist(), lambda _, points: torch.tensor(points))):
        mine = probabilities[n]
        other = float(mine[torch.arange(40) != chosen[n]].max())
        assert one.token == int(chosen[n])
        assert one.logprob == pytest.approx(float(mine[chosen[n]].log()), abs=1e-5)
        assert one.entropy == pytest.approx(float(-(mine * mine.log()).sum()), abs=1e-5)
        assert one.margin == pytest.approx(float(mine[chosen[n]]) - other, abs=1e-5)
