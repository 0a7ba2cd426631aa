"""Looking at traces: kinds of segments over an evaluation, and one trace closely, line by line and token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from memreason.core.errors import RecipeError, TaskError
from memreason.core.trace import MEMORY, Question, Trace
from memreason.encode.codec import Codec
from memreason.encode.scheme import ANSWER
from memreason.encode.sparse import visible_since
from memreason.measure.attention import collecting, flow, learnt_tokens
from memreason.measure.flows import Array, Asked, flow_table
from memreason.measure.score import score_trace
from memreason.measure.segments import FIRST, LEARNT, QUESTION, Part, in_order, segments

__all__ = ["Closeup", "Mark", "close_up", "overview"]

SHOWN = 120  # tokens up to which a question is drawn token by token
LONGEST = 240  # tokens of a trace that are drawn one by one, its last ones
TOP = 3  # heads that are drawn where none is named
Head = tuple[int, int | None]  # layer, head or the mean over heads


class Mark(NamedTuple):
    """A row or a column: what stands there, and what it belongs to."""

    text: str
    part: Part


class Closeup(NamedTuple):
    """Attention inside one trace. `steps` is (lines, lines), the mean over layers and heads; each map is (trace tokens,
    tokens), its rows the last of `tokens`."""

    question: Question
    trace: Trace
    lines: list[Mark]
    steps: Array
    tokens: list[Mark]
    maps: dict[Head, Array]


def overview(model: Any, codec: Codec, samples: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Array]]:
    """What goes into attention.json and attention.npz of an evaluation, given the lines of its samples.jsonl.

    Questions that left no room for an answer are counted in `left_out`. Raises ModelError for a model whose attention
    cannot be looked at.
    """
    whole = [line for line in samples if len(line["ids"]) > line["meta"]["given"]]
    if not whole:
        raise TaskError("no question of this evaluation has a trace to look at")
    traces = [Trace.from_json(line) for line in whole]
    learnt = learnt_tokens(model)
    read = [
        segments(codec, trace.question, line["ids"], learnt=learnt) for trace, line in zip(traces, whole, strict=True)
    ]
    parts = in_order(part.of_kind() for _, found in read for part in found)
    place = {part: n for n, part in enumerate(parts)}

    def asked() -> Iterator[Asked]:
        for trace, (ids, found) in zip(traces, tqdm(read, "attention", unit="q"), strict=True):
            labels = [place[part.of_kind()] for part in found]
            right = score_trace(trace).verdict == "correct"
            alike = (trace.question.meta.get("form"), *(step.kinds for step in trace.steps))
            yield Asked(
                flow(model, ids, labels, len(parts), since=_since(codec, ids)), right, trace.question.group, alike
            )

    with collecting(model, read[0][0]):
        table, arrays = flow_table(parts, asked())
    return {**table, "left_out": len(samples) - len(whole)}, arrays


def close_up(
    model: Any,
    codec: Codec,
    question: Question,
    ids: Sequence[int],
    *,
    layers: Sequence[int] = (),
    heads: Sequence[int] = (),
) -> Closeup:
    """One trace, given its ids: each line looking at each, and the maps of the layers and heads that are named.

    Layers without heads give means over heads, heads without layers those of the last. With neither: the mean of the
    last layer, and the heads by which the answer most looks at memory. Raises RecipeError for one that does not exist.
    """
    fed, parts = segments(codec, question, ids, learnt=learnt_tokens(model))
    lines = list(dict.fromkeys(parts))
    tokens, labels = _shown(codec, fed, parts)
    rows = sum(part not in (FIRST, LEARNT, QUESTION) for part in parts[-LONGEST:])
    if not rows:
        raise TaskError(f"{question.text[:60]!r}: there is no trace; the question leaves no room for one")
    since = _since(codec, fed)
    with collecting(model, fed):
        mass = flow(model, fed, [lines.index(part) for part in parts], len(lines), since=since).mass
        chosen = _chosen(mass, lines, layers, heads)
        maps: dict[Head, Array] = {}
        for layer in dict.fromkeys(layer for layer, _ in chosen):
            some = [head for one, head in chosen if one == layer]
            found = flow(model, fed, labels, len(tokens), pick=_picker(layer, some), since=since).mass[0]
            maps |= {(layer, head): one[-rows:] for head, one in zip(some, found, strict=True)}
    marks = [Mark(_text(codec, fed, parts, part), part) for part in lines]
    in_turn = {one: maps[one] for one in chosen}
    return Closeup(question, codec.parse(question, ids), marks, mass.mean((0, 1)), tokens, in_turn)


def _since(codec: Codec, ids: Sequence[int]) -> list[int] | None:
    return visible_since(ids, codec.parting) if codec.parting else None


def _picker(layer: int, heads: Sequence[int | None]) -> Any:
    def pick(number: int, weights: Tensor) -> Tensor | None:
        if number != layer:
            return None
        return torch.stack([weights.mean(0) if head is None else weights[head] for head in heads])

    return pick


def _chosen(mass: Array, lines: Sequence[Part], layers: Sequence[int], heads: Sequence[int]) -> list[Head]:
    count, width = mass.shape[:2]
    problems = [f"--layer {n}: the model has layers 0 to {count - 1}" for n in layers if not 0 <= n < count]
    problems += [f"--head {n}: a layer has heads 0 to {width - 1}" for n in heads if not 0 <= n < width]
    if problems:
        raise RecipeError(problems, "attention")
    if layers or heads:
        named: Sequence[int | None] = heads or (None,)
        return [(layer, head) for layer in layers or (count - 1,) for head in named]
    last: list[Head] = [(count - 1, None)]
    memory = [n for n, part in enumerate(lines) if part.kind == MEMORY and not part.block]
    if not memory or Part(ANSWER) not in lines:
        return last
    looked = mass[:, :, lines.index(Part(ANSWER)), memory].sum(-1)
    places = (-looked).argsort(axis=None, kind="stable")[:TOP]
    return last + [(int(place // width), int(place % width)) for place in places]


def _shown(codec: Codec, ids: Sequence[int], parts: Sequence[Part]) -> tuple[list[Mark], list[int]]:
    """What stands along the axes of a map, and the place there of each position.

    If all are more than SHOWN, the question is one mark; of a trace longer than LONGEST what goes before is one too.
    """
    learnt, size = len(parts) - len(ids), len(parts)
    asked = next((n for n, part in enumerate(parts) if part not in (FIRST, LEARNT, QUESTION)), size)
    marks: list[Mark] = []
    labels: list[int] = []
    counts: dict[str, int] = {}
    for n, part in enumerate(parts):
        whole = LEARNT.name if 0 < n < learnt else ""
        whole = QUESTION.name if max(1, learnt) <= n < asked and size > SHOWN else whole
        whole = "lines before" if asked <= n < size - LONGEST else whole
        if not whole or whole not in counts:
            marks.append(Mark("" if n < learnt else _token(codec, ids[n - learnt]), part))
        if whole:
            counts[whole] = counts.get(whole, 0) + 1
            marks[-1] = Mark(f"{whole}: {counts[whole]} tokens", QUESTION if whole == QUESTION.name else Part(whole))
        labels.append(len(marks) - 1)
    return marks, labels


def _token(codec: Codec, token: int) -> str:
    return str(codec.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _text(codec: Codec, ids: Sequence[int], parts: Sequence[Part], wanted: Part) -> str:
    """What a segment says."""
    own = [token for token, part in zip(ids, parts[len(parts) - len(ids) :], strict=True) if part == wanted]
    return str(codec.tokenizer.decode(own, clean_up_tokenization_spaces=False)).strip()
