"""Arms that train nothing: a run as any other, whose weights are the base's; and any chat model as an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from conftest import own_traces, save_base, tiny_recipe
from memreason import pipeline
from memreason.cli import main
from memreason.core.errors import RecipeError
from memreason.core.files import read_json, read_jsonl
from memreason.core.kinds import PAUSE
from memreason.core.recipe import Recipe
from memreason.core.stages import DataRecipe
from memreason.core.trace import Question, Step, Trace
from memreason.data.lines import prepared_lines
from memreason.encode.base import load_model, load_tokenizer
from memreason.finetune.checkpoint import load_checkpoint
from memreason.finetune.prepare import prepare
from stub import Replies, listening

NOTHING = {"method.name": "prompting", "tokens.add": False}


def prompted(folder: Path, **changes: Any) -> Recipe:
    base = folder / "base"
    given = {"eval.task": str(folder / "traces.jsonl"), "eval.n": 4, "eval.max_new_tokens": 6}
    return tiny_recipe(folder, base if base.is_dir() else save_base(base), **NOTHING | given | changes)


def test_nothing_is_trained_and_the_answers_are_the_base_models_own(tmp_path: Path) -> None:
    recipe = prompted(tmp_path, **{"tokens.instruction": "Say True or False."})
    run = pipeline.train(recipe)
    assert (
        not list(run.rglob("*.safetensors"))
        and read_json(run / "manifest.json")["best"]["checkpoint"] == "checkpoint-0"
    )
    loaded = load_checkpoint(run)
    base = load_model(str(tmp_path / "base"), dtype="fp32")
    assert all((a == b).all() for a, b in zip(loaded.model.parameters(), base.parameters(), strict=True))
    question = own_traces(1)[0].question
    asked = load_tokenizer(str(tmp_path / "base")).decode(loaded.codec.question_ids(question))
    assert asked == "Question: Is Lima the capital of Peru? 0\nSay True or False.\n"
    results = pipeline.evaluate(run, settings=recipe.eval)
    assert results["n"] == 4 and results["answered_before"] == 0
    assert pipeline.train(recipe) == run  # says that it is done
    assert pipeline.evaluate(run, settings=recipe.eval)["answered_before"] == 4


def test_an_instruction_stands_in_a_chat_too(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}assistant:"
    tokenizer.save_pretrained(base)
    codec = prepare(prompted(tmp_path, **{"tokens.template": "chat", "tokens.instruction": "Say True."})).codec
    asked = tokenizer.decode(codec.question_ids(Question("Is Lima in Peru?", "True")))
    assert asked == "user: Is Lima in Peru?\nSay True.<|end|>assistant:"


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"tokens.add": True}, "tokens.add: nothing is trained by method prompting"),
        (
            {"method.name": "lora", "eval.engine": "chat", "eval.base_url": "http://x/v1"},
            "eval.engine: chat asks another",
        ),
        ({"eval.engine": "chat"}, "eval.base_url: eval.engine chat needs one"),
    ):
        with pytest.raises(RecipeError, match=message):
            prompted(tmp_path, **changes)
    with pytest.raises(RecipeError, match=r"tokens\.instruction: braces"):
        pipeline.train(prompted(tmp_path, **{"tokens.instruction": "Is it {question}"}))


class Chat(Replies):
    """Answers every message with two lines; remembers what it was asked."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        self.reply(200, {"object": "list", "data": [{"id": "any", "object": "model"}]})

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.body()))
        content = "Lima is in Peru.\nThe answer is: **True**"
        usage = {"prompt_tokens": 3, "completion_tokens": 9}  # of another tokenizer: nothing is made of it
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        self.reply(200, {"choices": [choice], "usage": usage})


def test_any_chat_model_is_asked_in_words(tmp_path: Path) -> None:
    with listening(Chat) as port:
        served = {"eval.max_new_tokens": 64, "eval.engine": "chat", "eval.base_url": f"http://127.0.0.1:{port}/v1"}
        recipe = prompted(tmp_path, **served, **{"tokens.instruction": "Say True or False."})
        results = pipeline.run(recipe)
    assert (results["n"], results["accuracy"], results["no_answer"]) == (4, 0.5, 0)  # every other answer is True
    assert {one["messages"][0]["content"].split("? ")[0] for one in Chat.asked} == {
        "Question: Is Lima the capital of Peru"
    }
    assert all(one["messages"][0]["content"].endswith("Say True or False.") for one in Chat.asked)
    lines = [line for _, line in read_jsonl(Path(results["folder"]) / "samples.jsonl")]
    assert lines[0]["steps"] == [{"kinds": [], "text": "Lima is in Peru."}] and lines[0]["logprobs"][0] is None


def test_it_is_a_command_like_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(prompted(tmp_path).to_yaml())
    assert main(["train", str(path), "--dry-run"]) == 0 and "nothing is trained" in capsys.readouterr().out
    assert main(["run", str(path)]) == 0
    assert main(["ask", str(tmp_path / "run"), "Is Lima the capital of Peru?"]) == 0


def lines_of(trace: Trace) -> list[tuple[str, tuple[str, ...]]]:
    return [(step.text, step.kinds) for step in trace.steps]


def test_controls_change_lines_or_kinds_alone() -> None:
    steps = tuple(Step((kind,), f"{kind} {n}") for n, kind in enumerate(("reason", "memory", "reason", "memory")))
    traces = [Trace(Question(f"Is it {n}?", "True"), steps) for n in range(20)]
    assert all(not trace.steps for trace in prepared_lines(traces, DataRecipe(lines="none")))
    ordered = prepared_lines(traces, DataRecipe(lines="memory-first"))[0]
    assert [text for text, _ in lines_of(ordered)] == ["memory 1", "memory 3", "reason 0", "reason 2"]
    paused = prepared_lines(traces, DataRecipe(step_types="pause"))[0]
    assert lines_of(paused) == [(step.text, (PAUSE,)) for step in steps]
    dealt = prepared_lines(traces, DataRecipe(step_types="shuffled"))
    kinds = [step.kinds[0] for trace in dealt for step in trace.steps]
    assert sorted(kinds) == sorted(["reason", "memory"] * 40) and kinds != [step.kinds[0] for step in steps] * 20
    assert [step.text for step in dealt[3].steps] == [step.text for step in steps]
    assert dealt == prepared_lines(traces, DataRecipe(step_types="shuffled"))
