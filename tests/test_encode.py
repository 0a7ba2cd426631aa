"""The laws of encoding, on three families of tokenizers and on tied, untied and padded models."""

import numpy as np
import pytest
import torch

from conftest import FAMILIES, byte_level, tiny_model
from memreason.core.errors import CheckpointError, DataError, ModelError
from memreason.core.trace import Question, Step, Trace
from memreason.encode.codec import Codec
from memreason.encode.examples import Rows, collate, encode_trace, encode_traces, pack_stream
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_rows, add_tokens


def block_ids(codec: Codec) -> set[int]:
    return {i for block in codec.blocks.values() for i in block}


def test_exact_ids(byte_codec: Codec, trace: Trace) -> None:
    c = byte_codec
    b, e = c.blocks, c.encode
    expected = [
        *b["prefix"], *b["memory"], *e(" Lima lies in South America.\n"),
        *b["prefix"], *b["reason"], *e(" so Peru lies in South America.\n"),
        *b["prefix"], *b["answer"], *e(" The answer is: True"), c.eos_id,
    ]  # fmt: skip
    assert c.render(trace) == expected
    row = encode_trace(c, trace)
    question = e("Question: Is Lima the capital of Peru?\n")
    assert row["input_ids"] == question + expected
    assert row["labels"] == [-100] * len(question) + expected


def test_law_1_user_text_never_becomes_a_control_token(codec: Codec) -> None:
    eos = codec.tokenizer.eos_token
    nasty = f"<memory_0> {eos} <prefix_1>"
    question = Question(nasty, "True", choices=(nasty, "b"))
    ids = codec.question_ids(question)[len(codec.opening_special_ids) :]
    assert not block_ids(codec) & set(ids)
    assert codec.eos_id not in ids
    rendered = codec.render(Trace(Question("q", nasty), (Step(("memory",), nasty),)))
    assert rendered.count(codec.eos_id) == 1
    assert sum(i in block_ids(codec) for i in rendered) == 2 * (2 + 3)


def test_law_2_blocks_carry_no_spaces(codec: Codec, trace: Trace) -> None:
    ids = codec.render(trace)
    assert ids[:5] == [*codec.blocks["prefix"], *codec.blocks["memory"]]


def test_law_3_parse_inverts_render(codec: Codec, trace: Trace) -> None:
    parsed = codec.parse(trace.question, codec.render(trace))
    assert parsed.steps == trace.steps
    assert parsed.prediction == "True"
    assert parsed.faults == ()


@pytest.mark.parametrize("blocks", [2, 0])
def test_spans_hold_the_ids_of_each_step(codec: Codec, trace: Trace, blocks: int) -> None:
    if not blocks:
        codec = add_tokens(TokenScheme(n_prefix=0, n_special=0), byte_level())
    ids = codec.render(trace)
    spans = codec.parse(trace.question, ids).meta["spans"]
    assert len(spans) == len(trace.steps)
    assert spans[0][0] == 0
    for step, (start, end) in zip(trace.steps, spans, strict=True):
        words = [i for i in ids[start:end] if i not in block_ids(codec)]
        assert codec.decode(words).strip() == step.text
        assert len(ids[start:end]) - len(words) == (5 if blocks else 0)  # the prefix and the kind block


@pytest.mark.parametrize("kinds", [("memory", "reason"), ()])
def test_several_kinds_or_none(byte_codec: Codec, kinds: tuple[str, ...]) -> None:
    trace = Trace(Question("q?", "True"), (Step(kinds, "a line"),))
    assert byte_codec.parse(trace.question, byte_codec.render(trace)).steps == trace.steps


def test_law_3_parse_never_raises(byte_codec: Codec, trace: Trace) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = byte_codec.render(trace)
    size = len(byte_codec.tokenizer)
    for _ in range(300):
        ids = list(whole)
        for _ in range(int(torch.randint(1, 6, (), generator=generator))):
            position = int(torch.randint(len(ids), (), generator=generator))
            ids[position : position + 1] = torch.randint(size, (2,), generator=generator).tolist()
        byte_codec.parse(trace.question, ids)
    assert "no end of sequence" in byte_codec.parse(trace.question, []).faults
    broken = byte_codec.parse(trace.question, [byte_codec.blocks["memory"][1], *whole[2:]])
    assert "broken block" in broken.faults


def test_law_4_long_examples_are_dropped_and_counted(byte_codec: Codec, trace: Trace) -> None:
    long = trace.with_question(text="word " * 200)
    examples = encode_traces(byte_codec, [trace, long], 100)
    assert (len(examples.rows), examples.dropped) == (1, 1)
    length = len(encode_trace(byte_codec, trace)["input_ids"])
    short = encode_traces(byte_codec, [trace], length - 3, cut=True)
    assert (short.cut, len(short.rows[0]["input_ids"])) == (1, length - 3)
    with pytest.raises(DataError, match="model_max_length"):
        encode_traces(byte_codec, [long], 20)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, 40])
def test_laws_5_6_8_rows(trace: Trace, tied: bool, padding: int) -> None:
    tokenizer = byte_level()
    model = tiny_model(len(tokenizer) + padding, tied=tied)
    old = torch.tensor([tokenizer("Is Lima the capital of Peru?")["input_ids"]])
    before = model(old).logits
    codec = add_tokens(TokenScheme(), tokenizer)
    add_rows(model, codec)
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows == max(before.shape[-1], len(tokenizer))
    known = len(tokenizer) - len(codec.scheme.tokens)
    torch.testing.assert_close(model(old).logits[..., :known], before[..., :known], rtol=0, atol=1e-6)
    ids = codec.blocks["memory"]
    assert ids == [tokenizer.get_vocab()["<memory_0>"], tokenizer.get_vocab()["<memory_1>"]]
    for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        word = matrix[codec.encode(" memory")].mean(dim=0)
        assert not torch.equal(matrix[ids[0]], matrix[ids[1]])
        assert torch.cosine_similarity(matrix[ids[0]], word, dim=0) > 0.9
    again = tiny_model(before.shape[-1], tied=tied)
    add_rows(again, codec)
    torch.testing.assert_close(again.get_input_embeddings().weight[ids], model.get_input_embeddings().weight[ids])


def test_tokens_survive_decoding(codec: Codec, trace: Trace) -> None:
    assert "<memory_2>" in codec.decode(codec.render(trace))


def test_only_at_front_and_no_blocks(trace: Trace) -> None:
    front = add_tokens(TokenScheme(n_prefix=2, placement="only_at_front"), byte_level())
    ids = front.render(trace)
    assert [i for i in ids if i in block_ids(front)] == front.blocks["prefix"]
    plain = add_tokens(TokenScheme(n_prefix=0, n_special=0), byte_level())
    parsed = plain.parse(trace.question, plain.render(trace))
    assert [step.text for step in parsed.steps] == [step.text for step in trace.steps]
    assert (parsed.prediction, parsed.faults) == ("True", ())


def test_scheme_and_tokenizer_must_belong_together(tmp_path, byte_codec: Codec) -> None:
    byte_codec.scheme.save(tmp_path)
    scheme = TokenScheme.load(tmp_path)
    assert scheme == byte_codec.scheme
    with pytest.raises(CheckpointError, match="lacks"):
        Codec(scheme, byte_level())
    other = FAMILIES["unigram"]()
    other.add_tokens(scheme.tokens)
    with pytest.raises(CheckpointError, match="another tokenizer"):
        Codec(scheme, other)
    with pytest.raises(CheckpointError, match=r"token_scheme\.json"):
        TokenScheme.load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="already holds"):
        add_tokens(TokenScheme(), byte_codec.tokenizer)


def test_collate_and_stream() -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = collate(rows, 9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    stream = Rows(np.arange(1, 5, dtype=np.int32), np.array([False, True, True, True]), np.array([3, 1]))
    assert list(pack_stream(stream, 2)) == [
        {"input_ids": [1, 2], "labels": [1, 2]},
        {"input_ids": [3, 4], "labels": [3, 4]},
    ]
