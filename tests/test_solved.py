"""Sets that carry solutions, and kinds of steps from their arithmetic."""

import json
from pathlib import Path

import datasets
import pytest

from conftest import byte_level
from memreason.core.errors import DataError
from memreason.core.stages import DataRecipe
from memreason.core.trace import Question, Step, Trace
from memreason.data import tasks
from memreason.data.arithmetic import OPERATORS, arithmetic_kinds, label_arithmetic
from memreason.data.readers import read_hub
from memreason.data.solved import aqua_rows, boxed, math_rows
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_tokens
from memreason.measure.score import score

GSM8K = [
    {
        "question": "Natalia sold 48 clips in April and half as many in May. How many?",
        "answer": "She sold 48/2 = <<48/2=24>>24 in May.\nThat is 48+24 = <<48+24=72>>72 in all.\n#### 1,072",
    }
]
MATH = [{"problem": "Find $x$.", "level": "Level 1", "type": "Algebra", "solution": "So\n$x = \\boxed{\\frac{1}{2}}$."}]
AQUA = [
    {
        "question": "How far?",
        "options": ["A)21", "B)21.5", "C) 22"],
        "rationale": "v*t = 7*3\n\nAnswer: A",
        "correct": "A",
    }
]
SVAMP = [
    {"ID": "1", "Body": "There are 8 bins.", "Question": "How many?", "Equation": "( 8.0 - 3.0 )", "Answer": "5.0"}
]
QA = [{"question": "Does ice float?", "answer": True, "facts": "Ice is light. Water is not.", "term": "Ice"}]
ROWS = {"gsm8k": GSM8K, "math": MATH, "aqua": AQUA, "svamp": SVAMP, "qa": QA}
EXPECTED = {  # answer, steps
    "gsm8k": ("1072", ["She sold 48/2 = <<48/2=24>>24 in May.", "That is 48+24 = <<48+24=72>>72 in all."]),
    "math": ("\\frac{1}{2}", ["So", "$x = \\boxed{\\frac{1}{2}}$."]),
    "aqua": ("A", ["v*t = 7*3", "Answer: A"]),
    "svamp": ("5", ["( 8.0 - 3.0 ) = 5"]),
    "qa": ("True", ["Ice is light.", "Water is not."]),
}


@pytest.mark.parametrize("task", ROWS)
def test_local_copies(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[task]))
    (trace,) = read_hub(task, "train", path=tmp_path / "copy")
    answer, steps = EXPECTED[task]
    assert (trace.question.answer, [step.text for step in trace.steps]) == (answer, steps)
    assert (trace.question.task, trace.question.split) == (task, "train")
    kinds = {kind for step in trace.steps for kind in step.kinds}
    assert kinds == ({"memory"} if task == "qa" else set())
    assert trace.question.choices == (("21", "21.5", "22") if task == "aqua" else None)


def test_solved_sets_are_trained_on_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEMREASON_HOME", str(tmp_path))
    monkeypatch.setattr(
        tasks,
        "read_hub",
        lambda task, split: [
            Trace(Question(f"q{n}", "1", task), (Step((), "2*3 = 6"),)) for n in (range(6) if split == "train" else [5])
        ],
    )
    splits = tasks.load_splits(DataRecipe(task="gsm8k", validation=0.2, step_types="arithmetic"))
    assert (len(splits.train), len(splits.validation)) == (4, 1)
    assert [trace.question.text for trace in splits.leaked] == ["q5"]
    assert {step.kinds for trace in splits.train for step in trace.steps} == {("*",)}
    with pytest.raises(DataError, match="no labelled traces"):
        tasks.load_splits(DataRecipe(task="commonsenseqa"))


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("<<3*5+2=17>>17 is what is left - really", ("*", "+")),
        ("He has 48/2 = <<48/2=24>>24.", ("/",)),
        ("3 * 5 = 15", ("*",)),
        ("$x + 2 = 5$, so $x = 5 - 2 = 3$", ("+", "-")),
        (r"$\frac{1}{2} \cdot 4 = 2$", ("/", "*")),
        ("6 × 2 = 12 ÷ 1", ("*", "/")),
        ("A well-known price = 5 dollars", ()),
        ("On 2024-03-01 it was = -5", ()),
        ("x = -5", ()),
        ("3 + 5 is not an equation", ()),
        ("no numbers", ()),
    ],
)
def test_arithmetic_kinds(text: str, kinds: tuple[str, ...]) -> None:
    assert arithmetic_kinds(text) == kinds


def test_arithmetic_blocks_render_and_parse() -> None:
    codec = add_tokens(TokenScheme(n_prefix=1, n_special=2, kinds=OPERATORS), byte_level())
    (trace,) = [
        label_arithmetic(read) for read in [Trace(Question("q", "17"), (Step((), "<<3*5+2=17>>"), Step((), "so")))]
    ]
    assert [step.kinds for step in trace.steps] == [("*", "+"), ()]
    parsed = codec.parse(trace.question, codec.render(trace))
    assert (parsed.steps, parsed.prediction, parsed.faults) == (trace.steps, "17", ())


def test_bad_rows_name_their_place() -> None:
    with pytest.raises(DataError, match=r"aqua, row 1: ValueError 'correct' must be one of ABC"):
        aqua_rows([{**AQUA[0], "correct": "Z"}])
    with pytest.raises(DataError, match=r"math, row 1: question and answer must not be empty"):
        math_rows([{**MATH[0], "solution": "no box"}])
    with pytest.raises(DataError, match=r"math, row 1: KeyError 'problem' \(fields: text\)"):
        math_rows([{"text": "x"}])
    assert boxed(r"\boxed{1} and \boxed{a_{b}}") == "a_{b}"
    assert boxed(r"\boxed{open") == ""
    assert [boxed(text) for text in (r"so $x = \boxed 2$.", r"\fbox{3}", "none")] == ["2", "3", ""]


@pytest.mark.parametrize(
    ("text", "gold", "verdict"),
    [
        ("The answer is: $72", "72", "correct"),
        ("The answer is: 145.0", "145", "correct"),
        (r"The answer is: \frac{1}{2}", r"\frac{1}{2}", "correct"),
        (r"The answer is: \boxed{\frac{1}{2}}", r"\frac{1}{2}", "correct"),
        (r"The answer is: $x^2+1$", "x^2+1", "correct"),
        (r"The answer is: $\text{(C)}$.", r"\text{(C)}", "correct"),
        ("The answer is: (1,2)", "(1,2)", "correct"),
        (r"The answer is: (-\infty,2)", r"(-\infty,2]", "wrong"),
        (r"The answer is: \frac{1}{3}", r"\frac{1}{2}", "wrong"),
    ],
)
def test_their_answers_are_scored(text: str, gold: str, verdict: str) -> None:
    assert score(text, gold).verdict == verdict
