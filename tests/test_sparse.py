"""Sparse attention: one rule, the same numbers packed, padded and generated with a cache; and the published stream."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from conftest import byte_level, own_traces, save_base, tiny_recipe
from memreason import pipeline
from memreason.cli import main
from memreason.core.errors import EngineError, ExportError, ModelError, RecipeError
from memreason.core.files import read_json
from memreason.core.recipe import load_recipe
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question
from memreason.encode.codec import Codec
from memreason.encode.examples import collate, encode_trace, encode_traces, pack, pack_stream
from memreason.encode.scheme import TokenScheme
from memreason.encode.sparse import visible_since
from memreason.encode.vocab import add_tokens
from memreason.exports import export
from memreason.fast.attention import PACKED, attending
from memreason.fast.sparse import FLEX, sparse_masks, takes_blocks, takes_masks
from memreason.finetune import trainer
from memreason.finetune.checkpoint import load_checkpoint
from memreason.generate.engines import ENGINES, generate
from memreason.generate.onward import begun_ids, continue_traces
from memreason.measure.attention import collecting, flow
from memreason.published import differences, translate
from memreason.timing.workload import Workload, encoded
from test_fast import family

TAKING = ("tied", "qwen3", "mistral", "gemma2", "gpt2")
SPARSE = {"tokens.sparse_attention": True}


@pytest.fixture
def sparse_codec() -> Codec:
    return add_tokens(TokenScheme(n_prefix=1, n_special=2, sparse_attention=True), byte_level())


def seen_by_hand(ids: list[int], planning: Any) -> torch.Tensor:
    """The rule, word for word: s(t) counts the segments that have started up to and including t."""
    starts = [i in planning and (n == 0 or ids[n - 1] not in planning) for n, i in enumerate(ids)]
    s = [sum(starts[: t + 1]) for t in range(len(ids))]
    size = range(len(ids))
    return torch.tensor([[j <= i and (ids[i] in planning or s[j] == s[i]) for j in size] for i in size])


def plain_logits(model: Any, ids: list[int], planning: Any) -> torch.Tensor:
    """Eager, without a cache, with masks made by hand: (length, vocabulary)."""
    seen, config = seen_by_hand(ids, planning), model.config
    near = torch.ones_like(seen).triu(1 - (getattr(config, "sliding_window", None) or len(ids)))
    masks = {
        name: torch.zeros(seen.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
        for name, mask in {"full_attention": seen, "sliding_attention": seen & near}.items()
    }
    mask: Any = masks if hasattr(config, "layer_types") else masks["sliding_attention"]
    with attending(model, "eager"):
        return model(input_ids=torch.tensor([ids]), attention_mask=mask, use_cache=False).logits[0]


def plain_answer(model: Any, ids: list[int], codec: Codec, count: int) -> list[int]:
    made: list[int] = []
    with torch.no_grad():
        while len(made) < count and codec.eos_id not in made:
            made.append(int(plain_logits(model, ids + made, codec.parting)[-1].argmax()))
    return made


def test_the_rule_written_out() -> None:
    a, b, c = 90, 91, 92
    ids = [1, 2, a, b, 3, 4, b, 5, c]
    expected = ["1", "11", "111", "1111", "0011 1", "0011 11", "1111 111", "0000 0011", "1111 1111 1"]
    rows = [[int(bit) for bit in row.replace(" ", "").ljust(9, "0")] for row in expected]
    assert seen_by_hand(ids, {a, b, c}).int().tolist() == rows
    assert visible_since(ids, {a, b, c}) == [0, 0, 0, 0, 2, 2, 0, 6, 0]
    assert visible_since(ids, ()) == [0] * 9
    assert visible_since([a, 1, 2], {a}) == [0, 0, 0]


def test_one_number_says_the_rule(sparse_codec: Codec) -> None:
    for trace in own_traces(3):
        ids = encode_trace(sparse_codec, trace)["input_ids"]
        since = torch.tensor(visible_since(ids, sparse_codec.parting))[:, None]
        keys = torch.arange(len(ids))
        assert torch.equal((keys >= since) & (keys <= keys[:, None]), seen_by_hand(ids, sparse_codec.parting))


@pytest.mark.parametrize("name", TAKING)
def test_packed_padded_and_by_hand_are_alike(sparse_codec: Codec, name: str) -> None:
    model = family(name, len(sparse_codec.tokenizer))
    rows = [encode_trace(sparse_codec, trace) for trace in own_traces(3)]
    wanted = [parameter for _, parameter in model.named_parameters()]

    def outcome(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return logits, loss, *torch.autograd.grad(loss, wanted)

    padded = collate(rows, 0, sparse_codec.parting)
    kept, labels = padded["attention_mask"].bool(), padded["shift_labels"]
    masks = sparse_masks(model, padded["since"], padded["attention_mask"])
    logits = model(input_ids=padded["input_ids"], attention_mask=masks, use_cache=False).logits
    by_hand = torch.cat([plain_logits(model, row["input_ids"], sparse_codec.parting) for row in rows])
    expected = outcome(by_hand, labels[kept])
    torch.testing.assert_close(outcome(logits[kept], labels[kept]), expected, rtol=1e-3, atol=1e-3)
    causal = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits[kept]
    assert (causal - by_hand).abs().max() > 0.1
    if name not in ("tied", "qwen3"):
        return
    batch = pack(rows, sparse_codec.parting)
    given = {key: batch[key] for key in ("input_ids", "position_ids", "cu_seq_lens_q", "since")}
    with attending(model, PACKED):
        together = outcome(model(**given, use_cache=False).logits[0], batch["shift_labels"][0])
    torch.testing.assert_close(together, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", TAKING)
def test_flex_attention_heeds_the_same_masks(sparse_codec: Codec, name: str) -> None:
    model = family(name, len(sparse_codec.tokenizer)).eval()
    rows = [encode_trace(sparse_codec, trace) for trace in own_traces(3)]
    padded = collate(rows, 0, sparse_codec.parting)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        if name == "gpt2":  # reads the mask itself
            assert not takes_blocks(model)
            return
        assert takes_blocks(model)
        with attending(model, FLEX):
            masks = sparse_masks(model, padded["since"], padded["attention_mask"])
            logits = model(input_ids=padded["input_ids"], attention_mask=masks, use_cache=False).logits
        expected = torch.cat([plain_logits(model, row["input_ids"], sparse_codec.parting) for row in rows])
    kinds = {type(mask) for mask in (masks.values() if isinstance(masks, dict) else [masks])}
    assert kinds == {BlockMask}
    torch.testing.assert_close(logits[padded["attention_mask"].bool()], expected, atol=2e-5, rtol=1e-4)


def test_losses_are_alike_packed_in_pieces_and_padded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base")

    def curve(name: str, **more: Any) -> list[float]:
        recipe = tiny_recipe(tmp_path, base, **more, output_dir=str(tmp_path / name))
        state = read_json(pipeline.train(recipe) / "trainer_state.json")
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    causal = curve("causal")
    packed = curve("packed", **SPARSE)
    assert packed != pytest.approx(causal, abs=1e-2)
    assert curve("pieces", **SPARSE, **{"train.pass_tokens": 100}) == pytest.approx(packed, abs=2e-4)
    spared = curve("spared", **SPARSE, **{"train.gradient_checkpointing": True})
    assert spared == pytest.approx(packed, abs=2e-4)
    monkeypatch.setattr(trainer, "packs", lambda model: False)
    assert curve("padded", **SPARSE) == pytest.approx(packed, abs=2e-4)


def test_an_ordinary_token_knows_nothing_beyond_its_segment(sparse_codec: Codec) -> None:
    """Of one layer, so that nothing comes through the block either."""
    model = family("tied", len(sparse_codec.tokenizer))
    model.model.layers = model.model.layers[:1]
    trace = own_traces(2)[1]
    rows = [
        encode_trace(sparse_codec, one)["input_ids"] for one in (trace, trace.with_question(text="Is Rome in Peru?"))
    ]
    behind = len(sparse_codec.render(trace))
    rows = [row[-behind - 10 :] for row in rows]  # of one length, for the same positions
    batch = torch.tensor(rows)
    assert not torch.equal(*batch)
    since = torch.tensor([visible_since(row, sparse_codec.parting) for row in rows])
    masks = sparse_masks(model, since, torch.ones_like(batch))
    with torch.no_grad():
        one, other = model(input_ids=batch, attention_mask=masks, use_cache=False).logits[:, 10:]
    planning = torch.tensor([token in sparse_codec.parting for token in rows[0][10:]])
    same = (one == other).all(dim=1)
    assert torch.equal(same, ~planning)


def eager_of_blocks(model: Any, codec: Codec) -> Any:
    """A model that likes to begin blocks, with a head of its own: where that is tied some repeat one token for ever."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.randn(head.weight.shape) * 0.3)
    with torch.no_grad():
        head.weight[sorted(codec.parting)] *= 1.7
    return model


@pytest.mark.parametrize("name", TAKING)
def test_generation_with_a_cache_is_that_without(sparse_codec: Codec, name: str) -> None:
    model = eager_of_blocks(family(name, len(sparse_codec.tokenizer)), sparse_codec)
    questions = [Question("word " * n + "?", "True") for n in (1, 9, 2, 5, 3)]
    settings = EvalRecipe(batch_size=3, max_new_tokens=24)
    made = {g.question.id: g.ids for batch in generate(model, sparse_codec, questions, settings) for g in batch}
    opening, whole = sparse_codec.opening(), []
    for question in questions:
        prompt = sparse_codec.question_ids(question) + opening
        assert made[question.id] == opening + plain_answer(model, prompt, sparse_codec, 24), question
        whole += made[question.id]
    own = [token in sparse_codec.parting for token in whole]
    assert 5 < sum(own) < len(own) - 5
    causal = add_tokens(replace(sparse_codec.scheme, sparse_attention=False), byte_level())
    other = {g.question.id: g.ids for batch in generate(model, causal, questions, settings) for g in batch}
    assert other != made


def test_lines_that_are_given_are_seen_by_the_rule(sparse_codec: Codec) -> None:
    model = family("mistral", len(sparse_codec.tokenizer))
    traces = own_traces(3)
    given = {trace.question.id: begun_ids(sparse_codec, trace) for trace in traces}
    questions, settings = [trace.question for trace in traces], EvalRecipe(max_new_tokens=12)
    made = {t.question.id: t for t in continue_traces(model, sparse_codec, questions, given, settings)}
    for question in questions:
        prompt = sparse_codec.question_ids(question) + given[question.id]
        expected = given[question.id] + plain_answer(model, prompt, sparse_codec, 12)
        assert made[question.id] == sparse_codec.parse(question, expected)


def test_a_run_keeps_its_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(
        tmp_path, save_base(tmp_path / "base"), **SPARSE, **{"train.max_steps": 150, "train.logging_steps": 50}
    )
    run = pipeline.train(recipe)
    loaded = load_checkpoint(run)
    assert loaded.codec.scheme.sparse_attention
    assert loaded.codec.parting == set(loaded.codec.places)
    questions = [trace.question for trace in own_traces(6)]
    settings = EvalRecipe(max_new_tokens=120)
    made = {g.question.id: g.ids for batch in generate(loaded.model, loaded.codec, questions, settings) for g in batch}
    for question in questions[:3]:
        prompt = loaded.codec.question_ids(question) + loaded.codec.opening()
        expected = plain_answer(loaded.model, prompt, loaded.codec, 120)
        assert made[question.id] == loaded.codec.opening() + expected
        assert not loaded.codec.parse(question, made[question.id]).faults
    assert pipeline.evaluate(run, settings=EvalRecipe(n=3, max_new_tokens=30))["n"] == 3
    assert main(["attention", str(run), "--eval.n", "3", "--eval.max_new_tokens", "30"]) == 0
    for to in ("hf", "adapter", "gguf"):
        with pytest.raises(ExportError, match=r"tokens\.sparse_attention"):
            export(run, tmp_path / to, to=to)
        assert not (tmp_path / to).exists()


def test_attention_is_looked_at_by_the_rule(sparse_codec: Codec) -> None:
    model = family("gemma2", len(sparse_codec.tokenizer))
    ids = encode_trace(sparse_codec, own_traces(2)[1])["input_ids"]
    since = visible_since(ids, sparse_codec.parting)
    with collecting(model, ids):
        mass = flow(model, ids, list(range(len(ids))), len(ids), since=since, cells=2000).mass
        open_ = flow(model, ids, list(range(len(ids))), len(ids)).mass
    seen = seen_by_hand(ids, sparse_codec.parting).numpy()
    assert (mass[:, :, ~seen] == 0).all()
    assert (open_[:, :, ~seen] != 0).any()
    np.testing.assert_allclose(mass.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("engine", ["openai", "vllm"])
def test_other_engines_refuse(sparse_codec: Codec, engine: str) -> None:
    settings = EvalRecipe.model_construct(engine=engine)
    with pytest.raises(EngineError, match=rf"eval\.engine: {engine} .* --eval\.engine local"):
        list(ENGINES[engine](None, sparse_codec, deque(), settings))


def test_models_that_cannot_be_told_are_named(tmp_path: Path, sparse_codec: Codec) -> None:
    size = len(sparse_codec.tokenizer)
    assert {name: takes_masks(family(name, size)) for name in (*TAKING, "lfm2", "bloom")} == {
        **dict.fromkeys(TAKING, True),
        "lfm2": False,
        "bloom": False,
    }
    with pytest.raises(ModelError, match=r"sparse_attention: lfm2 does not let"):
        list(generate(family("lfm2", size), sparse_codec, [Question("q?", "a")], EvalRecipe(max_new_tokens=4)))
    base = save_base(tmp_path / "base", lambda rows: family("bloom", rows))
    with pytest.raises(ModelError, match=r"sparse_attention: bloom does not let"):
        pipeline.train(tiny_recipe(tmp_path, base, **SPARSE, **{"method.name": "full"}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens.placement": "only_at_front"}, "tokens.placement"),
        ({"tokens.add": False}, "tokens.add"),
        ({"tokens.words": "{kind}:"}, "tokens.words"),
        ({"tokens.n_prefix": 0, "tokens.n_special": 0}, "n_prefix"),
        ({"tokens.n_prefix": 0, "tokens.kinds": []}, "n_special"),
        ({"method.name": "prefix-tuning"}, "method.name"),
    ],
)
def test_what_does_not_go_together_is_told(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=r"tokens\.sparse_attention: ") as caught:
        load_recipe(None, {**SPARSE, **changes})
    assert says in str(caught.value)
    assert len(caught.value.problems) == 1


def test_the_published_flag() -> None:
    words = ["--dataset", "gsm8k", "--use_sparse_attention", "True", "--add_soft_prompts", "True"]
    recipe = load_recipe(None, translate(words, train=True)[0])
    assert recipe.tokens.sparse_attention
    overrides = dict(translate(words, train=False)[0])
    assert differences({"tokens.sparse_attention": True}, recipe) == []
    (line,) = differences({"tokens.sparse_attention": overrides["tokens.sparse_attention"]}, load_recipe("demo"))
    assert "False counts" in line


def test_a_stream_is_cut_where_it_is_full(sparse_codec: Codec) -> None:
    rows = encode_traces(sparse_codec, own_traces(5), 10_000).rows
    stream = [token for row in rows for token in row["input_ids"]]
    for length in (7, 100, len(stream), len(stream) - 1, 10_000):
        pieces = list(pack_stream(rows, length))
        assert [i for piece in pieces for i in piece["input_ids"]] == stream[
            : len(stream) - (len(stream) % length == 1)
        ]
        assert {len(piece["input_ids"]) for piece in pieces[:-1]} <= {length}
        assert all(piece["labels"] == piece["input_ids"] and "since" not in piece for piece in pieces)
        since = [first for piece in pack_stream(rows, length, sparse_codec.parting) for first in piece["since"]]
        starts = rows.starts.tolist()
        for place, (token, first) in enumerate(zip(stream, since, strict=False)):
            piece = place // length * length
            own = max(at for at in starts if at <= place)
            inside = visible_since(stream[own : place + 1], sparse_codec.parting)[-1]
            expected = 0 if token in sparse_codec.parting else max(0, own + inside - piece)
            assert first == expected


STREAM = {"train.mode": "constant_len", "train.model_max_length": 64, "train.eval_strategy": "no"}


@pytest.mark.parametrize(
    "changes",
    [
        *({"method.name": m} for m in ("full", "lora", "prompt-tuning", "lora+prompt-tuning", "prefix-tuning")),
        {"method.name": "prompt-tuning", "tokens.placement": "only_at_front"},
        SPARSE,
    ],
)
def test_every_method_trains_on_a_stream_and_goes_on(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Examples longer than a piece are cut like the others, and a stopped run goes on along its curve."""
    base = save_base(tmp_path / "base")
    settings = {**STREAM, **changes, "train.save_strategy": "steps", "train.save_steps": 3, "train.max_steps": 6}

    def curve(name: str, **more: Any) -> list[float]:
        recipe = tiny_recipe(tmp_path, base, **settings, **more, output_dir=str(tmp_path / name))
        state = read_json(pipeline.train(recipe) / "trainer_state.json")
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    whole = curve("run")
    assert len(whole) == 6
    assert min(whole[1:]) < whole[0]
    manifest = read_json(tmp_path / "run" / "manifest.json")
    assert manifest["dropped"] == 0
    (tmp_path / "run" / "manifest.json").write_text("{}")  # as when it was stopped behind its first checkpoint
    for path in (tmp_path / "run" / "checkpoint-6").iterdir():
        path.unlink()
    (tmp_path / "run" / "checkpoint-6").rmdir()
    assert curve("run") == pytest.approx(whole, abs=1e-5)


def test_dry_run_of_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path, save_base(tmp_path / "base"), **STREAM, **SPARSE)
    loads: list[Workload] = []
    monkeypatch.setattr(pipeline, "estimate", lambda recipe, ready: loads.append(encoded(recipe, ready)))
    monkeypatch.setattr(pipeline, "print_estimate", lambda figures: None)
    pipeline.dry_run(recipe)
    assert capsys.readouterr().out.count("<|end|>") == 2  # in the first piece of 64 tokens
    assert not recipe.folder.exists()
    (load,) = loads
    codec = pipeline.prepare(recipe).codec
    answers = [len(codec.render(trace)) for trace in own_traces(24)]
    assert set(load.lengths[:-1]) == {64}
    assert load.answer == pytest.approx(np.mean(answers), abs=0.5)
