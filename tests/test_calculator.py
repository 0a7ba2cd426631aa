"""The calculator: sums by a parser of its own, results put behind `<<48/2=` while the batch goes on."""

import math
import re

import pytest

from conftest import save_base, tiny_recipe
from memreason import pipeline
from memreason.core.errors import RecipeError
from memreason.core.files import write_traces
from memreason.core.recipe import load_recipe
from memreason.core.trace import Question, Step, Trace
from memreason.finetune.checkpoint import Checkpoint, load_checkpoint
from memreason.generate.calculator import calculate
from memreason.generate.engines import generate


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("48/2", "24"),
        ("3*5+2", "17"),
        ("2+3*4-(1-5)*2", "22"),
        ("-(2+3)", "-5"),
        ("2--3", "5"),
        (".5*10", "5"),
        ("1,200*2", "2400"),
        ("20%*50", "10"),
        ("$5×3", "15"),
        ("10/4", "2.5"),
        ("1/3", "0.3333333333"),
        ("0.1+0.2", "0.3"),  # exact, where floats give 0.30000000000000004
        ("7/0", None),
        ("2**99999999", None),
        ("(1+2", None),
        ("1 2", None),
        ("", None),
        ("x+1", None),
        ("__import__('os')", None),
        ("(" * 200 + "1" + ")" * 200, None),
        ("9" * 90 + "*1.5", "1.5e+90"),
    ],
)
def test_sums(text: str, value: str | None) -> None:
    assert calculate(text) == value


def summed(first: int, second: int, said: int) -> Trace:
    line = f"It is {first}+{second}=<<{first}+{second}={said}>>{said} in all."
    return Trace(Question(f"How much are {first} and {second}?", str(said)), (Step(("reason",), line),))


@pytest.fixture(scope="module")
def wrong_model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Trained to write 9 as every sum."""
    folder = tmp_path_factory.mktemp("sums")
    write_traces(folder / "traces.jsonl", [summed(a, b, 9) for a in range(1, 6) for b in range(1, 6)])
    changes = {"train.max_steps": 150, "train.per_device_train_batch_size": 8, "method.name": "full"}
    return load_checkpoint(pipeline.train(tiny_recipe(folder, save_base(folder / "base"), **changes)))


def test_results_are_put_in_and_other_rows_go_on(wrong_model: Checkpoint) -> None:
    """The result stands where the model would write another, in whatever batch, and its figures are unknown."""
    sums = [(a, b) for a in range(1, 5) for b in range(1, 5)]
    questions = [summed(a, b, 9).question for a, b in sums] + [Question("Is Lima a city?", "True")]

    def answered(in_flight: int, calculator: bool) -> dict[str, tuple[list[int], list[float]]]:
        changes = {"batch_size": in_flight, "calculator": calculator, "max_new_tokens": 80}
        settings = wrong_model.recipe.eval.model_copy(update=changes)
        made = generate(wrong_model.model, wrong_model.codec, questions, settings)
        return {one.question.text: (one.ids, one.logprobs) for batch in made for one in batch}

    without, alone, together = answered(8, False), answered(1, True), answered(8, True)
    assert {text: ids for text, (ids, _) in alone.items()} == {text: ids for text, (ids, _) in together.items()}
    right = 0
    for question in questions:
        ids, logprobs = together[question.text]
        said = wrong_model.codec.decode(ids)
        sums_there = [found for found in re.finditer(r"<<([^<>=\n]*)=", said) if calculate(found[1])]
        if not sums_there:
            assert ids == without[question.text][0]
            continue
        expression, behind = sums_there[0][1], said[sums_there[0].end() :]
        assert behind.startswith(f"{calculate(expression)}>>")
        unknown = [n for n, value in enumerate(logprobs) if math.isnan(value)]
        given = wrong_model.codec.encode(f"{calculate(expression)}>>")
        assert unknown[: len(given)] == list(range(unknown[0], unknown[0] + len(given)))
        opening = len(ids) - len(logprobs)
        assert ids[opening + unknown[0] :][: len(given)] == given
        right += ids != without[question.text][0]
    assert right >= 12  # nearly all rows reach their sum


def test_other_engines_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"eval\.calculator needs local"):
        load_recipe(None, {"eval.calculator": True, "eval.engine": "vllm"})
