"""Traces to training examples: ids and labels in one breath, the collator, and the mask in colour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rich.text import Text

from memreason.core.errors import DataError
from memreason.core.trace import Trace
from memreason.encode.scheme import Codec

__all__ = [
    "Example",
    "Examples",
    "collate",
    "coloured_mask",
    "encode_trace",
    "encode_traces",
    "pack",
    "pack_stream",
    "split_packed",
]

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
    """Pad on the right. Returns input_ids, attention_mask, labels and shift_labels, each (batch, longest).

    shift_labels holds at each position the label of the next one, which is what its logits are scored against.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: Sequence[int], filler: int) -> list[int]:
        return [*values, *[filler] * (longest - len(values))]

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], pad_id) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([padded(row["labels"], IGNORED) for row in rows]),
        "shift_labels": torch.tensor([padded(row["labels"][1:], IGNORED) for row in rows]),
    }


def pack(rows: Sequence[Example]) -> dict[str, torch.Tensor]:
    """All rows end to end, without padding: input_ids, position_ids, labels and shift_labels of (1, tokens).

    Positions start again with each row; cu_seq_lens_q, of (rows + 1,), holds where the rows begin and the last one
    ends, under the name that Transformers' attention functions know. No row's last position has a label.
    """
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [torch.tensor(row["labels"]) for row in rows]
    ends = torch.tensor([0, *map(len, ids)]).cumsum(0).to(torch.int32)
    following = torch.cat([torch.cat([own[1:], own.new_tensor([IGNORED])]) for own in labels])
    return {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat([torch.arange(len(own)) for own in ids])[None],
        "labels": torch.cat(labels)[None],
        "shift_labels": following[None],
        "cu_seq_lens_q": ends,
    }


def split_packed(batch: Mapping[str, torch.Tensor], limit: int) -> list[dict[str, torch.Tensor]]:
    """A packed batch as pieces of whole rows and about equal size, of at most `limit` tokens where rows allow it."""
    ends = batch["cu_seq_lens_q"].tolist()
    share = ends[-1] / -(-ends[-1] // limit)
    pieces: list[dict[str, torch.Tensor]] = []
    first = 0
    for last in range(1, len(ends)):
        following = ends[min(last + 1, len(ends) - 1)] - ends[first]
        if last < len(ends) - 1 and following <= limit and ends[last] < share * (len(pieces) + 1):
            continue
        start, end = ends[first], ends[last]
        piece = {name: values[:, start:end] for name, values in batch.items() if name != "cu_seq_lens_q"}
        pieces.append({**piece, "cu_seq_lens_q": batch["cu_seq_lens_q"][first : last + 1] - start})
        first = last
    return pieces


def coloured_mask(codec: Codec, row: Example) -> Text:
    """Grey: masked. Green: supervised text. Bold magenta: planning tokens."""
    planning = {i for block in codec.blocks.values() for i in block}
    text = Text()
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        style = "bold magenta" if token in planning else "dim" if label == IGNORED else "green"
        text.append(str(codec.tokenizer.decode([token])), style=style)
    return text
