"""Arms that train nothing: a run like any other, answers of untrained models read without guessing, any chat server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from completions import Completions, completing
from conftest import byte_level, own_traces, save_base, tiny_recipe
from memreason import pipeline
from memreason.core.errors import ExportError, RecipeError
from memreason.core.files import read_json, read_jsonl, read_traces, write_traces
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question, Trace
from memreason.encode import free
from memreason.encode.codec import Codec
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_tokens
from memreason.exports import export
from memreason.finetune.checkpoint import load_checkpoint, open_checkpoint
from memreason.generate import likeliest
from memreason.generate.engines import generate
from memreason.measure import reading
from memreason.measure.score import score_trace
from memreason.timing.workload import workload

PROMPTING = {"method.name": "prompting", "tokens.add": False}
TOLD = "End with: The answer is: True, or False."
POSITIONS = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=512))
CHOICES = ("Peru", "Kenya", "Cuba", "Chad")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def free_codec() -> Codec:
    return add_tokens(TokenScheme(n_prefix=0, n_special=0, free=True), byte_level())


def prompted(folder: Path, base: Path, **changes: Any) -> Path:
    recipe = tiny_recipe(folder, base, **PROMPTING, **changes)
    return pipeline.train(recipe)


def test_a_run_that_trains_nothing_is_a_run(tmp_path: Path, base: Path) -> None:
    asked = {"eval.task": str(tmp_path / "traces.jsonl"), "tokens.instruction": TOLD}
    run = prompted(tmp_path, base, **asked)
    assert read_json(run / "manifest.json")["best"] == {"checkpoint": "checkpoint-0", "by": "nothing was trained"}
    written = (run / "manifest.json").stat().st_mtime_ns
    assert prompted(tmp_path, base, **asked) == run  # says that it is done
    assert (run / "manifest.json").stat().st_mtime_ns == written
    found = pipeline.evaluate(run)
    made = read_traces(Path(found["folder"]) / "samples.jsonl")
    assert found["n"] == 24 and [one.question.id for one in made] == [one.question.id for one in own_traces(24)]
    assert not list((run / "checkpoint-0").glob("*.safetensors"))
    codec = open_checkpoint(run).codec
    assert codec.scheme.free and not codec.blocks
    prompt = codec.decode(codec.question_ids(made[0].question))
    assert prompt == f"Question: {made[0].question.text}\n{TOLD}\n"


def test_a_kill_behind_its_checkpoint_costs_nothing(tmp_path: Path, base: Path) -> None:
    run = prompted(tmp_path, base)
    (run / "manifest.json").unlink()
    assert read_json(prompted(tmp_path, base) / "manifest.json")["best"]["checkpoint"] == "checkpoint-0"


def test_what_prompting_cannot_do_is_said(tmp_path: Path, base: Path) -> None:
    with pytest.raises(RecipeError, match=r"tokens.add: nothing is trained by method prompting"):
        tiny_recipe(tmp_path, base, **{"method.name": "prompting"})
    with pytest.raises(RecipeError, match="prompting trains nothing, so there is nothing to estimate"):
        workload(tiny_recipe(tmp_path, base, **PROMPTING))
    with pytest.raises(ExportError, match=r"nothing was trained .* ask it with --eval.engine chat"):
        export(prompted(tmp_path, base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


READ = [  # what is said, gold, choices, verdict
    ("True", "True", None, "correct"),
    ("**False**", "False", None, "correct"),
    ("Lima lies in Peru.\nThe answer is: **True**.", "True", None, "correct"),
    ("So the answer is:\n\n**True**", "True", None, "correct"),
    ("Answer: no", "False", None, "correct"),
    ("No.\n\nLima lies in Peru.", "False", None, "correct"),
    ("The correct answer is **B**.", "B", CHOICES, "correct"),
    ("(B)", "B", CHOICES, "correct"),
    ("Kenya (B)", "B", CHOICES, "correct"),
    ("B. Kenya", "B", CHOICES, "correct"),
    ("Kenya", "B", CHOICES, "correct"),
    ("The answer is: True\n\nQuestion: Is Rome in Asia?\nThe answer is: False", "True", None, "correct"),
    ("No, Lima is the capital.\nIt is.", "False", None, "correct"),
    ("The answer is: Kenya (B)", "B", CHOICES, "correct"),
    ("The answer is: **Kenya**.", "B", CHOICES, "correct"),
    ("The answer is: 1,200.", "1200", None, "correct"),
    ("The answer is: True\nThe answer is: False", "True", None, "wrong"),  # the last phrase counts
    # Garbage: nothing of it is an answer.
    ("The answer is: True, or False.", "True", None, "no_answer"),
    ("The answer is: ...", "True", None, "no_answer"),
    ("True\nFalse", "True", None, "no_answer"),
    ("It is true that Lima is large.", "True", None, "no_answer"),
    ("A\nB\nC\nD", "D", CHOICES, "no_answer"),
    ("Peru (A) Kenya (B) Cuba (C) Chad (D)", "A", CHOICES, "no_answer"),
    ("A country in Africa is meant.", "A", CHOICES, "no_answer"),
    ("No doubt it is.", "False", None, "no_answer"),
    ("The answer is: Cuba (B)", "B", CHOICES, "no_answer"),
    ("The answer is: Peru (A) Kenya (B)", "A", CHOICES, "no_answer"),
    ("Yes, or no?\nFalse", "True", None, "wrong"),
    ("B. Cuba", "B", CHOICES, "no_answer"),
    ("Kenya lies in Africa.", "B", CHOICES, "no_answer"),
    ("Question: Is Rome in Asia?\nThe answer is: True", "True", None, "no_answer"),
    ("", "True", None, "no_answer"),
]


@pytest.mark.parametrize(("said", "gold", "choices", "verdict"), READ)
def test_free_answers_are_read_and_garbage_is_not(
    free_codec: Codec, said: str, gold: str, choices: tuple[str, ...] | None, verdict: str
) -> None:
    question = Question("Is it so?", gold, choices=choices)
    made = free_codec.parse(question, [*free_codec.encode(said), free_codec.eos_id])
    assert score_trace(made).verdict == verdict
    assert ("no answer line" in made.faults) == (not made.prediction)


def test_lines_before_a_free_answer_are_its_steps(free_codec: Codec) -> None:
    ids = free_codec.encode("Lima is in Peru.\n\nPeru is in South America, so the answer is: True.\nDone.")
    made = free_codec.parse(Question("Is it?", "True"), ids)
    assert [step.text for step in made.steps] == ["Lima is in Peru.", "Peru is in South America, so"]
    assert made.prediction == "True" and made.faults == ("no end of sequence",)
    for step, (first, end) in zip(made.steps, made.meta["spans"], strict=True):
        assert step.text in free_codec.decode(ids[first:end])


def test_phrases_are_those_of_the_scorer() -> None:
    assert free.PHRASE.pattern.startswith(reading.PHRASE.pattern)


def test_an_answer_that_goes_on_with_another_question_has_ended(free_codec: Codec) -> None:
    ids = free_codec.encode("The answer is: True\n\nQuestion:")
    assert free.is_over(free_codec, ids) and not free.is_over(free_codec, ids[:-1])


def test_any_chat_server_is_asked(tmp_path: Path, base: Path) -> None:
    run = prompted(tmp_path, base, **{"data.k_shot": 2, "tokens.instruction": TOLD})
    opened = open_checkpoint(run)
    said = "Lima is the capital.\n\nThe answer is: **True**" + " indeed" * 40
    reply = opened.codec.encode(said)

    def following(ids: list[int]) -> list[int]:
        return [*reply, opened.codec.eos_id]

    server = Completions(opened.codec.tokenizer, opened.codec.eos_id, following, style="chat")
    with completing(server):
        changes = {"engine": "chat", "base_url": server.url, "max_new_tokens": 400, "n": 3}
        task = {"task": str(tmp_path / "traces.jsonl")}
        settings = opened.recipe.eval.model_copy(update={**changes, **task})
        found = pipeline.evaluate(run, settings=settings)
    made = read_traces(Path(found["folder"]) / "samples.jsonl")
    assert [(one.steps[0].text, one.prediction[:4]) for one in made] == [("Lima is the capital.", "True")] * 3
    turns = server.questions()[-1]["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2 + ["user"]
    assert all(turn["content"].endswith(TOLD) for turn in turns[::2])
    assert "The answer is: " in turns[1]["content"] and "<" not in turns[1]["content"]


def test_of_a_reply_without_an_answer_the_likeliest_is_taken(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, from the whole text: log-probability of each letter behind reply and cue. Nothing is asked twice."""
    run = prompted(tmp_path, base)
    questions = [Question(f"Where? {n}", "B", choices=CHOICES[: 2 + n]) for n in range(3)]
    questions += [trace.question for trace in own_traces(3)]
    write_traces(tmp_path / "asked.jsonl", [Trace(question, ()) for question in questions])
    opened = load_checkpoint(run)
    model, codec = opened.model.eval(), opened.codec
    changes = {"task": str(tmp_path / "asked.jsonl"), "n_samples": 2, "temperature": 1.0, "max_new_tokens": 30}
    settings = opened.recipe.eval.model_copy(update=changes)
    found = pipeline.evaluate(run, settings=settings)
    lines = [line for _, line in read_jsonl(Path(found["folder"]) / "samples.jsonl")]
    assert len(lines) == 12 and found["no_answer"] == 0
    named = [line for line in lines if None in line["logprobs"]]
    assert len(named) > 8  # random rows say nothing
    for line in named:
        question = Trace.from_json(line).question
        text = codec.decode(line["ids"])
        reply, _, said = text.rpartition("The answer is:")
        assert said.strip() == line["prediction"] and line["ids"][-1] == codec.eos_id
        known = [place for place, value in enumerate(line["logprobs"]) if value is not None]
        spoken, place = len(known) - 1, known[-1]
        assert codec.decode(line["ids"][:spoken]).strip() == reply.strip()
        with torch.no_grad():
            ids = codec.question_ids(question) + line["ids"][:place]
            scores = model(torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)
        behind = {answer: codec.encode(f"The answer is: {answer}") for answer in free.answers_of(question)}
        differ = next(n for n, column in enumerate(zip(*behind.values(), strict=False)) if len(set(column)) > 1)
        likely = {answer: float(scores[rest[differ]]) for answer, rest in behind.items()}
        assert line["prediction"] == max(likely, key=lambda answer: likely[answer])
        assert line["logprobs"][place] == pytest.approx(likely[line["prediction"]], abs=1e-3)

    def refuse(*_: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(likeliest, "_next_logprobs", refuse)
    assert pipeline.evaluate(run, settings=settings)["accuracy"] == found["accuracy"]


def test_a_reply_longer_in_our_tokens_keeps_its_end(free_codec: Codec) -> None:
    said = "Lima " * 30 + "\nThe answer is: True"
    settings = {"engine": "chat", "max_new_tokens": 20}
    server = Completions(byte_level(), 0, lambda ids: free_codec.encode(said), style="chat")
    server.answer = lambda path, body: (  # type: ignore[method-assign]
        200,
        {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]},
    )
    with completing(server):
        used = EvalRecipe(base_url=server.url, **settings)
        ((one,),) = generate(POSITIONS, free_codec, [Question("Is it?", "True")], used)
    assert free_codec.parse(one.question, one.ids).prediction == "True"


def test_free_schemes_survive_their_file(tmp_path: Path, free_codec: Codec) -> None:
    free_codec.scheme.save(tmp_path)
    assert TokenScheme.load(tmp_path) == free_codec.scheme
