"""Traces to training examples: ids and labels in one breath, the collator, and the mask in colour."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from rich.text import Text
from tokenizers import Encoding

from memreason.core.errors import DataError
from memreason.core.trace import Trace
from memreason.encode.codec import Codec
from memreason.encode.pieces import IGNORED, Apart, Example, Rows, put_together, take_apart
from memreason.encode.sparse import segments, visible_since

__all__ = [
    "Example",
    "Examples",
    "Rows",
    "collate",
    "coloured_mask",
    "encode_trace",
    "encode_traces",
    "first_rows",
    "pack",
    "pack_stream",
    "split_packed",
    "stream_examples",
]

CHUNK = 500  # traces encoded in one call: more of them leave the caches, fewer leave cores waiting
AHEAD = 2  # chunks: one is at work in the tokenizer, one waits to be


@dataclass(frozen=True)
class Examples:
    """Encoded examples and how many were left out or cut on the way."""

    rows: Rows
    dropped: int = 0
    cut: int = 0

    @property
    def tokens(self) -> int:
        return len(self.rows.ids)


def encode_trace(codec: Codec, trace: Trace) -> Example:
    """Ids of question and trace; labels are the trace's tokens, the question's are masked (law 4)."""
    return codec.encode_pieces([codec.pieces(trace)])[0]


def encode_traces(codec: Codec, traces: Iterable[Trace], max_length: int, *, cut: bool = False) -> Examples:
    """Encode; an example over `max_length` tokens is dropped, or cut if asked to, and counted.

    Raises DataError if nothing is left.
    """
    traces = list(traces)
    if codec.demonstrations:
        codec.demonstrations.rank(trace.question for trace in traces)
    parts = list(stream_examples(codec, traces, max_length, cut=cut))
    dropped = sum(part.dropped for part in parts)
    if not any(len(part.rows) for part in parts):
        raise DataError(f"no example is left of {dropped}: all exceed train.model_max_length = {max_length} tokens")
    arrays = zip(*((part.rows.ids, part.rows.supervised, part.rows.lengths) for part in parts), strict=True)
    return Examples(Rows(*map(np.concatenate, arrays)), dropped, sum(part.cut for part in parts))


def stream_examples(
    codec: Codec, traces: Iterable[Trace], max_length: int, *, cut: bool = False, chunk: int = CHUNK
) -> Iterator[Examples]:
    """What `encode_traces` makes, `chunk` traces at a time and in their order, held only until the next is asked for.

    AHEAD chunks more are read, so that the tokenizer, which needs no interpreter lock, never waits for Python.
    """
    left = iter(traces)
    chunks = iter(lambda: list(islice(left, chunk)), [])
    started: deque[tuple[Apart, Future[list[Encoding]]]] = deque()

    def finish() -> Examples:
        apart, job = started.popleft()
        return _within(put_together(apart, job.result()), max_length, cut)

    with ThreadPoolExecutor(1) as pool:
        for some in chunks:
            apart = take_apart(map(codec.pieces, some))
            started.append((apart, pool.submit(codec.encode_batch, apart.texts)))
            if len(started) > AHEAD:
                yield finish()
        while started:
            yield finish()


def _within(rows: Rows, max_length: int, cut: bool) -> Examples:
    """Drop, or cut, and count the rows over `max_length`. One whose kept part teaches nothing is dropped."""
    inside = np.arange(len(rows.ids)) - np.repeat(rows.starts, rows.lengths) < max_length
    taught = np.logical_or.reduceat(rows.supervised & inside, rows.starts)
    long = rows.lengths > max_length
    kept = ~long | (taught & cut)
    tokens = inside & np.repeat(kept, rows.lengths)
    short = Rows(rows.ids[tokens], rows.supervised[tokens], np.minimum(rows.lengths, max_length)[kept])
    return Examples(short, int((~kept).sum()), int((long & kept).sum()))


def pack_stream(rows: Rows, length: int, parting: Collection[int] = ()) -> Rows:
    """The published `constant_len` mode: one stream, cut every `length` tokens, questions supervised too.

    Examples end with EOS and see those before them in their piece. Where attention is sparse (`parting`), each begins a
    segment: its question sees itself alone, as when it will be asked, and its blocks all of the piece.
    """
    count = len(rows.ids) - (len(rows.ids) % length == 1)  # one token alone has nothing to foretell
    lengths = np.diff([*range(0, count, length), count])
    since = None
    if parting:
        own = zip(rows, rows.starts.tolist(), strict=True)
        first = [0 if s.planning else at + s.start for row, at in own for s in segments(row["input_ids"], parting)]
        places = np.arange(count)
        since = np.maximum(np.array(first[:count]) - places + places % length, 0).astype(np.int32)
    return Rows(rows.ids[:count], np.ones(count, dtype=bool), lengths, since)


def _since(row: Example, parting: Collection[int]) -> list[int]:
    """Of each token the first position that it may look at, unless the row knows better."""
    return row["since"] if "since" in row else visible_since(row["input_ids"], parting)


def collate(rows: Sequence[Example], pad_id: int, parting: Collection[int] = ()) -> dict[str, torch.Tensor]:
    """Pad on the right. Returns input_ids, attention_mask, labels and shift_labels, each (batch, longest).

    shift_labels holds at each position the label of the next one, which is what its logits are scored against. With
    planning tokens that part what may be seen (sparse.py), `since` holds where that begins.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: Sequence[int], filler: int) -> list[int]:
        return [*values, *[filler] * (longest - len(values))]

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], pad_id) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([padded(row["labels"], IGNORED) for row in rows]),
        "shift_labels": torch.tensor([padded(row["labels"][1:], IGNORED) for row in rows]),
        **({"since": torch.tensor([padded(_since(row, parting), 0) for row in rows])} if parting else {}),
    }


def pack(rows: Sequence[Example], parting: Collection[int] = ()) -> dict[str, torch.Tensor]:
    """All rows end to end, without padding: input_ids, position_ids, labels and shift_labels of (1, tokens).

    Positions start again with each row; cu_seq_lens_q, of (rows + 1,), holds where the rows begin and the last one
    ends, under the name that Transformers' attention functions know. No row's last position has a label. `since` is as
    in `collate`, counted in its own row.
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
        **({"since": torch.cat([torch.tensor(_since(row, parting)) for row in rows])[None]} if parting else {}),
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


def first_rows(batch: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """A batch, packed or padded, of which only the first rows are supervised."""
    kept = dict(batch)
    for name in ("labels", "shift_labels"):
        ends = batch.get("cu_seq_lens_q")
        dim, start = (0, count) if ends is None else (1, int(ends[min(count, len(ends) - 1)]))
        kept[name] = batch[name].clone()
        kept[name].narrow(dim, min(start, kept[name].shape[dim]), max(0, kept[name].shape[dim] - start)).fill_(IGNORED)
    return kept


def coloured_mask(codec: Codec, row: Example) -> Text:
    """Grey: masked. Green: supervised text. Bold magenta: planning tokens."""
    planning = {i for block in codec.blocks.values() for i in block}
    text = Text()
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        style = "bold magenta" if token in planning else "dim" if label == IGNORED else "green"
        text.append(str(codec.tokenizer.decode([token])), style=style)
    return text
