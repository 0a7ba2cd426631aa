"""Memory lines replaced while they are written, what samples tell of it, thresholds, and the commands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import byte_level, greedy, save_base, tiny_model, tiny_recipe
from memreason import pipeline
from memreason.cli import main
from memreason.core.errors import ModelError, TaskError
from memreason.core.files import read_json, read_jsonl, read_traces, write_json
from memreason.core.stages import EvalRecipe
from memreason.core.trace import MEMORY, REASON, Question, Step, Trace
from memreason.encode.codec import Codec
from memreason.encode.examples import collate, encode_trace
from memreason.encode.pieces import IGNORED
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_rows, add_tokens
from memreason.generate import decode
from memreason.generate.answer import answer_questions, read_samples
from memreason.generate.choose import Taken
from memreason.generate.engines import generate
from memreason.generate.recall import FLOOR, LINE_TOKENS, Search, _reader, is_unsure, retrieving, sureness
from memreason.generate.rows import Generation, start
from memreason.measure.confidence import line_figures
from memreason.measure.unsure import calibrated, retrieved_share, youden
from memreason.retrieve.corpus import corpus_hash


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMREASON_HOME", str(tmp_path / "home"))


@dataclass
class Fluent:
    """A tiny model that knows a few traces by heart."""

    model: Any
    codec: Codec
    traces: list[Trace]

    @property
    def questions(self) -> list[Question]:
        return [trace.question for trace in self.traces]

    def answer(
        self, search: Search | None = None, threshold: float = 0.0, precede: bool = False, **changes: Any
    ) -> dict[str, Generation]:
        settings = EvalRecipe(**{"batch_size": 2, "max_new_tokens": 70, **changes})
        engine = retrieving(search, threshold, precede=precede) if search else None
        made = generate(self.model, self.codec, self.questions, settings, engine=engine)
        return {f"{one.question.id}-{one.sample}": one for batch in made for one in batch}

    def trace(self, one: Generation) -> Trace:
        return self.codec.parse(one.question, one.ids)


def known_traces() -> list[Trace]:
    places = [("Peru", "Lima", "America"), ("Japan", "Tokyo", "Asia"), ("Chad", "Lima", "Africa")]
    return [
        Trace(
            Question(f"Where is {city} of {country}?", "True"),
            (
                Step((MEMORY,), f"{city} is in {country}."),
                Step((MEMORY,), f"{country} is in {land}."),
                Step((REASON,), f"so in {land}."),
            ),
        )
        for country, city, land in places
    ]


@pytest.fixture(scope="module")
def fluent() -> Fluent:
    codec = add_tokens(TokenScheme(n_prefix=1, n_special=2), byte_level())
    model, traces = tiny_model(len(byte_level())), known_traces()
    add_rows(model, codec)
    batch = collate([encode_trace(codec, trace) for trace in traces], codec.eos_id)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    for _ in range(100):
        loss = model(**inputs).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return Fluent(model.eval(), codec, traces)


def scripted(text: str | None, asked: list[Any] | None = None) -> Search:
    """A search that finds one and the same passage."""

    def search(lines: Sequence[tuple[Question, str]]) -> list[tuple[str, str] | None]:
        if asked is not None:
            asked.extend(lines)
        return [None if text is None else ("p1", text) for _ in lines]

    return search


def test_the_tiny_model_knows_its_traces(fluent: Fluent) -> None:
    made = fluent.answer()
    for trace in fluent.traces:
        found = fluent.trace(made[f"{trace.question.id}-0"])
        assert (found.steps, found.prediction, found.faults) == (trace.steps, "True", ())


@pytest.mark.parametrize("decoding", ["greedy", "sample"])
def test_nothing_unsure_is_plain_recall(fluent: Fluent, decoding: Any) -> None:
    asked: list[Any] = []
    settings = {"decoding": decoding, "n_samples": 2 if decoding == "sample" else 1}
    made = fluent.answer(scripted("Other.", asked), -math.inf, **settings)
    plain = fluent.answer(**settings)
    assert not asked and made == plain


@pytest.mark.parametrize("decoding", ["greedy", "sample"])
def test_nothing_found_leaves_every_line_as_it_was(fluent: Fluent, decoding: Any) -> None:
    asked: list[Any] = []
    settings = {"decoding": decoding, "n_samples": 2 if decoding == "sample" else 1}
    made = fluent.answer(scripted(None, asked), math.inf, **settings)
    plain = fluent.answer(**settings)
    assert {key: one.ids for key, one in made.items()} == {key: one.ids for key, one in plain.items()}
    assert not any(one.retrieved for one in made.values())
    lines = [(one.question, step.text) for one in plain.values() for step in fluent.trace(one).of_kind(MEMORY)]
    assert sorted(asked, key=str) == sorted(lines, key=str)  # each line once


def test_every_line_is_replaced_and_what_follows_sees_it(fluent: Fluent) -> None:
    text, asked = "Mars is in space.", list[Any]()
    made = fluent.answer(scripted(text, asked), math.inf)
    codec, body = fluent.codec, fluent.codec.encode(f" {text}\n")
    for trace in fluent.traces:
        one = made[f"{trace.question.id}-0"]
        lines = [step.text for step in fluent.trace(one).of_kind(MEMORY)]
        assert set(lines[: len(one.retrieved)]) == {text}
        assert one.retrieved[0].own == trace.steps[0].text
        assert (trace.question, trace.steps[0].text) in asked
        # the block is the model's own; behind the passage everything is what plain decoding gives from there
        start = one.retrieved[0].place + len(body)
        assert one.ids[:start] == [*codec.block("prefix", "memory"), *body]
        end = one.retrieved[1].place if len(one.retrieved) > 1 else len(one.ids)
        rest = greedy(fluent.model, codec.question_ids(one.question) + one.ids[:start], codec.eos_id, end - start)
        assert one.ids[start:end] == rest


def test_a_passage_may_stand_before_the_models_own_line(fluent: Fluent) -> None:
    """Each passage is a line of its own, with a block; the model's line behind it is not looked up again."""
    text, asked = "Mars is in space.", list[Any]()
    made = fluent.answer(scripted(text, asked), math.inf, True, max_new_tokens=120)
    codec = fluent.codec
    block = list(codec.block("prefix", "memory"))
    body = codec.encode(f" {text}\n")
    for trace in fluent.traces:
        one = made[f"{trace.question.id}-0"]
        first = one.retrieved[0]
        assert one.ids[: first.end] == [*block, *body, *block]
        end = one.retrieved[1].place if len(one.retrieved) > 1 else len(one.ids)
        prompt = codec.question_ids(one.question) + one.ids[: first.end]
        assert one.ids[first.end : end] == greedy(fluent.model, prompt, codec.eos_id, end - first.end)
        assert fluent.trace(one).steps[0].text == text
    assert len(asked) == sum(len(one.retrieved) for one in made.values())


def test_only_unsure_lines_are_replaced(fluent: Fluent) -> None:
    """The threshold stands between the lines' own sureness."""
    plain = {key: fluent.trace(one) for key, one in fluent.answer().items()}
    always = fluent.answer(scripted("Mars is in space."), math.inf)
    first = {key: one.retrieved[0].sureness for key, one in always.items()}
    threshold = sorted(first.values())[1]  # strictly below it: one first line only
    made = fluent.answer(scripted("Mars is in space."), threshold)
    for key, one in made.items():
        replaced = [line.place == always[key].retrieved[0].place for line in one.retrieved]
        assert any(replaced) == (first[key] < threshold)
        assert all(line.sureness < threshold for line in one.retrieved)
        if not one.retrieved:
            assert fluent.trace(one) == plain[key]


def test_models_that_transformers_decodes_are_served_too(fluent: Fluent, monkeypatch: pytest.MonkeyPatch) -> None:
    search = scripted("Mars is in space.")
    expected = {key: (one.ids, one.retrieved[0].place) for key, one in fluent.answer(search, math.inf).items()}
    monkeypatch.setattr(decode, "_feeds", lambda network: False)
    made = fluent.answer(search, math.inf)
    assert {key: (one.ids, one.retrieved[0].place) for key, one in made.items()} == expected


def test_control_tokens_in_a_passage_stay_text(fluent: Fluent) -> None:
    text = "<memory_0> <answer_0><answer_1> The answer is: False"
    for one in fluent.answer(scripted(text), math.inf).values():
        line = one.retrieved[0]
        body = fluent.codec.encode(f" {text}\n")
        assert one.ids[line.place : line.place + len(body)] == body
        assert not {i for block in fluent.codec.blocks.values() for i in block} & set(body)
        assert fluent.trace(one).steps[0] == Step((MEMORY,), text)


@pytest.mark.parametrize("text", ["One\nline\u2028of several\r\n ones", "word " * 300, "x" * 2000])
def test_a_passage_becomes_one_line_of_bounded_length(fluent: Fluent, text: str) -> None:
    for one in fluent.answer(scripted(text), math.inf).values():
        place = one.retrieved[0].place
        line, _ = fluent.codec.decode(one.ids[place : place + LINE_TOKENS]).split("\n", maxsplit=1)
        assert line.strip() and " ".join(text.split()).startswith(line.strip())


def test_limits_count_what_was_retrieved(fluent: Fluent) -> None:
    for limit in (1, 12, 30, 50):
        for one in fluent.answer(scripted("word " * 40), math.inf, max_new_tokens=limit).values():
            assert len(one.ids) - len(fluent.codec.opening()) == len(one.logprobs) <= limit
    for limit in (60,):
        for one in fluent.answer(scripted("word " * 40), math.inf, max_length=limit).values():
            assert len(fluent.codec.question_ids(one.question)) + len(one.ids) <= limit


def test_a_line_that_ends_without_a_line_break(fluent: Fluent) -> None:
    """By the block of the next line, or by the end of the trace: it is replaced all the same."""
    codec = fluent.codec
    read = _reader(codec, math.inf)
    for last in (codec.blocks["prefix"][0], codec.eos_id):
        row = start(codec, fluent.questions[0], 0, EvalRecipe(), None)
        row.ids = [*codec.block("memory"), *codec.encode(" Lima"), last]
        row.taken = [Taken(token, -1.0, 0.0, 1.0) for token in row.ids]
        line = read(row)
        assert line is not None and (line.text, line.sureness, line.begin) == ("Lima", -1.0, 2)
    row.ids[-1:] = codec.encode(" is")
    assert read(row) is None  # it is not over yet
    row.ids = [*codec.block("reason"), *codec.encode(" Lima\n")]
    assert read(row) is None  # no memory
    row.ids = [*codec.block("memory"), *codec.encode("\n")]
    assert read(row) is None  # nothing to look up


def test_schemes_without_memory_blocks_are_refused(fluent: Fluent) -> None:
    for scheme in (TokenScheme(placement="only_at_front"), TokenScheme(n_special=0), TokenScheme(kinds=("reason",))):
        other = replace(fluent, codec=add_tokens(scheme, byte_level()))
        with pytest.raises(ModelError, match="no memory blocks"):
            other.answer(scripted("x"), math.inf)


def test_sureness_has_a_floor() -> None:
    assert sureness([-1.0, -3.0]) == -2.0
    assert sureness([-1.0, None]) == sureness([-1.0, math.nan]) == sureness([-1.0, -1e9]) == (FLOOR - 1.0) / 2
    assert sureness([]) == FLOOR
    assert is_unsure(-2.0, -1.0) and not is_unsure(-1.0, -1.0) and not is_unsure(-0.5, -1.0)
    assert is_unsure(0.0, math.inf) and not is_unsure(FLOOR, -math.inf)
    assert not is_unsure(0.0, FLOOR * 100) and is_unsure(FLOOR, 0.0)


def test_samples_tell_what_was_retrieved(fluent: Fluent, tmp_path: Path) -> None:
    settings = EvalRecipe(batch_size=2, max_new_tokens=70)
    engine = retrieving(scripted("Mars is in space."), math.inf)
    answer_questions(fluent.model, fluent.codec, fluent.questions[:1], settings, folder=tmp_path, engine=engine)
    traces = answer_questions(fluent.model, fluent.codec, fluent.questions, settings, folder=tmp_path, engine=engine)
    assert read_traces(tmp_path / "samples.jsonl") == traces
    for line, trace in zip(read_samples(tmp_path), fluent.traces, strict=True):
        (own, *_), given = line["meta"]["recalled"], line["meta"]["given"]
        assert line["steps"][0] == {"kinds": [MEMORY], "text": "Mars is in space.", "source": "p1"}
        assert (own["step"], own["text"]) == (0, trace.steps[0].text) and FLOOR <= own["sureness"] < 0
        assert len(line["ids"]) - given == len(line["logprobs"]) == len(line["entropies"]) == len(line["margins"])
        for step, (first, last), body in zip(line["steps"], line["meta"]["spans"], line["meta"]["bodies"], strict=True):
            for name in ("logprobs", "entropies", "margins"):
                figures = line[name][max(0, first - given) : last - given]
                missing = [value is None for value in figures]
                text = last - body if "source" in step else 0
                assert missing == [False] * (len(figures) - text) + [True] * text
        assert line_figures(line)[0] == {"logprob": None, "entropy": None, "margin": None}
    share = retrieved_share(traces)
    lines = [step for trace in traces for step in trace.of_kind(MEMORY)]
    assert share == {"memory_lines": len(lines), "retrieved": sum(step.source == "p1" for step in lines) / len(lines)}
    assert retrieved_share(fluent.traces) == {"memory_lines": 6, "retrieved": 0.0}


def test_retrieved_text_is_masked_from_the_loss(codec: Codec, trace: Trace) -> None:
    steps = (replace(trace.steps[0], source="p1"), trace.steps[1])
    row, plain = encode_trace(codec, replace(trace, steps=steps)), encode_trace(codec, trace)
    assert row["input_ids"] == plain["input_ids"]
    body = codec.encode(f" {trace.steps[0].text}\n")
    begin = len(codec.question_ids(trace.question)) + len(codec.block("prefix", MEMORY))
    assert row["input_ids"][begin : begin + len(body)] == body
    assert row["labels"][begin : begin + len(body)] == [IGNORED] * len(body)
    rest = [n for n in range(len(row["labels"])) if not begin <= n < begin + len(body)]
    assert [row["labels"][n] for n in rest] == [plain["labels"][n] for n in rest]
    assert row["labels"][begin - 1] != IGNORED  # that it is time to remember is taught


# --- thresholds


def test_youden_finds_the_best_cut() -> None:
    scores, false = [-4.0, -3.0, -2.5, -2.0, -1.0, -0.5], [True, True, False, True, False, False]
    found = youden(scores, false)
    assert found == {"threshold": -1.5, "j": 1 - 1 / 3, "false_below": 1.0, "true_below": pytest.approx(1 / 3)}
    assert youden([-2.0, -1.0], [True, False]) == {"threshold": -1.5, "j": 1.0, "false_below": 1.0, "true_below": 0.0}
    assert youden([-1.0, -2.0], [True, True]) is None and youden([-1.0], [False]) is None
    assert youden([-1.0, -1.0], [True, False]) is None and youden([], []) is None


def test_youden_is_the_best_of_all_cuts() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        false = random.random(50) < 0.4
        scores = np.round(random.normal(size=50) - false, 1)
        found = youden(scores.tolist(), false.tolist())
        assert found is not None
        gains = [(scores[false] < t).mean() - (scores[~false] < t).mean() for t in np.arange(-5, 5, 0.05)]
        assert found["j"] == pytest.approx(max(gains))
        cut = found["threshold"]
        assert found["j"] == pytest.approx((scores[false] < cut).mean() - (scores[~false] < cut).mean())


def sample(text: str, logprob: float, prediction: str = "True", number: int = 0) -> dict[str, Any]:
    """A sample of one memory line of two tokens."""
    trace = Trace(Question(f"Is it so? {number}", "True"), (Step((MEMORY,), text),), prediction=prediction)
    meta = {"spans": [[0, 4]], "bodies": [2], "given": 1, "sample": 0}
    return {**trace.to_json(), "meta": meta, "logprobs": [-9.0, logprob, logprob, -9.0]}


def test_calibration_checks_lines_where_it_can() -> None:
    true, false = "The capital of Peru is Lima.", "The capital of Peru is Cusco."
    samples = [sample(true, -0.1), sample(true, -0.3), sample(false, -0.5), sample(false, -0.9, number=1)]
    found = calibrated([*samples, sample("Something else.", -5.0, number=2)])
    assert (found["threshold"], found["n"], found["false"], found["auroc"]) == (pytest.approx(-0.4), 4, 2, 1.0)
    assert found["way"] == "lines checked against the facts"
    assert found["quantiles"]["50"] == -0.5  # of all five lines, of which one cannot be checked


def test_calibration_elsewhere_goes_by_the_answers() -> None:
    right = [sample("Cats purr.", -0.1 - n / 10, number=n) for n in range(3)]
    wrong = [
        sample("Cats bark.", -1.0, prediction="False", number=9),
        sample("Cats fly.", -2.0, prediction="", number=8),
    ]
    found = calibrated(right + wrong)
    assert (found["threshold"], found["n"], found["false"]) == (pytest.approx(-0.65), 5, 2)
    assert "wrong" in found["way"]
    with pytest.raises(TaskError, match="of 3 memory lines 0 count as false"):
        calibrated(right)


# --- the commands


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on atlas that has learnt nothing."""
    folder = tmp_path_factory.mktemp("run")
    changes = {"data.paths": [], "data.task": "atlas", "data.n_train": 12, "eval.n": 3, "train.n_select": 2}
    changes |= {"train.max_steps": 1}
    return pipeline.train(tiny_recipe(folder, save_base(folder / "base"), **changes))


def test_commands(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint,) = run.glob("checkpoint-*")
    assert main(["eval", str(run)]) == 0
    plain = {path.name for path in checkpoint.glob("eval/*")}
    assert main(["eval", str(run), "--eval.corpus", "atlas"]) == 0  # of no account without eval.memory
    assert {path.name for path in checkpoint.glob("eval/*")} == plain
    capsys.readouterr()
    assert main(["eval", str(run), "--eval.memory", "retrieve", "--eval.corpus", "atlas"]) == 0
    assert "memory retrieved" in capsys.readouterr().out
    (path,) = [path for path in checkpoint.glob("eval/*/results.json") if path.parent.name not in plain]
    assert read_json(path)["memory"] == "retrieve" and read_json(path)["corpus"] == corpus_hash("atlas")
    assert main(["eval", str(run), "--eval.memory", "retrieve"]) == 2
    assert "eval.corpus: eval.memory retrieve needs one" in capsys.readouterr().err
    unsure = ["eval", str(run), "--eval.memory", "retrieve-when-unsure", "--eval.corpus", "atlas"]
    assert main(unsure) == 2
    assert "memreason calibrate" in capsys.readouterr().err
    assert main(["calibrate", str(run)]) == 2  # it writes no memory lines that could be false
    assert "nothing to calibrate with" in capsys.readouterr().err
    assert main(["retrieve", str(run)]) == 2
    assert "--eval.corpus atlas" in capsys.readouterr().err


def test_the_curve(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint,) = run.glob("checkpoint-*")
    quantiles = {"10": -3.0, "25": -2.0, "50": -1.0, "75": -0.5}
    write_json(checkpoint / "calibration.json", {"threshold": -0.7, "quantiles": quantiles})
    try:
        for _ in range(2):  # the second time everything is there
            assert main(["retrieve", str(run), "--eval.corpus", "atlas"]) == 0
    finally:
        (checkpoint / "calibration.json").unlink()
    assert "-0.7000" in capsys.readouterr().out
    (path,) = checkpoint.glob("retrieve/*/curve.json")
    names = {point["name"] for point in read_json(path)["points"]}
    assert names == {"recall", "retrieve", "calibrated", *(f"{share} % least sure" for share in quantiles)}
    assert path.with_suffix(".svg").read_text(encoding="utf-8").lstrip().startswith("<?xml")
    assert all(point["n"] == 3 and len(point["interval"]) == 2 for point in read_json(path)["points"])
    assert len(list(read_jsonl(Path(read_json(path)["points"][0]["folder"]) / "samples.jsonl"))) == 3
