"""The fast path gives the same numbers as the plain one: attention, rows, loss, packing, drafts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conftest import BASES, greedy, own_traces, save_base, tiny_model, tiny_recipe
from memreason import pipeline
from memreason.core.files import read_json
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question
from memreason.encode.codec import Codec
from memreason.encode.examples import encode_trace, pack, split_packed
from memreason.fast import attention, loss, matrices
from memreason.fast.attention import PACKED, attending, packed_attention, packs
from memreason.fast.loss import Head, chunked_loss, head_of, headless, takes_hidden_states
from memreason.fast.matrices import laid_out
from memreason.fast.rows import RowLayer, row_layers
from memreason.finetune import trainer
from memreason.finetune.checkpoint import load_checkpoint
from memreason.finetune.methods import merged, network_of
from memreason.generate import decode, engine
from memreason.generate.choose import _largest, take
from memreason.generate.engines import generate
from memreason.generate.rows import Row
from test_modes import KINDS, MODULES
from test_train import live

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
NARROW = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "gpt2": lambda n: GPT2LMHeadModel(
        GPT2Config(vocab_size=n, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, n_positions=256)
    ),
    "qwen3": lambda n: Qwen3ForCausalLM(Qwen3Config(vocab_size=n, **SIZES, **NARROW)),
    "mistral": lambda n: MistralForCausalLM(MistralConfig(vocab_size=n, **SIZES, **NARROW, sliding_window=16)),
    "gemma2": lambda n: Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=n, **SIZES, **NARROW, sliding_window=16, query_pre_attn_scalar=8, attn_logit_softcapping=2.0
        )
    ),
    "lfm2": lambda n: Lfm2ForCausalLM(  # convolutions between the attention layers
        Lfm2Config(
            vocab_size=n, **SIZES, intermediate_size=64, num_key_value_heads=2, layer_types=["conv", "full_attention"]
        )
    ),
    "bloom": lambda n: BloomForCausalLM(
        BloomConfig(vocab_size=n, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    ),
    **{name: make for name, make in KINDS.items() if name != "padded"},
}


def family(name: str, rows: int) -> Any:
    torch.manual_seed(0)
    return FAMILIES[name](rows).eval()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_packed_attention_is_attention_of_each_trace(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 5)  # traces of less, of just as many and of more positions
    torch.manual_seed(0)
    bounds = torch.tensor([0, 3, 8, 9, 22])
    tensors = [torch.randn(heads, 22, 8, requires_grad=True) for heads in (4, groups, groups)]
    query, key, value = tensors
    out = packed_attention(query, key, value, bounds, 0.3)
    key, value = (tensor.repeat_interleave(4 // groups, dim=0) for tensor in (key, value))
    alone = [
        F.scaled_dot_product_attention(query[:, a:b], key[:, a:b], value[:, a:b], is_causal=True, scale=0.3)
        for a, b in pairwise(bounds.tolist())
    ]
    torch.testing.assert_close(out, torch.cat(alone, dim=1))
    outer = torch.randn_like(out)
    found = torch.autograd.grad(out, tensors, outer)
    torch.testing.assert_close(found, torch.autograd.grad(torch.cat(alone, dim=1), tensors, outer))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_chunked_loss_is_cross_entropy(bias: bool, rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 4)
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    labels, ids = torch.randint(0, 20, (10,)), torch.tensor([3, 19]) if rows else None
    labels[:2] = torch.tensor([3, 19])
    added = torch.randn(20, requires_grad=True) if bias else None
    new = torch.randn(2, 8, requires_grad=True) if rows else None
    whole = weight if new is None else weight.index_copy(0, ids, new)
    expected = F.cross_entropy(F.linear(hidden, whole, added), labels, reduction="sum")
    found = chunked_loss(hidden, labels, Head(weight, added, ids, new))
    torch.testing.assert_close(found, expected)
    wanted = [tensor for tensor in (hidden, weight, added, new) if tensor is not None]
    if new is not None:  # rows that are trained on hidden states that are not
        frozen = chunked_loss(hidden.detach(), labels, Head(weight.detach(), None, ids, new))
        same = F.cross_entropy(F.linear(hidden, weight.index_copy(0, ids, new)).detach(), labels, reduction="sum")
        assert torch.autograd.grad(frozen, new)[0].abs().sum() > 0
        torch.testing.assert_close(frozen, same)
    gradients = zip(torch.autograd.grad(found * 3, wanted), torch.autograd.grad(expected * 3, wanted), strict=True)
    for mine, theirs in gradients:
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["prompt-tuning", "lora+prompt-tuning"])
def test_rows_beside_the_matrix_are_pefts_rows(tmp_path: Path, kind: str, method: str) -> None:
    base = save_base(tmp_path / "base", KINDS[kind])
    recipe = tiny_recipe(tmp_path, base, **{"method.name": method, "method.lora_module": MODULES.get(kind, "all")})
    model, codec = live(base, recipe)
    for name, parameter in model.named_parameters():
        if "trainable_tokens" in name:
            torch.nn.init.normal_(parameter)
    row = encode_trace(codec, own_traces(1)[0])
    batch = {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["labels"]])}
    wanted = [p for n, p in model.named_parameters() if "trainable_tokens" in n]

    def outcome() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        out = model(**batch)
        return out.logits, torch.autograd.grad(out.loss, wanted)

    assert {type(layer) for layer in row_layers(model)} == {RowLayer}
    logits, gradients = outcome()
    for layer in row_layers(model):
        layer.__class__ = TrainableTokensLayer
    theirs, their_gradients = outcome()
    if kind != "biased":  # PEFT drops a head's bias there; test_modes holds ours to keeping it
        torch.testing.assert_close(logits, theirs)
        torch.testing.assert_close(gradients, their_gradients)


def test_packing_leaves_traces_apart(byte_codec: Codec) -> None:
    model = tiny_model(len(byte_codec.tokenizer))
    rows = [encode_trace(byte_codec, trace) for trace in own_traces(3)]
    batch = pack(rows)
    wanted = {name: batch[name] for name in ("input_ids", "position_ids", "cu_seq_lens_q")}
    with torch.no_grad(), attending(model, PACKED):
        together = model(**wanted, use_cache=False).logits[0]
    assert model.config._attn_implementation != PACKED
    alone = torch.cat([model(torch.tensor([row["input_ids"]])).logits[0] for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_pieces_are_whole_rows_of_about_the_same_size(byte_codec: Codec) -> None:
    rows = [encode_trace(byte_codec, trace) for trace in own_traces(16)]
    batch = pack(rows)
    total, longest = batch["input_ids"].shape[1], max(len(row["input_ids"]) for row in rows)
    for limit in (1, longest, 300, 700, total, 10 * total):
        pieces = split_packed(batch, limit)
        for name in ("input_ids", "labels", "shift_labels", "position_ids"):
            assert torch.equal(torch.cat([piece[name] for piece in pieces], dim=1), batch[name])
        sizes = [piece["input_ids"].shape[1] for piece in pieces]
        assert max(sizes) <= max(limit, longest)
        assert all(piece["position_ids"][0, 0] == 0 == piece["cu_seq_lens_q"][0] for piece in pieces)
        assert [int(piece["cu_seq_lens_q"][-1]) for piece in pieces] == sizes
        assert limit < longest or len(pieces) <= -(-total // (limit - longest // 2))
    assert len(split_packed(batch, 1)) == 16


@pytest.mark.parametrize("method", ["full", "lora", "lora+prompt-tuning"])
@pytest.mark.parametrize("kind", BASES)
def test_losses_are_those_of_padded_batches(
    tmp_path: Path, kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base", BASES[kind])
    changes = {"method.name": method, "train.max_steps": 4, "train.per_device_train_batch_size": 6}

    def curve(name: str, **more: Any) -> list[float]:
        recipe = tiny_recipe(tmp_path, base, **changes, **more, output_dir=str(tmp_path / name))
        state = read_json(pipeline.train(recipe) / "trainer_state.json")
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    packed = curve("packed")
    in_pieces = curve("pieces", **{"train.pass_tokens": 100})
    monkeypatch.setattr(trainer, "packs", lambda model: False)
    padded = curve("padded")
    monkeypatch.setattr(trainer, "takes_hidden_states", lambda model: False)
    plain = curve("plain")
    assert len(packed) == 4
    assert packed == pytest.approx(plain, abs=2e-4)
    assert in_pieces == pytest.approx(plain, abs=2e-4)
    assert padded == pytest.approx(plain, abs=2e-4)


def test_compiled_layers_have_the_same_losses(tmp_path: Path) -> None:
    """And are put aside while the epoch's questions are answered."""
    base = save_base(tmp_path / "base")
    found = []
    for wanted in (False, True):
        changes = {"train.compile": wanted, "data.validation": 0.2, "train.n_select": 2, "train.eval_strategy": "steps"}
        recipe = tiny_recipe(
            tmp_path, base, **changes, **{"train.eval_steps": 2}, output_dir=str(tmp_path / f"{wanted}")
        )
        state = read_json(pipeline.train(recipe) / "trainer_state.json")
        found.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert len(found[0]) == 3
    assert found[1] == pytest.approx(found[0], abs=1e-4)


def test_what_cannot_be_packed_or_be_headless_is_known() -> None:
    able = {name: packs(family(name, 300)) for name in FAMILIES}
    unable = ("gpt2", "mistral", "gemma2", "lfm2", "bloom")  # dropout, windows, windows, convolutions, ALiBi
    assert able == {**dict.fromkeys(FAMILIES, True), **dict.fromkeys(unable, False)}
    fed = {name: decode._feeds(family(name, 300)) for name in FAMILIES}
    assert fed == {**dict.fromkeys(FAMILIES, True), "lfm2": False, "bloom": False}
    heads = {name: takes_hidden_states(family(name, 300)) for name in FAMILIES}
    assert heads == {**dict.fromkeys(FAMILIES, True), "gemma2": False}


def test_headless_ends_with_its_block() -> None:
    model = tiny_model(300)
    ids = torch.arange(4)[None]
    with torch.no_grad():
        logits = model(ids).logits
        with headless(model.lm_head):
            assert model(ids).logits.shape == (1, 4, 32)
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(F.linear(model.model(ids).last_hidden_state, head_of(model.lm_head).weight), logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_engine_decodes_as_plain_loops_do(byte_codec: Codec, name: str) -> None:
    model = family(name, len(byte_codec.tokenizer))
    questions = [Question("word " * n + "?", "True") for n in (1, 9, 2, 5, 3)]
    settings = EvalRecipe(batch_size=3, max_new_tokens=20)
    made = {g.question.id: g.ids for batch in generate(model, byte_codec, questions, settings) for g in batch}
    for question in questions:
        prompt, opening = byte_codec.question_ids(question), byte_codec.opening()
        assert made[question.id] == opening + greedy(model, prompt + opening, byte_codec.eos_id, 20), question


@pytest.mark.parametrize("method", ["prefix-tuning", "prompt-tuning"])
def test_the_engine_puts_learnt_prompts_in_front(tmp_path: Path, method: str) -> None:
    base = save_base(tmp_path / "base")
    changes = {"method.name": method, "tokens.n_prefix": 3, "train.max_steps": 4, "train.learning_rate": 0.3}
    changes |= {"tokens.placement": "only_at_front"} if method == "prompt-tuning" else {}
    recipe = tiny_recipe(tmp_path, base, **changes)
    loaded = load_checkpoint(pipeline.train(recipe))
    questions = [trace.question for trace in own_traces(5)]
    settings = EvalRecipe(batch_size=3, max_new_tokens=12)
    made = {g.question.id: g for batch in generate(loaded.model, loaded.codec, questions, settings) for g in batch}
    for question in questions:
        prompt = loaded.codec.question_ids(question) + loaded.codec.opening()
        expected = greedy(loaded.model, prompt, loaded.codec.eos_id, 12)
        assert made[question.id].ids == loaded.codec.opening() + expected


@pytest.fixture(scope="module")
def fluent(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that has learnt to write traces."""
    folder = tmp_path_factory.mktemp("fluent")
    recipe = tiny_recipe(folder, save_base(folder / "base"), **{"train.max_steps": 250, "train.logging_steps": 50})
    return load_checkpoint(pipeline.train(recipe))


def counted_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of cohorts in each pass of the engine."""
    passes: list[int] = []
    scores = engine.Network.scores

    def counted(network: Any, cohorts: Any) -> Any:
        passes.append(len(cohorts))
        return scores(network, cohorts)

    monkeypatch.setattr(engine.Network, "scores", counted)
    return passes


@pytest.mark.parametrize("decoding", ["greedy", "sample"])
def test_drafts_change_no_token(fluent: Any, decoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [trace.question for trace in own_traces(12)]
    passes = counted_passes(monkeypatch)

    def answers(limit: int) -> tuple[dict[Any, Any], int]:
        passes.clear()
        settings = EvalRecipe(batch_size=5, max_new_tokens=limit, decoding=decoding, n_samples=2)
        made = [g for batch in generate(fluent.model, fluent.codec, questions, settings) for g in batch]
        return {(g.question.id, g.sample): (g.ids, g.logprobs) for g in made}, len(passes)

    drafts, limits = engine.drafts_of, (1, 2, 5, 200)
    with_drafts = [answers(limit) for limit in limits]
    monkeypatch.setattr(engine, "drafts_of", lambda codec: {})
    monkeypatch.setattr(engine, "ECHOED", 0)
    without = [answers(limit) for limit in limits]
    assert drafts(fluent.codec)
    for (mine, _), (plain, _) in zip(with_drafts, without, strict=True):
        assert {key: ids for key, (ids, _) in mine.items()} == {key: ids for key, (ids, _) in plain.items()}
        for key, (_, logprobs) in mine.items():
            assert logprobs == pytest.approx(plain[key][1], abs=1e-3)
    most = 0.9 if decoding == "greedy" else 1.0  # what is drawn at random follows fewer drafts
    assert with_drafts[-1][1] < most * without[-1][1]
    monkeypatch.setattr(engine, "drafts_of", lambda codec: {n: [n, n + 1] for n in range(200)})  # nearly all wrong
    assert {k: ids for k, (ids, _) in answers(200)[0].items()} == {k: ids for k, (ids, _) in without[-1][0].items()}


@pytest.mark.parametrize("wrong", [False, True])
def test_what_is_repeated_is_drafted_and_changes_no_token(
    fluent: Any, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [trace.question for trace in own_traces(4)]
    passes, echo = counted_passes(monkeypatch), Row.echo

    def answers(most: int) -> list[list[int]]:
        passes.clear()
        monkeypatch.setattr(engine, "ECHOED", most)
        settings = EvalRecipe(batch_size=4, max_new_tokens=150)
        return [g.ids for batch in generate(fluent.model, fluent.codec, questions, settings) for g in batch]

    if wrong:
        monkeypatch.setattr(Row, "echo", lambda row, most: [one + 1 for one in echo(row, most)])
    plain, without = answers(0), len(passes)
    assert answers(32) == plain
    assert len(passes) < 0.9 * without or wrong


def test_an_echo_is_what_stood_behind_the_last_two_tokens() -> None:
    row = Row(Question("", ""), 0, 9, [5, 1, 2, 3, 1, 2, 4, 6], torch.Generator())
    assert row.echo(3) == []
    row.ids = [1, 2]
    assert (row.echo(3), row.echo(6), row.echo(1), row.echo(0)) == ([4, 6, 1], [4, 6, 1, 2, 4, 6], [4], [])
    row.ids = [7, 7]
    assert row.echo(3) == []
    row.ids = [7, 7, 7]
    assert row.echo(3) == [7, 7, 7]


@pytest.mark.parametrize("size", [1, 5, 64, 65, 127, 300])
def test_the_largest_logit_is_argmax(size: int) -> None:
    logits = torch.randint(0, 40, (50, size), generator=torch.Generator().manual_seed(0)).float()  # many are equal
    assert torch.equal(_largest(logits), logits.argmax(dim=-1))


def test_figures_of_a_token_are_those_of_its_distribution() -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)) * 4
    chosen = torch.tensor([5, 200, int(logits[2].argmax())])
    shares = logits.double().softmax(dim=-1)
    for n, one in enumerate(take(logits, chosen.tolist(), lambda _, points: torch.tensor(points))):
        share, others = shares[n, chosen[n]], shares[n].clone()
        others[chosen[n]] = 0
        assert one.token == chosen[n]
        assert one.logprob == pytest.approx(float(share.log()), abs=1e-5)
        assert one.entropy == pytest.approx(float(-(shares[n] * shares[n].log()).sum()), abs=1e-5)
        assert one.margin == pytest.approx(float(share - others.max()), abs=1e-5)


def test_every_question_is_answered_once_with_any_number_in_flight(fluent: Any) -> None:
    questions = [trace.question for trace in own_traces(23)]
    found = []
    for size in (1, 4, 7, 64):
        batches = list(generate(fluent.model, fluent.codec, questions, EvalRecipe(batch_size=size, max_new_tokens=150)))
        made = [one for batch in batches for one in batch]
        assert sorted(one.question.id for one in made) == sorted(question.id for question in questions)
        found.append({one.question.id: one.ids for one in made})
    assert found[1:] == found[:1] * 3


def test_generating_leaves_the_weights_as_they_were(fluent: Any) -> None:
    network = network_of(fluent.model).to(torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    hooked = network.model.layers[1].mlp.up_proj
    handle = hooked.register_forward_hook(lambda *_: None)
    with merged(fluent.model):
        changed = [n for p in network.parameters() if not torch.equal(p, before[n := names[id(p)]])]
        assert any("gate_proj.base_layer" in name for name in changed)
        assert any("embed_tokens" in name for name in changed)
        wrapping = [name for name, layer in network.named_modules() if isinstance(layer, LoraLayer)]
        assert wrapping == ["model.layers.1.mlp.up_proj"]  # the others are left out: they would only pass it on
    handle.remove()
    assert {id(parameter): name for name, parameter in network.named_parameters()} == names
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not parameter.is_inference()
    network.to(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_matrices_laid_out_multiply_alike_and_come_back(name: str, dtype: torch.dtype) -> None:
    if not matrices._has_blocks(dtype):
        pytest.skip(f"this processor has no blocks for {dtype}")
    model = BASES[name](300).to(dtype)
    hooked = model.model.layers[1].mlp.up_proj
    hooked.forward = hooked.forward  # as Accelerate's hooks do
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = model(ids).logits
    with pytest.raises(ZeroDivisionError), laid_out(model), torch.inference_mode():
        assert model.model.layers[0].mlp.up_proj.weight.isnan().all()
        assert not hooked.weight.isnan().any()
        assert not model.get_input_embeddings().weight.isnan().any()
        assert (model(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        raise ZeroDivisionError
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.is_contiguous() and not parameter.is_inference()
    assert [n for n, module in model.named_modules() if "forward" in vars(module)] == ["model.layers.1.mlp.up_proj"]


def test_without_onednn_matrices_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not matrices._has_blocks(torch.float64)
    monkeypatch.setattr(matrices, "_has_blocks", lambda dtype: False)
    model = tiny_model(300)
    with laid_out(model):
        assert not any("forward" in vars(module) or module.weight.isnan().any() for module in linears(model))


def linears(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


def test_a_cpu_multiplies_in_the_faster_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    from memreason.encode import base

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for faster in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(base, "_product_seconds", lambda dtype, faster=faster: 1.0 if dtype == faster else 2.0)
        assert base.pick_dtype("auto") == faster
    assert base.pick_dtype("fp32") == torch.float32


def test_a_slow_product_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from memreason.encode import base

    for took, times in ((0.01, 6), (0.15, 2), (3.0, 1)):
        ticks = iter([took * n for n in range(100)])
        monkeypatch.setattr(base, "time", SimpleNamespace(perf_counter=lambda ticks=ticks: next(ticks)))
        assert base._product_seconds.__wrapped__(torch.float32) == pytest.approx(took)
        assert next(ticks) == pytest.approx(2 * times * took)
