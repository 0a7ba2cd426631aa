"""The importer of published label files, and what becomes of labels, choices and broken files."""

import json

import pytest

from memreason.core.errors import DataError, RecipeError
from memreason.core.trace import MEMORY, REASON
from memreason.data.published import NO_LABEL, import_published, label_kind, split_choices, split_label


def row(steps=("[rag]: Ice floats.", "[reason]: So it does."), **changes):
    return {"question": "Does ice float?", "answer": "True", "cot_steps": list(steps), "split": "train", **changes}


def load(folder, rows, task="strategyqa", **options):
    path = folder / "labels.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return import_published(path, task, **options)


def kinds(trace):
    return [step.kinds[0] for step in trace.steps]


@pytest.mark.parametrize(
    ("label", "kind"),
    [
        ("rag", MEMORY),
        ("RAG", MEMORY),
        ("rak", MEMORY),
        ("fact", MEMORY),
        ("Factual Knowledge", MEMORY),
        ("memory", MEMORY),
        ("memroy", MEMORY),
        ("reason", REASON),
        ("Reasoning", REASON),
        ("raeson", REASON),
        ("rag and fact", MEMORY),
        ("chag", None),
        ("reason and rag", None),
        ("reason] and [rag", None),
        ("fact-based reasoning", None),
        ("query", None),
        ("", None),
    ],
)
def test_a_label_means_one_kind_or_none(label, kind):
    assert label_kind(label) == kind


@pytest.mark.parametrize(
    ("raw", "label", "kind", "text"),
    [
        ("[rag]: Ice floats.", "[rag]", MEMORY, "Ice floats."),
        ("  [rag] Ice floats.", "[rag]", MEMORY, "Ice floats."),
        ("[rag:] Ice floats.", "[rag:]", MEMORY, "Ice floats."),
        ("[reason: so it does", "[reason", REASON, "so it does"),
        ("**[Reason]**: So it does.", "**[Reason]", REASON, "So it does."),
        ("Reason: So it does.", "Reason", REASON, "So it does."),
        ("[rag]: [fact]: Ice floats.", "[rag]: [fact]", MEMORY, "Ice floats."),
        ("[rag]: [a] man said: no", "[rag]", MEMORY, "[a] man said: no"),
        ("[reason]: [1, 5] has two", "[reason]", REASON, "[1, 5] has two"),
        ("[reason] and [rag]: Both.", "[reason] and [rag]", None, "Both."),
        ("[reason] [rag]The term", "[reason] [rag]", None, "The term"),
        ("[reason]: [rag]: Both.", "[reason]: [rag]", None, "Both."),
        ("[rag]:", "[rag]", MEMORY, ""),
        ("Ice floats: always.", NO_LABEL, None, "Ice floats: always."),
        ("", NO_LABEL, None, ""),
    ],
)
def test_a_step_is_split_into_label_and_text(raw, label, kind, text):
    assert split_label(raw) == (label, kind, text)


def test_an_unknown_label_never_moves_the_labels_after_it(tmp_path):
    steps = ["[rag]: one", "[banana]: two", "[reason]: three", "[fact]: four"]
    traces, report = load(tmp_path, [row(steps)])
    assert [(step.kinds, step.text) for step in traces[0].steps] == [
        ((MEMORY,), "one"),
        ((REASON,), "three"),
        ((MEMORY,), "four"),
    ]
    assert report.unknown == [(1, 2, "[banana]")]


def test_an_unknown_label_may_cost_the_whole_trace(tmp_path):
    rows = [row(["[banana]: two", "[rag]: x"], question="Q one?"), row()]
    traces, report = load(tmp_path, rows, unknown="trace")
    assert [trace.question.text for trace in traces] == ["Does ice float?"]
    assert report.rejected == [(1, "has a step with an unknown label")]
    with pytest.raises(RecipeError, match="unknown='drop'"):
        load(tmp_path, rows, unknown="drop")


def test_every_step_read_is_accounted_for(tmp_path):
    rows = [row(["[rag]: a", "[reason]: ", "[tap]: b", "c", "[rag]: d"]), row(["[rag]: "], question="Gone?")]
    _, report = load(tmp_path, rows)
    assert report.labels.total() == report.steps.total() + len(report.empty) + len(report.unknown) == 6
    assert report.read == report.kept + len(report.rejected) + len(report.duplicates)


def test_the_report_is_one_readable_table(tmp_path):
    rows = [row(["[rag]: a", "[zzz]: b"]), row(question="", split="test"), row()]
    text = str(load(tmp_path, rows)[1])
    for part in ("[rag] -> memory", "[zzz] -> UNKNOWN", "trace 1, step 2", "its question is missing", "(trace 3)"):
        assert part in text


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"answer": None}, "answer is missing"),
        ({"answer": " "}, "answer is missing"),
        ({"question": 3}, "question is missing"),
        ({"cot_steps": "[rag]: one"}, "not a list of texts"),
        ({"cot_steps": [1]}, "not a list of texts"),
        ({"cot_steps": []}, "failed labelling"),
        ({"cot_steps": ["[rag]: "]}, "no step is left"),
        ({"question": "What? A. x. B. y.", "answer": "F"}, "not among them"),
        ({"question": "What?", "answer": "A"}, "cannot be told apart"),
        ({"cot_steps": ["[rag]: \ud800"]}, "broken character"),
    ],
)
def test_a_bad_trace_is_rejected_with_its_place_and_reason(tmp_path, bad, reason):
    traces, report = load(tmp_path, [row(), row(**{"question": "Other?", **bad})])
    assert len(traces) == 1
    assert report.rejected[0][0] == 2
    assert reason in report.rejected[0][1]


def test_objects_of_another_type_are_rejected(tmp_path):
    assert load(tmp_path, [row(), ["x"]])[1].rejected == [(2, "an object is needed, got list")]


def test_questions_without_steps_stay_where_nothing_is_labelled_and_in_test(tmp_path):
    assert len(load(tmp_path, [row([])])[0]) == 1
    traces, report = load(tmp_path, [row(), row([], question="Other?", split="test")])
    assert [kinds(trace) for trace in traces] == [[MEMORY, REASON], []]
    assert report.bare == [2]


def test_a_question_stands_once_in_a_split(tmp_path):
    traces, report = load(tmp_path, [row(), row(question="does  ICE float?"), row(split="test")])
    assert [trace.question.split for trace in traces] == ["train", "test"]
    assert report.duplicates == [2]


@pytest.mark.parametrize(("answer", "read"), [(True, "True"), ("false", "False"), ("Yes", "True"), (18, "18")])
def test_answers_are_written_one_way(tmp_path, answer, read):
    assert load(tmp_path, [row(answer=answer)])[0][0].answer == read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe[]", "UTF-8"),
        (b'[{"question": ', "not JSON"),
        (b"", "not JSON"),
        (b"[]", "an empty list"),
        (b"{}", "a JSON dict"),
        (b'[{"question": "Q?"}]', "trace 1: its answer is missing"),
    ],
)
def test_a_file_of_no_use_is_an_error_that_names_it(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        import_published(path, "strategyqa")
    assert "bad.json" in str(caught.value)


HARD = [
    ("Who did it?", ("The U.S. army.", "Nobody did.")),
    ("In the U.S., who won?", ("Yes, A. A. Milne did.", "No, E. B. White did.", "None.")),
    ("What was shown by J. B. Rhine?", ("J. B. Rhine was wrong.", "J. B. Rhine proved it.", "Nothing.")),
    ("Which war?", ("It was World War I.", "It was World War II.", "Neither.")),
    ("Which film?", ("One by F. Scott.", "It's a hit.", "Jaws.", "Up.", "E.T. is best.", "Heat.")),
    ("What helps?", ("Sleep.", "Tea.", "He needs vitamin D. and rest.")),
    ("Are you sure?", ('He said "yes."', "No…")),
    ("Which unit", ("metre", "foot", "yard")),
]


@pytest.mark.parametrize(("question", "choices"), HARD)
def test_choices_come_out_of_running_text(question, choices):
    text = " ".join([question, *(f"{letter}. {choice}" for letter, choice in zip("ABCDEF", choices, strict=False))])
    assert split_choices(text, "B") == (question, choices)


@pytest.mark.parametrize(
    ("question", "choices"),
    [
        ("Where off the eastern U.S. is it?", ("bank", "new york", "tide pool")),
        ("What is small?", ("ants", "B. movies", "cells", "dust", "E. coli")),
        ("Options: what are they?", ("stocks", "ways out")),
    ],
)
def test_choices_come_out_behind_options(question, choices):
    options = " ".join(f"{letter}.{choice}" for letter, choice in zip("ABCDE", choices, strict=False))
    assert split_choices(f"Question: {question} Options: {options} ", "A") == (question, choices)


@pytest.mark.parametrize("text", ["What?", "What? A. one.", "A. one. B. two.", "What? B. one. C. two.", "Q? A. B. C."])
def test_what_is_no_list_of_choices_is_none(text):
    assert split_choices(text, "A") is None


def test_imported_choices_give_the_id_of_the_same_question_elsewhere(tmp_path):
    one = row([], question="Question: Where is  it? Options: A.bank B.mall ", answer="b")
    other = row([], question="where is it? A. Bank B. Mall", answer="B")
    ids = {load(tmp_path, [given], task="commonsenseqa")[0][0].question.id for given in (one, other)}
    assert len(ids) == 1
