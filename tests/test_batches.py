"""Traces encoded in batches and streamed: the ids of each text alone, in memory that does not grow."""

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from conftest import FAMILIES, TEXTS, own_traces
from memreason.core.trace import Question, Step, Trace
from memreason.encode.codec import Codec
from memreason.encode.examples import AHEAD, encode_trace, encode_traces, stream_examples
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_tokens


def mixed_traces(count: int) -> list[Trace]:
    """Traces of no, one and several lines, kinds and choices, over awkward texts; some lines come again."""
    nasty = [
        *TEXTS,
        "{question}{choices}",
        "\u0130 \ufb01 e\u0301",
        "  two  spaces\t",
        "<|end|></s><s>",
        "👩‍👩‍👧 \x00",
        "▁a ▁",
    ]
    kinds = [("memory",), ("reason",), (), ("memory", "reason")]
    traces = []
    for n in range(count):
        lines = tuple(Step(kinds[(n + k) % 4], nasty[(n * 3 + k) % len(nasty)]) for k in range(n % 4))
        choices = (nasty[n % 7], f"{n}") if n % 3 else None
        traces.append(Trace(Question(f"{nasty[n % len(nasty)]} {n}", nasty[-n % 5], choices=choices), lines))
    return traces


def one_by_one(codec: Codec, trace: Trace) -> dict[str, list[int]]:
    """An example as law 2 says it, each of its texts encoded alone."""

    def ids(text: str) -> list[int]:
        return codec.text_tokenizer.encode(text, add_special_tokens=False).ids

    def block(*names: str) -> list[int]:
        tokens = [token for name in names for token in codec.blocks.get(name, ())]
        return [i for n, token in enumerate(tokens) for i in ([*codec.separator, token] if n else [token])]

    each = codec.scheme.placement == "each_step"
    question = codec.opening_special_ids + ids(codec.scheme.question_text(trace.question))
    made = [] if each else block("prefix")
    for step in trace.steps:
        made += block("prefix", *(step.kinds or ("assignment",))) if each else []
        made += ids(" " + step.text + "\n")
    made += block("prefix", "answer") if each else []
    made += [*ids(f" The answer is: {trace.answer}"), codec.eos_id]
    return {"input_ids": question + made, "labels": [-100] * len(question) + made}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "scheme",
    [
        TokenScheme(n_prefix=2, n_special=3),
        TokenScheme(placement="only_at_front", block_separator=" "),
        TokenScheme(n_prefix=0, n_special=1, block_separator=" "),
        TokenScheme(n_prefix=0, n_special=0),
    ],
    ids=["blocks", "front", "separated", "plain"],
)
def test_batches_give_the_ids_of_texts_encoded_alone(family: str, scheme: TokenScheme) -> None:
    codec = add_tokens(scheme, FAMILIES[family]())
    traces = mixed_traces(120)
    expected = [one_by_one(codec, trace) for trace in traces]
    assert list(encode_traces(codec, traces, 10_000).rows) == expected
    assert [encode_trace(codec, trace) for trace in traces] == expected
    streamed = [row for part in stream_examples(codec, traces, 10_000, chunk=7) for row in part.rows]
    assert streamed == expected
    for trace, row in zip(traces, expected, strict=True):
        assert codec.question_ids(trace.question) + codec.render(trace) == row["input_ids"]


def test_dropped_and_cut_are_counted_over_chunks(byte_codec: Codec) -> None:
    traces = mixed_traces(60)
    rows = [one_by_one(byte_codec, trace) for trace in traces]
    limit = int(np.percentile([len(row["input_ids"]) for row in rows], 20))
    short = [row for row in rows if len(row["input_ids"]) <= limit]
    dropped = encode_traces(byte_codec, traces, limit)
    assert list(dropped.rows) == short
    assert (dropped.dropped, dropped.cut) == (60 - len(short), 0)
    kept = [{name: values[:limit] for name, values in row.items()} for row in rows]
    taught = [row for row in kept if any(label != -100 for label in row["labels"])]
    cut = encode_traces(byte_codec, traces, limit, cut=True)
    assert list(cut.rows) == taught
    assert (cut.dropped, cut.cut) == (60 - len(taught), len(taught) - len(short))
    assert 0 < cut.dropped < dropped.dropped
    parts = list(stream_examples(byte_codec, traces, limit, cut=True, chunk=7))
    assert (len(parts), sum(part.dropped for part in parts), sum(part.cut for part in parts)) == (
        9,
        cut.dropped,
        cut.cut,
    )
    assert cut.tokens == sum(cut.rows.lengths) == sum(len(row["input_ids"]) for row in taught)


def test_rows_are_a_sequence(byte_codec: Codec) -> None:
    rows = encode_traces(byte_codec, own_traces(5), 512).rows
    assert [len(row["input_ids"]) for row in rows] == rows.lengths.tolist()
    assert rows[-1] == rows[4] == list(rows)[4]
    assert rows[1:3] == [rows[1], rows[2]]
    assert all(type(i) is int for i in rows[0]["input_ids"])
    with pytest.raises(IndexError):
        rows[5]


def test_streaming_reads_no_further_than_it_must(byte_codec: Codec) -> None:
    read = 0

    def counted() -> Iterator[Trace]:
        nonlocal read
        for trace in own_traces(100):
            read += 1
            yield trace

    for number, part in enumerate(stream_examples(byte_codec, counted(), 512, chunk=10), 1):
        assert len(part.rows) == 10
        assert read == min(100, 10 * (number + AHEAD))


def test_streaming_takes_flat_memory(byte_codec: Codec, trace: Trace) -> None:
    def peak(count: int) -> int:
        traces = (trace.with_question(text=f"Is it {n}?") for n in range(count))
        tracemalloc.start()
        for _ in stream_examples(byte_codec, traces, 512, chunk=100):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(500)  # what is made once
    # How far the thread is ahead moves the peak a little; whatever is kept of a trace would make it 20 times as high.
    assert peak(20_000) < 2 * peak(1000)
