"""Kinds told by arithmetic: traps of real solutions, and the law that their blocks come back as they were."""

import itertools
import json
from pathlib import Path

import pytest

from conftest import byte_level
from memreason.core.recipe import load_recipe
from memreason.core.stages import DataRecipe
from memreason.core.trace import Question, Step, Trace
from memreason.data import tasks
from memreason.data.arithmetic import OPERATIONS, OPERATORS, arithmetic_kinds, label_arithmetic, operation_kinds
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_tokens


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("There are 12-4-3 = <<12-4-3=5>>5 slices", "-"),
        ("<<5*3=15>>15 then <<15-3=12>>12 and <<2*6=12>>12", "*-"),
        ("40 - 10 = <<30=30>>30", ""),  # an annotation that computes nothing decides too
        ("<<-14+-8+1=-21>>", "+"),
        ("<<18/-2=-9>>", "/"),
        ("<<1-.25=.75>>", "-"),
        ("<<1999-10-20=1969>>", "-"),
    ],
)
def test_annotations_decide(text: str, kinds: str) -> None:
    assert arithmetic_kinds(text) == tuple(kinds)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("960-480-120 = 360", "-"),
        ("20/2-6 = 4", "/-"),
        ("3 + -2 = 1", "+"),
        ("5 * (3 - 1) = 10", "*-"),
        ("$60$ - $36$ = $24$", "-"),
        ("5€ + 3€ = 8€", "+"),
        ("20 – 12 = 8", "-"),
        ("12 x 2 = 24", "*"),
        ("8 boxes x $3 = $24", "*"),
        ("2x3 = 6", "*"),
        ("so it is 4x + 3 = 11", "+"),
        ("x = 4", ""),
        ("50% + 25% = 75%", "+"),
        ("22/7 ≈ 3.14", "/"),
        ("profit = selling price - cost price", "-"),
        ("40 students x $6/day = $240", "*"),
    ],
)
def test_plain_equations(text: str, kinds: str) -> None:
    assert arithmetic_kinds(text) == tuple(kinds)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (r"$3 \times 5 \div 2 = 7.5$", "*/"),
        (r"$3\times5=15$", "*"),
        (r"$\left(3+5\right)-2 = 6$", "+-"),
        (r"$\frac{3+5}{2} = 4$", "/+"),
        (r"$\dfrac{\sqrt{3}}{2} = y$", "/"),
        (r"$1 + 2 + \cdots + 10 = 55$", "+"),
        (r"$a_1 \cdots a_n = 1$", ""),
        (r"$a_{n-1} = 5$", ""),
        (r"$x^{-1} = 2$", ""),
        (r"$x \le -3$ or $x = -5$", ""),
        (r"$2\pi - \pi/2 = y$", "-/"),
        (r"$|x| + |y| = 1$", "+"),
        (r"$20\% \cdot 50 = 10$", "*"),
    ],
)
def test_latex(text: str, kinds: str) -> None:
    assert arithmetic_kinds(text) == tuple(kinds)


@pytest.mark.parametrize(
    "text",
    [
        "A well-known 3-year-old T-shirt = 5 dollars",
        "The x-axis and/or the y-intercept = 4",
        "60 km/h or 17 m/s or $5/day = speed",
        "On 2024-03-01, also written 01/03/2024, it was = 5",
        "It was -5, Rs. -3, that is = -8",
        "**Answer**: x = 5",
        "-> x = 5 --> y = 3",
        "3 + 5 without an equals sign",
        "",
    ],
)
def test_no_operators(text: str) -> None:
    assert arithmetic_kinds(text) == ()


@pytest.mark.parametrize("n_prefix", [0, 1, 3])
@pytest.mark.parametrize("n_special", [1, 2])
def test_blocks_of_operators_come_back(n_prefix: int, n_special: int) -> None:
    codec = add_tokens(TokenScheme(n_prefix=n_prefix, n_special=n_special, kinds=OPERATORS), byte_level())
    for size in range(len(OPERATORS) + 1):
        for kinds in itertools.permutations(OPERATORS, size):
            steps = (Step(kinds, "<<3*5=15>> <+_0> <*_0>"), Step((), "- * /"))
            trace = Trace(Question("2+2 <+_0>?", "4"), steps)
            parsed = codec.parse(trace.question, codec.render(trace))
            assert (parsed.steps, parsed.prediction, parsed.faults) == (steps, "4", ())


def test_labelling_keeps_all_but_kinds() -> None:
    question = Question("q", "15", "gsm8k", "train", meta={"group": "g"})
    trace = label_arithmetic(Trace(question, (Step(("memory",), "3 * 5 = 15"), Step((), "So it is 15."))))
    assert trace == Trace(question, (Step(("*",), "3 * 5 = 15"), Step((), "So it is 15.")))


def test_train_and_validation_are_labelled_alike() -> None:
    splits = tasks.load_splits(DataRecipe(task="atlas", n_train=8, step_types="arithmetic"))
    for part in (splits.train, splits.validation):
        assert {kind for trace in part for step in trace.steps for kind in step.kinds} <= set(OPERATORS)


def test_what_an_import_left_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMREASON_HOME", str(tmp_path))
    monkeypatch.setattr(tasks, "PUBLISHED_FOLDER", tmp_path)
    row = {"answer": "True", "cot_steps": ["[rag]: Ice is light.", "[reason]: "], "split": "train"}
    rows = [{"question": f"Does ice {n} float?", **row} for n in range(4)]
    (tmp_path / "StrategyQA_train_clean.json").write_text(json.dumps([*rows, {"question": ""}]))
    told: list[str] = []
    splits = tasks.load_splits(DataRecipe(task="strategyqa", validation=0.25), warn=told.append)
    assert len(splits.train) + len(splits.validation) == 4
    assert any("4 of 5 traces kept, 4 steps left out" in line for line in told)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (r"$\frac{3}{4} + \sqrt{2} = x^2$", "+ power root fraction"),
        (r"$\binom{5}{2} = 5!/12 = 10$", "/ factorial"),
        (r"$17 = 2 \cdot 7 + 3$, so $17 \equiv 3 \pmod{7}$", "* + modulo"),
        (r"$\sin 30^\circ = 1/2$", "/ trig"),
        ("20% of 50 = 10", "percent"),
        ("3:2 = 1.5", "ratio"),
        ("it is 3:30 pm = half past", ""),
        (r"$x \le 5$", "compare"),
        ("a -> b => c", ""),
        (r"$\log_2 8 = 3$", "log"),
        ("<<3*5=15>>15 < 20", "* compare"),
        ("3 + 5 without an equals sign", ""),
        ("", ""),
    ],
)
def test_fourteen_kinds(text: str, kinds: str) -> None:
    assert operation_kinds(text) == tuple(kinds.split())


def test_the_fourteen_are_fourteen_blocks() -> None:
    assert len(set(OPERATIONS)) == 14
    recipe = load_recipe(None, {"data.task": "math", "data.step_types": "arithmetic-14"})
    assert recipe.tokens.kinds == list(OPERATIONS)
