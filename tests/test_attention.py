"""What looks at what: flow against attention computed by hand, segments, means, pictures, the command."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from conftest import byte_level, save_base, tiny_model, tiny_recipe
from memreason.core.errors import ModelError, RecipeError
from memreason.core.stages import MethodRecipe
from memreason.core.trace import Question, Step, Trace
from memreason.encode.codec import Codec
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_rows, add_tokens
from memreason.fast.attention import attending
from memreason.finetune.methods import trainable
from memreason.measure import attention
from memreason.measure.attention import COLLECTING, Flow, collecting, flow, learnt_tokens
from memreason.measure.flows import Asked, flow_table
from memreason.measure.look import close_up, overview
from memreason.measure.segments import FIRST, QUESTION, Part, in_order, segments
from memreason.report.attention import draw_closeup, draw_overview
from memreason.report.drawing import visible

ROWS = 300
SIZES: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "initializer_range": 0.3,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def mistral() -> Any:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5))


def qwen() -> Any:
    """Its second layer sees a window, its first everything."""
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1))


def gemma() -> Any:
    """Scores are capped, and scaled by another number than the width's root."""
    return Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=50)
    )


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_model(ROWS), "mistral": mistral, "qwen": qwen, "gemma": gemma
}  # fmt: skip
IDS = [7, 3, 250, 31, 31, 90, 12, 180, 4, 66, 201, 17]
LABELS = [0, 1, 1, 1, 2, 2, 3, 3, 2, 2, 4, 4]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def exact(model: Any) -> np.ndarray[Any, Any]:
    """(layers, heads, tokens, tokens), from Transformers' own eager attention."""
    with torch.inference_mode(), attending(model, "eager"):
        found = model(torch.tensor([IDS]), output_attentions=True, use_cache=False).attentions
    return torch.cat(found).double().numpy()


def summed(weights: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The definition, in loops: mass from each segment to each, mean over the tokens that look."""
    segments = sorted(set(LABELS))
    found = np.zeros((*weights.shape[:2], len(segments), len(segments)))
    for row in segments:
        for column in segments:
            for query in np.flatnonzero(np.array(LABELS) == row):
                for key in np.flatnonzero(np.array(LABELS) == column):
                    found[:, :, row, column] += weights[:, :, query, key] / LABELS.count(row)
    return found


@pytest.mark.parametrize("cells", [1, 4 * 12 * 5, attention.CELLS])
def test_flow_is_the_sum_of_exact_attention(model: Any, cells: int) -> None:
    with collecting(model, IDS):
        found = flow(model, IDS, LABELS, 5, cells=cells)
    weights = exact(model)
    assert found.mass.shape == (2, weights.shape[1], 5, 5)
    np.testing.assert_allclose(found.mass, summed(weights), atol=1e-5)
    np.testing.assert_allclose(found.mass.sum(-1), 1, atol=1e-5)


def test_mass_per_key_counts_the_keys_that_are_seen(model: Any) -> None:
    """Weights are above zero exactly where a key is seen: also with a window, which may differ by layer."""
    weights = exact(model)
    seen = (weights > 0).astype(float)
    with collecting(model, IDS):
        found = flow(model, IDS, LABELS, 5)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found.per_key, summed(weights) / summed(seen), atol=1e-5)
    assert np.isnan(found.per_key[:, :, 1, 4]).all()  # the question sees nothing of the answer


def test_flow_is_attention_computed_by_hand() -> None:
    """From the matrices of a 2-layer model: queries, keys, rotation, groups, scores, softmax."""
    model = tiny_model(ROWS)
    inner, states = model.model, []
    with torch.inference_mode():
        hooks = [layer.input_layernorm.register_forward_hook(lambda *a: states.append(a[2])) for layer in inner.layers]
        model(torch.tensor([IDS]), use_cache=False)
        for hook in hooks:
            hook.remove()
        cos, sin = inner.rotary_emb(states[0], torch.arange(len(IDS))[None])
        weights = []
        for layer, state in zip(inner.layers, states, strict=True):
            query = layer.self_attn.q_proj(state).view(1, len(IDS), 2, 16).transpose(1, 2)
            key = layer.self_attn.k_proj(state).view(1, len(IDS), 1, 16).transpose(1, 2)
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            scores = torch.einsum("hqw,kw->hqk", query[0], key[0, 0]) / 4
            later = torch.ones(len(IDS), len(IDS), dtype=torch.bool).triu(1)
            weights.append(scores.masked_fill(later, -torch.inf).softmax(-1))
    with collecting(model, IDS):
        found = flow(model, IDS, LABELS, 5, cells=50).mass
    np.testing.assert_allclose(found, summed(torch.stack(weights).double().numpy()), atol=1e-5)


def test_looking_changes_no_logits(model: Any) -> None:
    inputs = torch.tensor([IDS])
    with torch.inference_mode():
        with attending(model, "eager"):
            expected = model(inputs, use_cache=False).logits
        with attending(model, COLLECTING):
            found = model(inputs, use_cache=False, collector=lambda *_: None, cells=100).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_never_more_is_held_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long input: the collector gets no tensor above the limit, each layer's and query's once."""
    model, length, cells = tiny_model(ROWS), 600, 2 * 600 * 16
    most, queries = [0], {0: 0, 1: 0}
    attend = attention._attend

    def spying(module: Any, *tensors: Any, **settings: Any) -> Any:
        inner = settings["collector"]

        def collector(layer: int, first: int, weights: torch.Tensor, seen: torch.Tensor) -> None:
            most.append(weights.numel())
            queries[layer] += weights.shape[1]
            assert first == queries[layer] - weights.shape[1] and weights.shape[2] == queries[layer]
            inner(layer, first, weights, seen)

        return attend(module, *tensors, **{**settings, "collector": collector})

    ids = [n % ROWS for n in range(length)]
    with collecting(model, ids):
        monkeypatch.setitem(attention.AttentionInterface._global_mapping, COLLECTING, spying)
        found = flow(model, ids, [n // 200 for n in range(length)], 3, cells=cells)
    assert 0 < max(most) <= cells < 2 * length**2 / 16
    assert queries == {0: length, 1: length}
    assert found.mass.size == 2 * 2 * 3 * 3


def test_a_layer_or_head_alone() -> None:
    model = tiny_model(ROWS)
    with collecting(model, IDS):
        whole = flow(model, IDS, LABELS, 5).mass
        one = flow(model, IDS, LABELS, 5, pick=lambda layer, w: w.mean(0)[None] if layer == 1 else None).mass
    np.testing.assert_allclose(one[0, 0], whole[1].mean(0), atol=1e-6)


def test_models_that_cannot_be_looked_at_are_refused() -> None:
    """Bloom's attention is its own (ALiBi); one that lacks a score term of its model would give other logits."""
    bloom = BloomForCausalLM(BloomConfig(vocab_size=ROWS, hidden_size=32, n_layer=2, n_head=2)).eval()
    with pytest.raises(ModelError, match="bloom: its attention cannot be looked at"), collecting(bloom, IDS):
        pass
    model = tiny_model(ROWS)
    before = model.config._attn_implementation
    model.config.attention_chunk_size = 4
    with pytest.raises(ModelError, match="llama"), collecting(model, IDS):
        pass
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("method", ["lora+prompt-tuning", "prefix-tuning", "prompt-tuning at front"])
def test_adapted_models(method: str) -> None:
    """Adapters act, and learnt prompts are a segment of their own; those of prefix-tuning ask nothing."""
    front = method.endswith("front")
    scheme = TokenScheme(n_prefix=2, placement="only_at_front") if front else TokenScheme()
    codec = add_tokens(scheme, byte_level())
    base = tiny_model(len(byte_level()))
    add_rows(base, codec)
    recipe = MethodRecipe(name=method.split(" ")[0], lora_module=["q_proj"], lora_r=2)
    if front:
        pytest.importorskip("peft")
        from peft import PromptTuningConfig, get_peft_model

        model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    else:
        model = trainable(base, codec, recipe).eval()
    ids, parts = segments(codec, Question("Is it?", "True"), codec.render(TRACE), learnt=learnt_tokens(model))
    assert len(parts) - len(ids) == learnt_tokens(model)
    order = in_order(part.of_kind() for part in parts)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0, -1]
        with collecting(model, ids):
            found = flow(model, ids, [order.index(part.of_kind()) for part in parts], len(order)).mass
        torch.testing.assert_close(model(input_ids=torch.tensor([ids])).logits[0, -1], expected)
    asking = ~np.isnan(found).any((0, 1, 3))
    assert list(asking) == [not (method == "prefix-tuning" and part.name == "first token") for part in order]
    np.testing.assert_allclose(found[:, :, asking].sum(-1), 1, atol=1e-5)


TRACE = Trace(
    Question("Is $5 <memory_0> more\tthan $x^2$?", "True"),
    (
        Step(("memory",), "Lima lies in South America."),
        Step(("memory",), "$ is a sign & <b> too."),
        Step(("reason",), "so Peru lies in South America."),
    ),
)


def test_segments_cover_the_trace(codec: Codec) -> None:
    """Blocks and texts of every line, numbered by kind; the question's own `<memory_0>` is no block."""
    ids, parts = segments(codec, TRACE.question, codec.render(TRACE))
    assert ids == codec.question_ids(TRACE.question) + codec.render(TRACE)[:-1]  # no end of sequence
    names = list(dict.fromkeys(part.name for part in parts))
    lines = ["memory 1", "memory 2", "reason 1", "answer"]
    assert names == ["first token", "question", *(name for line in lines for name in (f"{line} block", line))]
    planning = {i for block in codec.blocks.values() for i in block}
    assert [part.block for part in parts] == [i in planning for i in ids]
    for line, step in zip(lines, TRACE.steps, strict=False):
        own = [i for i, part in zip(ids, parts, strict=True) if part.name == line]
        assert codec.decode(own) == codec.decode(codec.encode(f" {step.text}\n"))  # not every tokenizer has every sign
    assert (
        codec.decode([i for i, part in zip(ids, parts, strict=True) if part == Part("answer")]).strip().endswith("True")
    )
    assert parts[0] == FIRST and parts[1] == QUESTION


def test_segments_of_what_fits_no_trace(byte_codec: Codec) -> None:
    """Text before a block, a broken one, an answer that goes on: nothing is lost, nothing is taken for a line."""
    whole, planning = byte_codec.render(TRACE)[:-1], byte_codec.blocks
    for ids in ([], [*whole, *planning["memory"], 70], whole[:9], [70, 71, *whole], [planning["answer"][1], 70]):
        fed, parts = segments(byte_codec, TRACE.question, ids)
        assert len(fed) == len(parts) == len(byte_codec.question_ids(TRACE.question)) + len(ids)
    _, parts = segments(byte_codec, TRACE.question, [*whole, *planning["memory"], 70])
    assert parts[-1].name == "other" and parts[-4].name == "answer"


def test_segments_without_blocks_go_by_line() -> None:
    for scheme in (TokenScheme(n_prefix=0, n_special=0), TokenScheme(n_prefix=2, placement="only_at_front")):
        codec = add_tokens(scheme, byte_level())
        ids, parts = segments(codec, TRACE.question, [*codec.render(TRACE)[:-1], *codec.encode("\nand more")])
        names = list(dict.fromkeys(part.name for part in parts))
        front = ["prefix block"] * (scheme.n_prefix > 0)
        assert names == ["first token", "question", *front, "line 1", "line 2", "line 3", "answer", "other"]
        answer = codec.decode([i for i, part in zip(ids, parts, strict=True) if part.name == "answer"])
        assert answer.strip() == "The answer is: True"


def test_kinds_stand_in_order_whatever_they_are_called() -> None:
    names = [
        Part("answer"),
        Part("type_1"),
        Part("reason"),
        Part("memory", block=True),
        QUESTION,
        FIRST,
        Part("memory"),
    ]
    assert [part.name for part in in_order(names * 2)] == [
        "first token", "question", "memory block", "memory", "reason", "type_1", "answer"
    ]  # fmt: skip


def asked(*masses: float, correct: bool = True, group: str = "") -> list[Asked]:
    """A flow of two layers and a head over (question, memory, answer), in which only answer → memory varies."""
    found = []
    for n, value in enumerate(masses):
        mass = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.9 - value, value, 0.1]])[None, None].repeat(2, 0)
        found.append(Asked(Flow(mass, mass / 2), correct, group or f"{correct}{n}"))
    return found


PARTS = [QUESTION, Part("memory"), Part("answer")]


def test_the_table_averages_questions_and_tells_right_from_wrong() -> None:
    right, wrong = (0.2, 0.3, 0.4), (0.5, 0.7)
    table, arrays = flow_table(PARTS, [*asked(*right), *asked(*wrong, correct=False)])
    assert table["segments"] == ["question", "memory", "answer"]
    assert (table["n"], table["layers"], table["heads"]) == ({"all": 5, "correct": 3, "wrong": 2}, 2, 1)
    assert [table["flow"][group][2][1] for group in ("all", "correct", "wrong")] == pytest.approx([0.42, 0.3, 0.6])
    assert table["per_key"]["wrong"][2][1] == pytest.approx(0.3)
    assert {name: values.shape for name, values in arrays.items()}["per_key_all"] == (2, 1, 3, 3)
    (pair,) = [one for one in table["pairs"] if (one["from"], one["to"]) == ("answer", "memory")]
    apart, low, high = pair["mass"]["difference"]
    assert pair["headline"] and pair["mass"]["n"] == [3, 2] and apart == pytest.approx(-0.3)
    assert low < apart < high < 0  # no right answer looks at memory as much as a wrong one
    assert table["strongest"]["answer > memory"][0] == [0, 0, pytest.approx(0.42)]
    json.dumps(table, allow_nan=False)


def test_the_difference_is_of_whole_groups() -> None:
    """Two groups that differ much within: a bootstrap of single questions would give a narrower interval."""
    one = [*asked(0.1, 0.1, 0.1, 0.1, group="a"), *asked(0.5, 0.5, 0.5, 0.5, group="b")]
    other = [*asked(0.2, 0.2, 0.2, 0.2, correct=False, group="c"), *asked(0.6, 0.6, 0.6, correct=False, group="d")]
    alone = [each._replace(group=str(n)) for n, each in enumerate(one + other)]
    widths = []
    for questions in (one + other, alone):
        pairs = flow_table(PARTS, questions)[0]["pairs"]
        _, low, high = next(p for p in pairs if (p["from"], p["to"]) == ("answer", "memory"))["mass"]["difference"]
        widths.append(high - low)
    assert widths[0] > 1.3 * widths[1]


def test_alike_compares_questions_of_one_sort_alone() -> None:
    """Wrong answers are mostly to questions of two lines, where the answer looks at memory more, right or wrong."""
    one = [*asked(0.1, 0.2, 0.1, 0.2), *asked(0.15, correct=False)]
    two = [*asked(0.55), *asked(0.5, 0.6, 0.5, 0.6, correct=False)]
    questions = [each._replace(alike="one", group=f"a{n}") for n, each in enumerate(one)]
    questions += [each._replace(alike="two", group=f"b{n}") for n, each in enumerate(two)]
    pairs = flow_table(PARTS, questions)[0]["pairs"]
    mass = next(p for p in pairs if (p["from"], p["to"]) == ("answer", "memory"))["mass"]
    assert mass["difference"][0] == pytest.approx(0.23 - 0.47) and mass["difference"][2] < 0
    assert mass["alike"][0] == pytest.approx(0) and mass["alike"][1] < 0 < mass["alike"][2]
    assert mass["difference"][0] == pytest.approx(mass["correct"][0] - mass["wrong"][0])
    assert flow_table(PARTS, questions)[0]["alike"] == 10
    apart = flow_table(PARTS, [each._replace(alike=each.correct) for each in questions])[0]  # no sort has both
    assert apart["pairs"][0]["mass"]["alike"] is None and apart["alike"] == 0


def test_what_a_question_lacks_is_left_out() -> None:
    """A question without an answer line has no such row; without wrong answers there is no difference."""
    (none,) = asked(0.4)
    none.flow.mass[:, :, 2] = none.flow.per_key[:, :, 2] = np.nan
    table, _ = flow_table(PARTS, [none, *asked(0.2)])
    assert table["flow"]["all"][2][1] == pytest.approx(0.2) and table["flow"]["wrong"] is None
    (pair,) = [one for one in table["pairs"] if (one["from"], one["to"]) == ("answer", "memory")]
    assert pair["mass"]["n"] == [1, 0] and pair["mass"]["difference"] is pair["mass"]["wrong"] is None
    table, _ = flow_table(PARTS, [none])
    assert table["flow"]["all"][2] == [None] * 3
    json.dumps(table, allow_nan=False)


@pytest.fixture
def tagged(byte_codec: Codec) -> tuple[Any, Codec]:
    model = tiny_model(len(byte_level()))
    add_rows(model, byte_codec)
    return model, byte_codec


def test_a_closeup_is_the_flow_token_by_token(tagged: tuple[Any, Codec]) -> None:
    model, codec = tagged
    ids, question = codec.render(TRACE), replace(TRACE.question, text=TRACE.question.text * 4)
    found = close_up(model, codec, question, ids, layers=[1], heads=[0, 1])
    fed = codec.question_ids(question) + ids[:-1]
    with torch.inference_mode(), attending(model, "eager"):
        weights = model(torch.tensor([fed]), output_attentions=True, use_cache=False).attentions[1][0].numpy()
    assert list(found.maps) == [(1, 0), (1, 1)] and len(fed) > 120  # so the question is one column
    asked_for = len(codec.question_ids(question))
    for (_, head), shown in found.maps.items():
        rows = weights[head, asked_for:]
        whole = np.concatenate([rows[:, :1], rows[:, 1:asked_for].sum(1, keepdims=True), rows[:, asked_for:]], 1)
        np.testing.assert_allclose(shown, whole, atol=1e-5)
    assert found.tokens[1].text == f"question: {asked_for - 1} tokens"
    assert found.trace.steps == TRACE.steps
    texts = {mark.part.name: mark.text for mark in found.lines}
    assert texts["memory 2"] == "$ is a sign & <b> too." and texts["answer block"] == "<prefix_0><answer_0><answer_1>"
    np.testing.assert_allclose(found.steps[1:].sum(-1), 1, atol=1e-5)


def test_heads_that_most_send_answer_to_memory_are_shown(tagged: tuple[Any, Codec]) -> None:
    model, codec = tagged
    found = close_up(model, codec, TRACE.question, codec.render(TRACE))
    places = {mark.part.name: n for n, mark in enumerate(found.lines)}
    assert next(iter(found.maps)) == (1, None) and len(found.maps) == 4
    with collecting(model, codec.question_ids(TRACE.question)):
        fed, parts = segments(codec, TRACE.question, codec.render(TRACE))
        lines = [mark.part for mark in found.lines]
        mass = flow(model, fed, [lines.index(part) for part in parts], len(lines)).mass
    looked = mass[:, :, places["answer"], [places["memory 1"], places["memory 2"]]].sum(-1)
    assert [looked[head] for head in list(found.maps)[1:]] == sorted(looked.flat, reverse=True)[:3]
    with pytest.raises(
        RecipeError, match=r"--layer 2: the model has layers 0 to 1(.|\n)*--head 5: a layer has heads 0 to 1"
    ):
        close_up(model, codec, TRACE.question, codec.render(TRACE), layers=[2], heads=[5])


def texts_of(path: Path) -> list[str]:
    """All texts of an SVG; raises if it is not well-formed."""
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("svg")
    return ["".join(node.itertext()) for node in root.iter() if node.tag.endswith("text")]


def is_pdf(path: Path) -> bool:
    data = path.read_bytes()
    return (
        data.startswith(b"%PDF-1.")
        and data.rstrip().endswith(b"%%EOF")
        and len(re.findall(rb"/Type /Page\b", data)) == 1
    )


def test_pictures_hold_the_tokens(tagged: tuple[Any, Codec], tmp_path: Path) -> None:
    """As letters, whatever they are: no formula is made of dollar signs, no XML of brackets, no line of line breaks."""
    model, codec = tagged
    short = replace(TRACE, steps=(Step(("memory",), "$ & <b>"),)).with_question(text="$x$ <memory_0>\x1b\n\\ 東")
    paths = draw_closeup(close_up(model, codec, short.question, codec.render(short), layers=[0]), tmp_path)
    assert sorted(path.name for path in paths) == ["layer-0-mean.pdf", "layer-0-mean.svg", "steps.pdf", "steps.svg"]
    assert all(is_pdf(path) for path in paths if path.suffix == ".pdf")
    found = texts_of(tmp_path / "layer-0-mean.svg")
    tokens = [
        visible(codec.tokenizer.decode([i])) for i in codec.question_ids(short.question) + codec.render(short)[:-1]
    ]
    for token in {"$", "⏎", "\\", "�", "<memory_0>", "<answer_1>", *tokens} - {""}:
        assert token in found, token
    assert found.count("<memory_0>") == 2  # the block's, in a row and in a column: the question's are characters
    assert any("$ & <b>" in text for text in texts_of(tmp_path / "steps.svg"))
    again = draw_closeup(
        close_up(model, codec, short.question, codec.render(short))._replace(maps={}), tmp_path / "again"
    )
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths[:2]]


SEEN = [
    (" Lima", "Lima"), (" ", "␣"), ("\n\n", "⏎⏎"), ("\x00", "�"), ("\ud800", "�"), ("$", "$"), (" a b", "a b"),
    ("=" * 60, "=" * 17 + "…"),
]  # fmt: skip


@pytest.mark.parametrize(("token", "label"), SEEN)
def test_labels_can_be_seen(token: str, label: str) -> None:
    assert visible(token) == label


def test_pictures_of_an_evaluation(tagged: tuple[Any, Codec], tmp_path: Path) -> None:
    model, codec = tagged
    samples = []
    for n, answer in enumerate(("True", "False", "True")):
        made = replace(TRACE, prediction=answer).with_question(id=str(n))
        ids = codec.render(made)
        samples.append({**made.to_json(), "ids": ids, "meta": {"given": 1}})
    samples.append({**samples[0], "ids": codec.opening(), "meta": {"given": 1}})
    table, arrays = overview(model, codec, samples)
    assert table["n"] == {"all": 3, "correct": 2, "wrong": 1} and table["left_out"] == 1
    for group in ("all", "correct", "wrong"):
        np.testing.assert_allclose(np.array(table["flow"][group]).sum(-1), 1, atol=1e-5)
    paths = draw_overview({**table, "task": "atlas", "split": "test"}, arrays, tmp_path)
    assert [path.name for path in paths] == ["flow.svg", "flow.pdf", "heads.svg", "heads.pdf"]
    assert "correct − wrong" in texts_of(paths[0]) and "answer → memory" in texts_of(paths[2])
    assert is_pdf(paths[1]) and is_pdf(paths[3])


def test_attention_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from memreason import pipeline
    from memreason.cli import main
    from memreason.core.files import read_json, read_jsonl

    changes = {"data.paths": [], "data.task": "atlas", "data.n_train": 12, "eval.n": 4, "train.n_select": 2}
    run = pipeline.train(tiny_recipe(tmp_path, save_base(tmp_path / "base"), **changes))
    assert main(["attention", str(run), "--eval.max_new_tokens", "12"]) == 0
    printed = capsys.readouterr().out
    (path,) = run.glob("checkpoint-*/eval/*/attention.json")
    table, arrays = read_json(path), np.load(path.with_name("attention.npz"))
    assert table["n"]["all"] == 4 and str(path) in printed.replace("\n", "")
    count = len(table["segments"])
    assert arrays["all"].shape == (2, 2, count, count)
    np.testing.assert_allclose(np.array(table["flow"]["all"], dtype=float), arrays["all"].mean((0, 1)), atol=1e-6)
    assert texts_of(run / "attention" / path.parent.name / "flow.svg")

    asking = [
        "attention",
        str(run),
        "--question",
        "Is $5 <memory_0> $x$?",
        "--choice",
        "a\nb",
        "--eval.max_new_tokens",
        "6",
    ]
    assert main([*asking, "--layer", "1", "--head", "0"]) == 0
    assert "Is $5 <memory_0> $x$?" in capsys.readouterr().out
    (drawn,) = run.glob("attention/*/layer-1-head-0.svg")
    assert "$" in texts_of(drawn)

    line = next(value for _, value in read_jsonl(path.with_name("samples.jsonl")))
    assert main(["attention", str(run), "--id", line["id"], "--layer", "0", "--eval.max_new_tokens", "12"]) == 0
    assert line["question"] in capsys.readouterr().out
    assert texts_of(run / "attention" / line["id"] / "layer-0-mean.svg")

    for wrong, told in (
        (["--layer", "1"], "give --question or --id"),
        (["--id", "x", "--question", "y"], "leave out --question"),
        (["--id", "../../x"], "has no such question"),
        (["--question", "Is it?", "--layer", "9"], "--layer 9: the model has layers 0 to 1"),
    ):
        assert main(["attention", str(run), *wrong]) == 2
        assert told in capsys.readouterr().err
