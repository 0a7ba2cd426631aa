"""Traces to training examples: ids and labels in one breath, the collator, and the mask in colour."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from rich.text import Text

from memreason.core.errors import DataError
from memreason.core.trace import Trace
from memreason.encode.scheme import Codec

__all__ = ["Example", "Examples", "collate", "coloured_mask", "encode_trace", "encode_traces", "pack_stream"]

IGNORED = -100
Example = dict[str, list[int]]


@dataclass
class Examples:
    """Encoded examples and what was left out or cut on the way."""

    rows: list[Example] = field(default_factory=list)
    dropped: int = 0
    cut: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(row["input_ids"]) for row in self.rows)


def encode_trace(codec: Codec, trace: Trace) -> Example:
    """Ids of question and trace; labels are the trace's tokens, the question's are masked (law 4)."""
    ids: list[int] = []
    labels: list[int] = []

    def add(tokens: Sequence[int], supervised: bool) -> None:
        ids.extend(tokens)
        labels.extend(tokens if supervised else [IGNORED] * len(tokens))

    add(codec.question_ids(trace.question), False)
    add(codec.render(trace), True)
    return {"input_ids": ids, "labels": labels}


def encode_traces(codec: Codec, traces: Iterable[Trace], max_length: int, *, cut: bool = False) -> Examples:
    """Encode; an example over `max_length` tokens is dropped, or cut if asked to, and counted.

    Raises DataError if nothing is left.
    """
    examples = Examples()
    for trace in traces:
        row = encode_trace(codec, trace)
        if len(row["input_ids"]) > max_length:
            row = {key: values[:max_length] for key, values in row.items()}
            if not cut or all(label == IGNORED for label in row["labels"]):
                examples.dropped += 1
                continue
            examples.cut += 1
        examples.rows.append(row)
    if not examples.rows:
        raise DataError(
            f"no example is left of {examples.dropped}: all exceed train.model_max_length = {max_length} tokens"
        )
    return examples


def pack_stream(rows: Sequence[Example], length: int) -> list[Example]:
    """The published `constant_len` mode: one stream, cut every `length` tokens, questions supervised too."""
    stream = [token for row in rows for token in row["input_ids"]]
    pieces = [stream[start : start + length] for start in range(0, len(stream), length)]
    return [{"input_ids": piece, "labels": list(piece)} for piece in pieces if len(piece) > 1]


def collate(rows: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad on the right. Returns input_ids, attention_mask and labels, each (batch, longest)."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: Sequence[int], filler: int) -> list[int]:
        return [*values, *[filler] * (longest - len(values))]

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], pad_id) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([padded(row["labels"], IGNORED) for row in rows]),
    }


def coloured_mask(codec: Codec, row: Example) -> Text:
    """Grey: masked. Green: supervised text. Bold magenta: planning tokens."""
    planning = {i for block in codec.blocks.values() for i in block}
    text = Text()
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        style = "bold magenta" if token in planning else "dim" if label == IGNORED else "green"
        text.append(str(codec.tokenizer.decode([token])), style=style)
    return text
