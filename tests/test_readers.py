"""Readers of public data sets through local copies, and the laws of mixing and parting training sets."""

import json
from collections import Counter

import datasets
import huggingface_hub.constants
import pytest

from memreason.core.errors import DataError, RecipeError, TaskError
from memreason.core.trace import LETTERS, Question, Trace
from memreason.data.mix import carve_validation, leak_guard, mix, subset
from memreason.data.readers import (
    HUB_TASKS,
    commonsenseqa_rows,
    mmlu_pro_rows,
    read_hub,
    strategyqa_rows,
    truthfulqa_rows,
)

STRATEGY = [
    {"question": "Does ice float? ", "answer": True, "facts": "Ice is light.", "term": "Ice"},
    {"question": "Do stones float?", "answer": False, "facts": "", "term": "Stone"},
]
COMMON = [
    {"question": "Where is it?", "choices": {"label": ["A", "B"], "text": ["bank ", "mall"]}, "answerKey": "B"},
    {"question": "Who is it?", "choices": {"label": ["1", "2"], "text": ["me", "you"]}, "answerKey": "1"},
]
TRUTH = [
    {"question": f"What is {n}?", "mc1_targets": {"choices": [f"right {n}", "x", "y", "z"], "labels": [1, 0, 0, 0]}}
    for n in range(10)
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_strategyqa_from_a_folder_of_files(tmp_path):
    folder = tmp_path / "copy"
    write_jsonl(folder / "train.jsonl", STRATEGY)
    write_jsonl(folder / "test.jsonl", STRATEGY[:1])
    train = read_hub("strategyqa", "train", path=folder)
    assert [(t.question.text, t.answer) for t in train] == [("Does ice float?", "True"), ("Do stones float?", "False")]
    assert [t.question.facts for t in train] == [("Ice is light.",), None]
    assert [t.question.group for t in train] == ["Ice", "Stone"]
    assert [t.question.split for t in read_hub("strategyqa", "test", path=folder)] == ["test"]
    assert not any(t.steps for t in train)


def test_commonsenseqa_takes_validation_for_test(tmp_path):
    folder = tmp_path / "copy"
    unanswered = [{**COMMON[0], "answerKey": ""}]
    for name, rows in {"train": COMMON, "validation": COMMON[1:], "test": unanswered}.items():
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    assert [t.answer for t in read_hub("commonsenseqa", "train", path=folder)] == ["B", "A"]
    (only,) = read_hub("commonsenseqa", "test", path=folder)
    assert (only.question.choices, only.question.split) == (("me", "you"), "test")


def test_truthfulqa_is_cut_in_two_and_from_disk_or_file_alike(tmp_path):
    saved = tmp_path / "saved"
    datasets.DatasetDict({"validation": datasets.Dataset.from_list(TRUTH)}).save_to_disk(saved)
    plain = write_jsonl(tmp_path / "truth.jsonl", TRUTH)
    parts = {split: read_hub("truthfulqa", split, path=saved) for split in ("train", "test")}
    assert [len(part) for part in parts.values()] == [8, 2]
    assert [t.question.text for t in parts["train"] + parts["test"]] == [row["question"] for row in TRUTH]
    assert read_hub("truthfulqa", "train", path=plain) == parts["train"]


def test_mmlu_pro_is_parted_across_its_subjects(tmp_path):
    rows = [
        {"question": f"Q{n}?", "options": ["a", "b", "c", "N/A"], "answer": "C", "category": "law" if n < 50 else "art"}
        for n in range(100)
    ]
    write_jsonl(tmp_path / "test.jsonl", rows)
    parts = {split: read_hub("mmlu-pro", split, path=tmp_path) for split in ("train", "test")}
    assert [len(part) for part in parts.values()] == [80, 20]
    assert {trace.question.id for trace in parts["train"]}.isdisjoint(trace.question.id for trace in parts["test"])
    assert {trace.question.meta["category"] for trace in parts["test"]} == {"law", "art"}
    question = parts["train"][0].question
    assert (question.choices, question.answer, question.split) == (("a", "b", "c"), "C", "train")


def test_a_copy_of_the_hub_repository_is_read_by_its_configuration(tmp_path):
    folder = tmp_path / "truthful_qa"
    write_jsonl(folder / "multiple_choice" / "validation.jsonl", TRUTH)
    write_jsonl(folder / "generation" / "validation.jsonl", [{"question": "Q?", "best_answer": "a"}])
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: validation\n    path: {name}/*\n"
        for name in ("generation", "multiple_choice")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert len(read_hub("truthfulqa", "test", path=folder)) == 2


def test_the_right_choice_keeps_its_letter_through_the_shuffle():
    for seed in range(5):
        for number, trace in enumerate(truthfulqa_rows(TRUTH, seed=seed)):
            assert trace.question.choices[LETTERS.index(trace.answer)] == f"right {number}"
            assert trace.question.meta["option_seed"] == seed


def test_the_shuffle_depends_on_question_and_seed_alone():
    assert truthfulqa_rows(TRUTH[::-1])[::-1] == truthfulqa_rows(TRUTH)
    assert truthfulqa_rows(TRUTH, seed=1) != truthfulqa_rows(TRUTH, seed=2)
    assert len({trace.answer for trace in truthfulqa_rows(TRUTH)}) > 1


def test_choices_may_be_a_list_of_pairs():
    pairs = [{"label": "A", "text": "bank"}, {"label": "B", "text": "mall"}]
    assert commonsenseqa_rows([{**COMMON[0], "choices": pairs}])[0].question.choices == ("bank", "mall")


def test_facts_may_be_a_list_and_a_decomposition_is_no_fact():
    row = {**STRATEGY[0], "facts": ["One.", " ", "Two."], "decomposition": ["Is it light?"]}
    question = strategyqa_rows([row])[0].question
    assert question.facts == ("One.", "Two.")
    assert question.meta["decomposition"] == ["Is it light?"]


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        (strategyqa_rows, {"question": "Q?", "answer": "maybe"}, "row 1: 'answer' must be true or false"),
        (strategyqa_rows, {"answer": True}, "row 1: 'question' must be"),
        (commonsenseqa_rows, {**COMMON[0], "answerKey": ""}, "validation split is the test split"),
        (commonsenseqa_rows, {"question": "Q?"}, "'answerKey' must be one of"),
        (mmlu_pro_rows, {"question": "Q?", "options": ["a", "N/A"], "answer": "B"}, "must be one of A, got 'B'"),
        (truthfulqa_rows, {"question": "Q?"}, "multiple_choice"),
        (truthfulqa_rows, {"question": "Q?", "mc1_targets": {"choices": ["a"], "labels": [1, 1]}}, "single label"),
    ],
)
def test_a_bad_row_is_named(reader, row, message):
    with pytest.raises(DataError, match=message):
        reader([row])


def test_without_network_the_error_names_a_remedy():
    for task in HUB_TASKS:
        with pytest.raises(TaskError, match=r"could not be read from the hub.*local copy"):
            read_hub(task, "test")


def test_unknown_tasks_splits_and_copies_are_errors(tmp_path):
    with pytest.raises(TaskError, match="Known: "):
        read_hub("nonsense", "train")
    with pytest.raises(TaskError, match="It has: train, test"):
        read_hub("strategyqa", "validation")
    with pytest.raises(DataError, match="no such file or folder"):
        read_hub("strategyqa", "train", path=tmp_path / "none")
    with pytest.raises(DataError, match="not read"):
        read_hub("strategyqa", "train", path=__file__)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be read as a local copy"):
        read_hub("strategyqa", "train", path=tmp_path / "empty")
    write_jsonl(tmp_path / "half" / "train.jsonl", STRATEGY)
    with pytest.raises(DataError, match="has no split 'test', only train"):
        read_hub("strategyqa", "test", path=tmp_path / "half")


def traces(count, *, groups=None, prefix="q"):
    return [
        Trace(Question(f"{prefix}{n}?", "True", "t", meta={"group": f"g{n % groups}"} if groups else {}), ())
        for n in range(count)
    ]


def texts(some):
    return [trace.question.text for trace in some]


def test_leak_guard_drops_the_same_question_however_it_is_written():
    held_out = [Trace(Question("Is Bob's face  seen?", "True", "b", choices=("one", "two")), ())]
    same = Trace(Question("is Bob’s face seen", "False", "a", choices=("Two", "one")), ())
    other = Trace(Question("Is Bob's face seen?", "True", "b", choices=("one", "three")), ())
    assert leak_guard([same, other], held_out) == ([other], [same])


def test_leak_guard_parts_and_leaves_nothing_to_drop():
    train, held_out = traces(10), traces(4)
    kept, dropped = leak_guard(train, held_out)
    assert sorted(texts(kept + dropped)) == sorted(texts(train))
    assert leak_guard(kept, held_out) == (kept, [])
    assert len(dropped) == 4


def test_leak_guard_tells_sums_apart():
    plus, minus = (Trace(Question(f"3 {sign} 5?", "8"), ()) for sign in "+-")
    assert leak_guard([plus], [minus]) == ([plus], [])


@pytest.mark.parametrize("weight", [0.3, 1, 2, 2.5])
def test_mix_shows_each_trace_weight_times(weight):
    source = traces(10)
    counts = Counter(texts(mix([(source, weight), (traces(3, prefix="other"), 1)], seed=1)))
    own = [counts[text] for text in texts(source)]
    assert sum(own) == round(weight * 10)
    assert set(own) <= {int(weight), int(weight) + (weight % 1 > 0)}


def test_mix_is_seeded_and_sources_are_drawn_apart():
    one, two = traces(20), traces(20, prefix="other")
    assert mix([(one, 0.5), (two, 1)], 1) == mix([(one, 0.5), (two, 1)], 1) != mix([(one, 0.5), (two, 1)], 2)
    drawn = [{t for t in texts(mix([(one, 0.5), (two, weight)], 1)) if t.startswith("q")} for weight in (0.2, 3)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), 0])
def test_mix_refuses_weights_of_no_meaning(weight):
    with pytest.raises(RecipeError, match="weight"):
        mix([(traces(2), weight)], 0)


@pytest.mark.parametrize("wanted", [0.2, 10])
def test_validation_shares_no_group_and_loses_nothing(wanted):
    whole = traces(50, groups=13)
    train, validation = carve_validation(whole, wanted, seed=3)
    assert sorted(texts(train + validation)) == sorted(texts(whole))
    assert not {t.question.group for t in train} & {t.question.group for t in validation}
    assert 0 < len(validation) <= 10
    assert {t.question.split for t in validation} == {"validation"}


def test_validation_does_not_depend_on_order():
    whole = traces(30)
    one, other = (carve_validation(given, 5, seed=3)[1] for given in (whole, whole[::-1]))
    assert texts(one) == texts(other)[::-1]
    assert len(one) == 5
    assert texts(one) != texts(carve_validation(whole, 5, seed=4)[1])


@pytest.mark.parametrize("wanted", [0, 10, 11, 1.0, -0.1, True, float("nan"), 0.001])
def test_validation_of_no_size_is_an_error(wanted):
    with pytest.raises(TaskError, match="validation of"):
        carve_validation(traces(10), wanted, 0)


def test_validation_smaller_than_every_group_is_an_error():
    with pytest.raises(TaskError, match="smallest group holds 5"):
        carve_validation(traces(10, groups=2), 2, 0)


def test_subset_is_without_replacement_and_in_order():
    whole = traces(20)
    drawn = texts(subset(whole, 8, seed=1))
    assert len(set(drawn)) == 8
    assert drawn == [text for text in texts(whole) if text in drawn]
    assert drawn == texts(subset(whole, 8, seed=1)) != texts(subset(whole, 8, seed=2))
    assert subset(whole, 20, seed=1) == whole
    for wrong in (0, 21):
        with pytest.raises(TaskError, match="1 to 20"):
            subset(whole, wrong, 1)
