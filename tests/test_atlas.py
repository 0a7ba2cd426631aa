"""atlas: no name crosses a split, answers follow from the facts, forms are balanced."""

import re

import pytest

from memreason.core.errors import TaskError
from memreason.core.trace import LETTERS
from memreason.data.atlas import FORMS, atlas_table, make_atlas, memory_line_true
from memreason.data.atlas_facts import borders, countries, split_of

SIZES = {"train": 2000, "validation": 200, "test": 300}


@pytest.mark.parametrize("split", SIZES)
def test_no_name_crosses_a_split(split: str) -> None:
    foreign = [name.removeprefix("the ") for name, own in split_of().items() if own != split]
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, foreign)) + r")\b")
    for trace in make_atlas(split, SIZES[split]):
        question = trace.question
        texts = [question.text, *(question.choices or ()), *(step.text for step in trace.steps)]
        texts += [str(fact) for fact in question.facts or ()]
        # A city may carry a country's name of its own split (Guatemala City); no other may appear.
        assert not [text for text in texts if pattern.search(text)]


@pytest.mark.parametrize("split", SIZES)
def test_lines_and_answers_follow_from_facts(split: str) -> None:
    for trace in make_atlas(split, SIZES[split], seed=1):
        assert trace.of_kind("memory")
        assert len(trace.of_kind("reason")) == 1
        assert all(memory_line_true(step.text) for step in trace.of_kind("memory"))
        question = trace.question
        if question.choices:
            right = question.choices[LETTERS.index(question.answer)]
            assert trace.steps[-1].text.endswith(f" is {right} ({question.answer}).")
        else:
            assert trace.steps[-1].text.endswith("the same." if question.answer == "True" else "different.")
        if question.meta["form"] in ("same_continent", "three_on_continent", "capitals_on_continent"):
            continents = {fact["object"] for fact in question.facts or () if fact["relation"] == "continent"}
            assert (len(continents) == 1) == (question.answer == "True")
        if question.meta["form"] == "capital_is":
            assert (question.facts[0]["object"] in question.text) == (question.answer == "True")


def test_balance_size_and_seed() -> None:
    traces = make_atlas("test", 300)
    assert len(FORMS) >= 8
    assert len({trace.question.id for trace in traces}) == 300
    for row in atlas_table(traces):
        assert row["majority"] <= row["chance"] + 0.05
    two = sum(trace.question.choices is None for trace in traces)
    assert two == len(traces) / 2  # as many true / false as multiple choice
    assert make_atlas("test", 50) == make_atlas("test", 50)
    assert make_atlas("test", 50) != make_atlas("test", 50, seed=1)
    for split in SIZES:
        assert len(borders([name for name, own in split_of().items() if own == split])) >= 20


def test_knobs_vary_alone() -> None:
    assert {t.question.meta["hops"] for t in make_atlas("train", 60, hops=[2])} == {2}
    table = countries()
    for trace in make_atlas("train", 60, obscurity=(0.5, 1.0)):
        assert all(table[name].rank >= 0.5 for name in trace.question.meta["countries"])


def test_false_and_unknown_lines() -> None:
    assert memory_line_true("The capital of Peru is Bogota.") is False
    assert memory_line_true("The capital of Kazakhstan is Nur-Sultan.") is True
    assert memory_line_true("The capital of Kazakhstan is Astana.") is True
    assert memory_line_true("Peru borders Bolivia.") is True
    assert memory_line_true("Peru borders Kenya.") is False
    assert memory_line_true("Peru is nice.") is None


def test_impossible_wishes() -> None:
    with pytest.raises(TaskError, match="were asked for"):
        make_atlas("validation", 10_000, forms=["capital_is"])
    with pytest.raises(TaskError, match="no split"):
        make_atlas("dev", 5)
    with pytest.raises(TaskError, match="no form"):
        make_atlas("test", 5, forms=["nonsense"])
