"""The audit of labelled files: every finding on traces made by hand, the page, and the command."""

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from memreason.cli import main
from memreason.core.files import read_json, read_traces, write_traces
from memreason.core.trace import Question, Step, Trace
from memreason.label.scripted import ScriptedTeacher, serving
from memreason.measure.agreement import agreement, gold
from memreason.measure.audit import audit
from memreason.measure.leaks import leakage, near_pairs, shingles, words
from memreason.measure.stats import cohens_kappa, kappa_bootstrap
from memreason.report.audit import columns, page, print_audit

KENYA = ["memory: Kenya lies in Africa.", "memory: Japan lies in Asia.", "reason: Africa and Asia differ from another."]


def trace(text: str, lines: list[str], answer: str = "True", split: str = "", choices: tuple[str, ...] = ()) -> Trace:
    """Lines are "kind: text", or "one+other: text"."""
    steps = (line.split(": ", 1) for line in lines)
    question = Question(text, answer, split=split, choices=choices or None)
    return Trace(question, tuple(Step(tuple(kinds.split("+")), text) for kinds, text in steps))


# --- Cohen's kappa


def times(**counts: int) -> list[tuple[str, str]]:
    return [(pair[0], pair[1]) for pair, count in counts.items() for _ in range(count)]


@pytest.mark.parametrize(
    ("pairs", "kappa"),
    [
        (times(yy=20, yn=5, ny=10, nn=15), 0.4),  # observed 0.7; expected 0.5 * 0.6 + 0.5 * 0.4 = 0.5
        (times(aa=4, ab=1, bb=3, bc=1, cc=1), (0.8 - 0.38) / (1 - 0.38)),  # rows 5 4 1, columns 4 4 2: 38 of 100
        (times(aa=3, bb=2), 1.0),
        (times(ab=2, ba=2), -1.0),
        (times(aa=3, ab=1), 0.0),  # one labeller never says b: 0.75 is what chance gives
    ],
)
def test_kappa(pairs: list[tuple[str, str]], kappa: float) -> None:
    assert cohens_kappa(pairs) == pytest.approx(kappa)
    assert cohens_kappa([(b, a) for a, b in pairs]) == pytest.approx(kappa)
    assert kappa_bootstrap(pairs, range(len(pairs)), samples=50)[0] == pytest.approx(kappa)


def test_kappa_of_one_class_does_not_exist() -> None:
    assert math.isnan(cohens_kappa(times(aa=9)))
    assert math.isnan(cohens_kappa([]))
    assert all(math.isnan(value) for value in kappa_bootstrap(times(aa=9), range(9)))
    assert cohens_kappa(times(ab=9)) == 0.0


def test_kappa_draws_whole_questions() -> None:
    pairs = times(yy=20, yn=5, ny=10, nn=15)
    random.Random(0).shuffle(pairs)
    kappa, low, high = kappa_bootstrap(pairs, range(50))
    assert low < kappa < high
    copied = [pair for pair in pairs for _ in range(8)]
    again = kappa_bootstrap(copied, [place // 8 for place in range(400)])
    assert again == pytest.approx((kappa, low, high))
    alone = kappa_bootstrap(copied, range(400))
    assert alone[2] - alone[1] < 0.5 * (high - low)  # the square root of 8, about 2.8
    with pytest.raises(ValueError, match="50 and 1"):
        kappa_bootstrap(pairs, [0])


# --- leakage


def test_near_pairs_are_those_of_a_full_comparison() -> None:
    draw = random.Random(0)
    for least in (0.34, 0.5, 0.8, 1.0):
        first, second = (
            [frozenset(draw.sample("abcdefghijkl", draw.randint(1, 9))) for _ in range(60)] for _ in range(2)
        )
        whole = [(i, j, len(a & b) / len(a | b)) for i, a in enumerate(first) for j, b in enumerate(second)]
        assert near_pairs(first, second, least) == [pair for pair in whole if pair[2] >= least]


def test_words_and_shingles() -> None:
    assert words("Don't pay 3.5 or 1,000, U.S. man!") == ["Don't", "pay", "3.5", "or", "1,000", "U.S", "man"]
    assert words("東京 is big") == ["東", "京", "is", "big"]
    assert shingles(Question("Is it so?", "A", choices=("Yes", "Not at all"))) == {
        "is it",
        "it so",
        "yes",
        "not at",
        "at all",
    }


LONG = "Would a person who likes spicy food and lives in Mexico City enjoy a visit to"


def test_leakage_between_splits_and_against_a_file() -> None:
    file = [
        trace("Is it so?", KENYA, split="train"),
        trace(f"{LONG} Thailand?", KENYA, split="train"),
        trace("Something else?", KENYA, split="train"),
        trace("is  it SO", KENYA, split="test"),
        trace(f"{LONG} India?", KENYA, split="test"),
    ]
    (leak,) = leakage(file)
    assert leak["between"] == ["train", "test"]
    assert leak["sizes"] == [3, 2]
    assert [(pair["trace"], pair["other_trace"], pair["likeness"]) for pair in leak["same"]] == [(1, 4, 1.0)]
    assert [(pair["trace"], pair["other_trace"]) for pair in leak["near"]] == [(2, 5)]
    assert leak["near"][0]["likeness"] == pytest.approx(15 / 17)  # 16 runs each, the last one differs
    inside, against = leakage(file, [trace("Is it so", []), trace("SOMETHING ELSE", [])])
    assert inside == leak
    assert [pair["trace"] for pair in against["same"]] == [1, 3]
    assert against["near"] == []
    (all_of_it,) = leakage(file[3:], [trace("Is it so", [])])  # no training split: every trace counts
    assert all_of_it["sizes"] == [2, 1]


def test_choices_tell_questions_apart() -> None:
    file = [trace("Which one is true?", [], "A", "train", ("red", "blue"))]
    assert leakage(file, [trace("Which one is true?", [], "A", "", ("a", "b"))])[0]["same"] == []
    assert leakage(file, [trace("Which one is true?", [], "B", "", ("Blue", "red."))])[0]["same"] != []


# --- audit


@pytest.fixture
def traces() -> list[Trace]:
    return [
        trace("Does Kenya lie in Asia?", KENYA, "False"),
        trace("Does Japan lie in Africa?", KENYA, "False"),
        trace(
            "does Kenya lie  in ASIA", ["memory: Kenya is a country.", "reason: So Kenya is not Asia itself."], "True"
        ),
        trace("Is Peru in Asia?", ["memory: Peru lies in South America.", "memory: Asia is a continent."], "False"),
        trace("Is Chile in Asia?", [], "False"),
    ]


def test_counts_and_kinds(traces: list[Trace]) -> None:
    found = audit(traces)
    assert (found["traces"], found["questions"], found["lines"], found["without_steps"]) == (5, 4, 10, 1)
    assert found["kinds"] == {
        "memory": {"lines": 7, "share": 0.7, "per_trace": 7 / 4, "lacking": 0},
        "reason": {"lines": 3, "share": 0.3, "per_trace": 3 / 4, "lacking": 1},
    }
    assert found["patterns"]["distinct"] == 3
    assert found["patterns"]["top"][0] == {"kinds": ["memory", "memory", "reason"], "count": 2, "share": 0.5}
    assert found["places"] == [{"memory": 4}, {"memory": 3, "reason": 1}, {"reason": 2}]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_answers(traces: list[Trace]) -> None:
    answers = audit(traces)["answers"]
    assert (answers["distinct"], answers["majority"], answers["chance"]) == (2, 0.8, 0.5)
    assert answers["top"][0] == {"answer": "False", "count": 4, "share": 0.8, "expected": 0.5}
    letters = [
        trace(f"Q{n}?", KENYA, answer, "", ("x", "y", "z")[:size])
        for n, (answer, size) in enumerate([("C", 3), ("A", 2)])
    ]
    assert audit(letters)["answers"]["top"] == [
        {"answer": "A", "count": 1, "share": 0.5, "expected": pytest.approx((1 / 3 + 1 / 2) / 2)},
        {"answer": "C", "count": 1, "share": 0.5, "expected": pytest.approx(1 / 6)},
    ]
    numbers = audit([trace(f"Q{n}?", KENYA, str(n)) for n in range(40)])["answers"]
    assert (numbers["distinct"], len(numbers["top"]), numbers["top"][0]["expected"]) == (40, 12, None)


def test_lengths(traces: list[Trace]) -> None:
    found = audit(traces)
    assert found["steps"]["mean"] == 2.0
    assert found["steps"]["quantiles"] == {"min": 0, "p10": 0, "median": 2, "p90": 3, "p99": 3, "max": 3}
    assert [(bar["low"], bar["count"]) for bar in found["steps"]["histogram"]] == [(0, 1), (1, 0), (2, 2), (3, 2)]
    assert found["lengths"]["kinds"]["reason"]["mean"] == 6.0
    assert found["lengths"]["trace"]["n"] == 4
    frames = {tuple(bar["low"] for bar in of["histogram"]) for of in found["lengths"]["kinds"].values()}
    assert len(frames) == 1  # kinds stand on one scale
    long = audit([trace(f"Q{n}?", ["memory: " + "word " * (n + 1)]) for n in range(200)])["lengths"]["line"][
        "histogram"
    ]
    assert sum(bar["count"] for bar in long) == 200
    assert len(long) <= 17
    assert (long[0]["low"], long[-1]["high"]) == (0, 200)


def test_duplicates_and_their_answers(traces: list[Trace]) -> None:
    shared = audit(traces)["duplicates"]
    assert shared["questions"] == [
        {"traces": [1, 3], "question": "Does Kenya lie in Asia?", "answers": ["False", "True"]}
    ]
    assert [group["traces"] for group in shared["steps"]] == [[1, 2]]
    assert shared["lines"]["distinct"] == 3
    assert shared["lines"]["top"][0] == {"text": "Kenya lies in Africa.", "traces": 2}


def test_problems_and_worst_rows(traces: list[Trace]) -> None:
    found = audit(traces, [trace("does kenya lie in asia", [])], worst=2)
    counts = {name: of["traces"] for name, of in found["problems"].items()}
    assert counts["leak"] == counts["same question"] == counts["same steps"] == 2
    assert counts["no steps"] == counts["kinds"] == 1
    assert found["problem_traces"] == 5
    first, second = found["worst"]
    assert (first["trace"], first["weight"]) == (1, 4 + 2 + 1)
    assert [problem["name"] for problem in first["problems"]] == ["leak", "same question", "same steps"]
    assert first["problems"][1]["reason"] == "the same question as trace 3"
    assert (second["trace"], second["weight"]) == (3, 4 + 2)
    assert first["steps"][0] == {"kinds": ["memory"], "text": "Kenya lies in Africa."}
    assert audit(traces[1:2])["worst"] == []


def test_a_question_that_is_only_asked_needs_no_steps() -> None:
    assert audit([trace("Is it so?", [], split="test")])["problems"] == {}
    assert "no steps" in audit([trace("Is it so?", [], split="train")])["problems"]


def test_other_kinds_are_not_asked_for_memory() -> None:
    found = audit([trace("3 + 5?", ["+: 3 + 5 = 8", "+*: 8 * 1 + 0 = 8", "x+y: 8 is 8"], "8")])
    assert "kinds" not in found["problems"]
    assert found["kinds"]["x"] == {"lines": 1, "share": pytest.approx(1 / 3), "per_trace": 1.0, "lacking": 0}
    assert "x+y" in found["patterns"]["top"][0]["kinds"]


def test_an_audit_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one trace"):
        audit([])


# --- agreement


def test_flips_of_lines_that_both_have() -> None:
    first = [
        trace("Is it so?", ["memory: A fact.", "reason: A step.", "memory: Only here."]),
        trace("And this?", KENYA),
    ]
    second = [
        trace("is it so", ["reason: a  fact", "reason: A step.", "memory: Only there."]),
        trace("And this?", KENYA),
    ]
    found = agreement(first, [*second, trace("Only there?", KENYA)])
    assert (found["sizes"], found["questions"], found["same_texts"]) == ([2, 3], 2, 1)
    lines = found["same_lines"]
    assert (lines["lines"], lines["questions"], lines["flips"], lines["flipped_questions"]) == (5, 2, 1, 1)
    assert (lines["kinds"], lines["confusion"]) == (["memory", "reason"], [[2, 1], [0, 2]])
    assert lines["rate"] == 0.2
    assert lines["interval"] == pytest.approx([0.0362, 0.6245], abs=5e-5)  # Wilson, 1 of 5
    assert lines["kappa"] == pytest.approx((0.8 - 0.48) / (1 - 0.48))  # rows 3 2, columns 2 3
    assert lines["examples"] == [{"question": "Is it so?", "text": "A fact.", "first": "memory", "second": "reason"}]
    assert found["other_texts"]["questions"] == 1


def test_a_line_that_stands_twice_is_matched_in_order() -> None:
    one, other = ["memory: Same.", "reason: Same."], ["memory: Same.", "reason: Same.", "memory: Same."]
    lines = agreement([trace("Is it so?", one)], [trace("Is it so?", other)])["same_lines"]
    assert (lines["lines"], lines["flips"]) == (2, 0)


def test_kinds_where_texts_differ() -> None:
    kinds = [("MR", "MR"), ("MR", "RM"), ("MMR", "MRR"), ("MRRR", "R")]
    name = {"M": "memory", "R": "reason"}

    def labelled(side: int) -> list[Trace]:
        lines = [[f"{name[kind]}: {side}, line {n}" for n, kind in enumerate(pair[side])] for pair in kinds]
        return [trace(f"Question {n}?", each) for n, each in enumerate(lines)]

    found = agreement(labelled(0), labelled(1))
    assert found["same_lines"]["lines"] == 0
    assert found["same_lines"]["kappa"] is None
    other = found["other_texts"]
    assert other["same_count"] == [3, 3 / 4, (2 * 2 + 1 * 1) / 16]  # twos and a three on both sides, a four, a one
    assert other["same_kinds"] == [2, 2 / 4, 2 * 2 / 16]
    assert other["same_order"] == [1, 1 / 4, 2 * 1 / 16]
    assert other["mean_lines"] == [11 / 4, 8 / 4]
    assert other["memory_share"]["mean_difference"] == pytest.approx((0 + 0 + 1 / 3 + 1 / 4) / 4)
    assert other["memory_share"]["correlation"] == pytest.approx((1 / 12) / math.sqrt(17 / 192 / 6))
    json.dumps(found, allow_nan=False)


def test_gold_answers_are_compared_by_what_the_letter_says() -> None:
    first = [trace("Which?", KENYA, "A", "", ("red", "blue")), trace("And which?", KENYA, "A", "", ("red", "blue"))]
    second = [trace("Which?", KENYA, "B", "", ("blue", "red")), trace("And which?", KENYA, "A", "", ("blue", "red"))]
    assert gold(first[0].question) == "red"
    found = agreement(first, second)
    assert found["questions"] == 2
    assert found["answers"] == {"differ": 1, "examples": [{"question": "And which?", "first": "red", "second": "blue"}]}


def test_nothing_in_common() -> None:
    found = agreement([trace("Is it so?", KENYA)], [trace("And this?", KENYA)])
    assert found["questions"] == found["same_lines"]["lines"] == found["other_texts"]["questions"] == 0
    assert found["other_texts"]["memory_share"]["correlation"] is None


# --- page and terminal


class Tags(HTMLParser):
    """Every tag with its attributes, and whether all were closed in order."""

    OPEN = ("meta", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in self.OPEN:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def full(traces: list[Trace]) -> dict[str, Any]:
    evil = trace('<script>alert("x")</script>', ["memory: <b>&", "<i>: <img src=x>"], "<u>", "", ("<a>", "b"))
    every = [*traces, evil]
    imported = {"read": 9, "kept": 6, "empty": 1, "unknown": 1, "rejected": {"<s>": 1}}
    labels = [{"label": "[<rag>]", "kind": None, "count": 3}, {"label": "[reason]", "kind": "reason", "count": 5}]
    other = [trace(evil.question.text, ["reason: <b>&"], "<v>", "", ("<a>", "b")), *traces[:2]]
    return {
        "file": "<file>.jsonl",
        "held_out": "test.jsonl",
        "imported": {**imported, "labels": labels},
        **audit(every, [traces[0], evil]),
        "agreement": {"file": "other.jsonl", **agreement(every, other)},
    }


def test_page_escapes_what_users_wrote(traces: list[Trace]) -> None:
    html = page(full(traces))
    assert "&lt;script&gt;alert(" in html
    tags = Tags()
    tags.feed(html)
    assert tags.stack == []
    assert {tag for tag, _ in tags.seen}.isdisjoint({"script", "img", "link", "a", "u", "s", "file", "iframe"})
    assert not any(name in attributes for _, attributes in tags.seen for name in ("src", "href", "onclick", "style"))
    assert "http" not in html
    assert "prefers-color-scheme: dark" in html
    for heading in (
        "Problems",
        "Gold answers",
        "Kinds",
        "Lengths",
        "Duplicates",
        "Leakage",
        "Agreement with",
        "heaviest",
    ):
        assert heading in html


def test_page_of_little(traces: list[Trace]) -> None:
    for some in ([trace("Is it so?", [], split="test")], traces[1:2], [trace("Sum?", ["+: 1 + 1 = 2"], "2")]):
        tags = Tags()
        tags.feed(page(audit(some)))
        assert tags.stack == []


def test_columns_stand_in_the_picture() -> None:
    bars = [{"low": 0, "high": 4, "count": 3}, {"low": 5, "high": 40, "count": 1}]
    drawn = columns({"memory": bars, "reason": bars})
    assert [(column["name"], column["title"], column["total"]) for column in drawn] == [
        ("0", "0 to 4", 6),
        ("5+", "5 to 40", 2),
    ]
    assert [(part["y"], part["height"]) for part in drawn[0]["parts"]] == [(60, 60), (0, 60)]
    assert (drawn[1]["x"], drawn[1]["width"], drawn[1]["top"]) == (50, 50, 80)
    assert columns({"memory": []}) == []


def test_terminal_shows_it_in_80_columns(traces: list[Trace], capsys: pytest.CaptureFixture[str]) -> None:
    print_audit(full(traces))
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) <= 80
    for figure in ("6, 5 different questions", "same question", "Cohen's kappa", "MMR", "the held-out file"):
        assert figure in printed


# --- the command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_data_audit(here: Path, traces: list[Trace], capsys: pytest.CaptureFixture[str]) -> None:
    write_traces("data/my.jsonl", traces)
    write_traces("test.jsonl", traces[3:4])
    write_traces("again.jsonl", [trace(traces[1].question.text, ["reason: Kenya lies in Africa."], "False")])
    words = ["data", "audit", "data/my.jsonl", "--test", "test.jsonl", "--against", "again.jsonl"]
    assert main(words) == 0
    assert "my.audit.html" in capsys.readouterr().out
    assert "<h1>my.jsonl</h1>" in Path("my.audit.html").read_text(encoding="utf-8")
    found = read_json("my.audit.json")
    assert found["leakage"][0]["same"][0]["trace"] == 4
    assert found["agreement"]["same_lines"]["flips"] == 1
    assert main([*words, "--out", "pages/one.html"]) == 0
    assert read_json("pages/one.audit.json") == found


def test_published_files_need_their_task(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"question": f"Is {n} even?", "answer": n % 2 == 0, "cot_steps": ["[rag]: a fact", "[odd]: x"]}
        for n in range(5)
    ]
    Path("labelled.json").write_text(json.dumps(rows), encoding="utf-8")
    assert main(["data", "audit", "labelled.json"]) == 2
    assert "with --task" in capsys.readouterr().err
    assert main(["data", "audit", "labelled.json", "--task", "nonsense"]) == 2
    assert "unknown task 'nonsense'" in capsys.readouterr().err
    assert main(["data", "audit", "labelled.json", "--task", "strategyqa"]) == 0
    found = read_json("labelled.audit.json")
    assert (found["imported"]["kept"], found["imported"]["unknown"], found["lines"]) == (5, 5, 5)
    assert {"label": "[odd]", "kind": None, "count": 5} in found["imported"]["labels"]
    assert "How the file was read" in Path("labelled.audit.html").read_text(encoding="utf-8")


def test_files_that_are_read_are_not_written_over(here: Path, traces: list[Trace], capsys: Any) -> None:
    write_traces("my.jsonl", traces)
    Path("my.audit.json").write_text("[]", encoding="utf-8")
    before = Path("my.jsonl").read_bytes()
    assert main(["data", "audit", "my.jsonl", "--out", "my.jsonl"]) == 2
    assert main(["data", "audit", "my.jsonl", "--against", "my.audit.json", "--task", "atlas"]) == 2
    assert capsys.readouterr().err.count("would be written over") == 2
    assert Path("my.jsonl").read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", '{"question": "x"}', "[1]"])
def test_broken_files_give_one_error(here: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.jsonl").write_text(text, encoding="utf-8")
    assert main(["data", "audit", "my.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("error: my.jsonl")
    assert main(["data", "audit", "missing.jsonl"]) == 2
    assert not list(here.glob("*.html"))


def test_a_teacher_sorts_a_sample_anew(here: Path, traces: list[Trace], capsys: pytest.CaptureFixture[str]) -> None:
    write_traces("t.jsonl", traces)
    with serving(ScriptedTeacher()) as url:
        assert main(["data", "audit", "t.jsonl", "--teacher", "second", "--base-url", url, "-n", "3"]) == 0
        assert main(["data", "audit", "t.jsonl", "--teacher", "second", "--against", "t.jsonl"]) == 2
    assert "give one of them" in capsys.readouterr().err
    found = read_json("t.audit.json")["agreement"]
    assert (found["file"], found["questions"]) == ("second, a sample", 3)
    second = read_traces("labels/audit-t/traces.jsonl")
    assert {step.kinds for trace in second for step in trace.steps} <= {("memory",), ("reason",)}
    assert [step.text for trace in second for step in trace.steps][:2] == [step.text for step in traces[0].steps][:2]
