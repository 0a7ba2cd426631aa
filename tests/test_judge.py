"""Attribution where facts are not known: by trying gold lines, by a judge on a real server, and how the two agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from conftest import save_base, tiny_recipe
from memreason import inside, pipeline
from memreason.cli import main
from memreason.core.errors import TaskError, TeacherError
from memreason.core.files import read_json, read_jsonl, write_jsonl, write_traces
from memreason.core.labelling import LabelRecipe, load_label_recipe
from memreason.core.trace import MEMORY, REASON, Question, Step, Trace
from memreason.label.scripted import ScriptedTeacher, serving
from memreason.measure.counterfactual import attribute_by_trying, begin, effects, gold_lines
from memreason.measure.judge import attribute_by_judge
from memreason.measure.ways import compare_ways, faults_of

KEY = "sk-secret-0123456789"
GOOD = {"why": "Bread does float.", "line": 1, "verdict": "memory"}


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def asked(n: int, *, facts: tuple[str, ...] | None = None, steps: bool = True, answer: str = "True") -> Trace:
    """A labelled trace, as an import of StrategyQA gives it."""
    question = Question(f"Would item {n} float?", answer, "strategyqa", facts=facts, meta={"group": f"term {n}"})
    lines = (Step((MEMORY,), f"Item {n} is of cork."), Step((REASON,), "So it floats."))
    return Trace(question, lines if steps else ())


def made(trace: Trace, prediction: str = "False", *lines: str) -> Trace:
    """What a model wrote: its own memory lines, and a conclusion."""
    own = tuple(Step((MEMORY,), line) for line in lines or ("Item is of lead.",))
    return replace(trace, steps=(*own, Step((REASON,), "So it sinks.")), prediction=prediction)


def test_gold_lines_come_from_labelled_traces_then_facts_then_a_search() -> None:
    both = [asked(0, facts=("Cork floats.", "Item 0 is of cork.\nIt is light.")), asked(1, facts=("Lead sinks.",))]
    source, lines = gold_lines(both)
    assert source == "labelled" and [step.text for step in lines[both[0].question.id]] == ["Item 0 is of cork."]
    bare = [replace(trace, steps=()) for trace in both]
    source, lines = gold_lines([*bare, asked(2, steps=False)])
    texts = {question: [step.text for step in steps] for question, steps in lines.items()}
    assert source == "facts" and len(texts) == 2  # the third has none, and is left out
    assert texts[bare[0].question.id] == ["Cork floats.", "Item 0 is of cork. It is light."]
    assert gold_lines(both, "facts")[0] == "facts"

    @dataclass(frozen=True)
    class Passage:
        id: str
        text: str

    def search(queries: Any, k: int) -> list[list[Passage]]:
        return [[Passage(f"p{n}", f"About {query}") for n in range(2)][:k] for query in queries]

    source, lines = gold_lines(both, "retrieved", search)
    first = lines[both[0].question.id][0]
    assert (source, first.source, first.text) == ("retrieved", "p0", "About Would item 0 float?")


@pytest.mark.parametrize(
    ("source", "said"),
    [(None, "no labelled traces or facts"), ("facts", "no facts that are texts"), ("retrieved", "nothing to search")],
)
def test_without_gold_lines_it_says_what_to_do(source: Any, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        gold_lines([asked(0, steps=False)], source)


def tried_on(gold: list[Trace], traces: list[Trace], answer: Callable[[str, Trace], str]) -> dict[str, list[Trace]]:
    """Stub continuations: a conclusion, and the answer that the function gives."""
    lines = gold_lines(gold)[1]
    tail = Step((REASON,), "So it is.")
    return {
        name: [
            replace(begun, steps=(*begun.steps, tail), prediction=answer(name, begun))
            for begun in begin(name, traces, lines)
        ]
        for name in ("gold", "own", "other")
    }


def test_trying_tells_memory_from_reason_and_shows_why() -> None:
    """Question 0 is mended by gold lines, 1 is not, 2 has no answer, 3 is right, 4 has no gold lines."""
    gold = [asked(n, steps=n != 4) for n in range(5)]
    predictions = ["False", "False", "", "True", "False"]
    traces = [made(trace, prediction) for trace, prediction in zip(gold, predictions, strict=True)]

    def answer(name: str, begun: Trace) -> str:
        return "True" if "3" in begun.question.text or (name == "gold" and "0" in begun.question.text) else "False"

    tried, lines = tried_on(gold, traces, answer), gold_lines(gold)[1]
    found = attribute_by_trying(traces, "labelled", lines, tried)
    assert [one.verdict for one in found] == ["memory", "reason", "format", "right", "unjudged"]
    assert found[0].memory == ("with gold lines (labelled) given, the answer is True",) and not found[0].reason
    assert found[1].reason == ("with gold lines (labelled) given, the answer is False",) and not found[1].memory
    shown = found[0].evidence["gold"]
    assert shown["given"] == [{"kinds": ["memory"], "text": "Item 0 is of cork."}]
    assert shown["steps"] == [{"kinds": ["reason"], "text": "So it is."}] and shown["answer"] == "True"
    assert found[0].evidence["own"]["given"][0]["text"] == "Item is of lead."
    assert found[0].evidence["other"]["given"][0]["text"] == "Item 1 is of cork."
    assert found[4].evidence == {}
    done = effects(traces, lines, tried)
    assert (done["without"], done["wrong"], done["mended"]["gold"]["n"]) == (1, 2, 2)
    assert done["mended"]["gold"]["share"] == 0.5 and done["mended"]["other"]["share"] == 0.0
    assert done["accuracy"]["before"] == done["accuracy"]["own"] and done["changed"]["own"]["share"] == 0.0
    assert faults_of({"counterfactual": found})["counts"] == {
        "memory": 1,
        "reason": 1,
        "format": 1,
        "right": 1,
        "unjudged": 1,
    }


def test_gold_lines_that_leave_no_room_prove_nothing() -> None:
    gold = [asked(0), asked(1)]
    traces, lines = [made(trace) for trace in gold], gold_lines(gold)[1]
    tried = {name: begin(name, traces, lines) for name in ("gold", "own", "other")}  # nothing was generated behind them
    unanswered = {name: [replace(trace, prediction="") for trace in some] for name, some in tried.items()}
    assert {one.verdict for one in attribute_by_trying(traces, "labelled", lines, unanswered)} == {"unjudged"}


def test_the_other_question_is_never_of_the_same_group() -> None:
    gold = [asked(n).with_question(meta={"group": "one"}) for n in range(2)]
    (first, _) = begin("other", [made(trace) for trace in gold], gold_lines(gold)[1])
    assert first.steps == ()  # no one else's lines are there: none are given, and never its own gold ones
    (first, *_) = begin("other", [made(trace) for trace in [*gold, asked(7)]], gold_lines([*gold, asked(7)])[1])
    assert first.steps[0].text == "Item 7 is of cork."


def judge(url: str, **changes: Any) -> LabelRecipe:
    endpoint = {"base_url": url, "in_flight": 4}
    return load_label_recipe(None, {"teacher.model": "scripted", "teacher.endpoints": [endpoint], **changes})


def wrong_ones(count: int) -> list[Trace]:
    return [made(asked(n)) for n in range(count)]


def test_a_judge_reads_wrong_traces_once(tmp_path: Path) -> None:
    traces = [*wrong_ones(3), made(asked(8), "True"), made(asked(9), "")]
    teacher = ScriptedTeacher(answer=lambda body: GOOD)
    with serving(teacher) as url:
        found, took = attribute_by_judge(traces, judge(url), tmp_path / "judge.sqlite")
        again = attribute_by_judge(traces, judge(url), tmp_path / "judge.sqlite")
        fewer, _ = attribute_by_judge(traces[1:], judge(url), tmp_path / "judge.sqlite")
    assert [one.verdict for one in found] == ["memory", "memory", "memory", "right", "format"]
    assert found[0].memory == ("line 1: Bread does float.",) and not found[0].reason
    assert found[0].evidence == {**GOOD, "text": "Item is of lead."}
    assert teacher.paid.total() == took["asked"] == took["replies"] == 3 and took["unjudged"] == 0
    assert again == (found, took) and fewer == found[1:]  # nothing was asked twice
    body = teacher.bodies[-1]
    assert body["response_format"]["json_schema"]["schema"]["properties"]["verdict"]["enum"][0] == "memory"
    system, user = (message["content"] for message in body["messages"])
    assert "both" in system
    lines = ["1. [memory] Item is of lead.", "2. [reason] So it sinks.", "Its answer: False"]
    assert user.startswith("Question: Would item") and "The right answer is True." in user
    assert user.split("The solution:\n")[1].splitlines() == lines


def test_other_lines_of_the_same_question_are_judged_anew(tmp_path: Path) -> None:
    teacher = ScriptedTeacher(answer=lambda body: GOOD)
    with serving(teacher) as url:
        for line in ("Item is of lead.", "Item is of iron."):
            attribute_by_judge([made(asked(0), "False", line)], judge(url), tmp_path / "judge.sqlite")
    assert teacher.paid.total() == 2


MISFITS: dict[str, Any] = {
    "verdict": {**GOOD, "verdict": "luck"},
    "line": {**GOOD, "line": 3},
    "why": {**GOOD, "why": " "},
    "not_json": "The second line is at fault.",
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_reply_that_does_not_fit_is_asked_for_again_with_the_reason(misfit: str, tmp_path: Path) -> None:
    replies = [MISFITS[misfit], {**GOOD, "verdict": "both", "line": None}]
    teacher = ScriptedTeacher(answer=lambda body: replies.pop(0))
    with serving(teacher) as url:
        (found,), took = attribute_by_judge(wrong_ones(1), judge(url), tmp_path / "judge.sqlite")
    assert found.verdict == "both" and found.memory == found.reason == ("Bread does float.",)
    assert took["failures"] == {misfit: 1} and took["replies"] == 2
    *_, said, complaint = teacher.bodies[-1]["messages"]
    assert said["role"] == "assistant" and complaint["content"].startswith("This cannot be used:")


def test_what_never_fits_is_unjudged_and_counted(tmp_path: Path) -> None:
    def answer(body: Any) -> Any:
        return GOOD if "item 0" in body["messages"][1]["content"] else "I would rather not."

    teacher = ScriptedTeacher(answer=answer)
    with serving(teacher) as url:
        found, took = attribute_by_judge(wrong_ones(2), judge(url, attempts=2), tmp_path / "judge.sqlite")
        assert attribute_by_judge(wrong_ones(2), judge(url, attempts=2), tmp_path / "judge.sqlite")[1] == took
    assert [one.verdict for one in found] == ["memory", "unjudged"]
    assert took["unjudged"] == 1 and took["failures"] == {"not_json": 2}
    assert teacher.paid.total() == 3  # also what failed is paid for once
    assert found[1].evidence["failed"][0]["reply"] == "I would rather not."
    table = faults_of({"judge": found})
    assert table["counts"]["unjudged"] == 1 and table["of_wrong"]["unjudged"]["share"] == 0.5


def test_a_stopped_judging_goes_on_and_the_key_stays_out_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    teacher = ScriptedTeacher(answer=lambda body: GOOD, script=["ok"] * 2 + ["quota"] * 9, key=KEY)
    with serving(teacher) as url:
        one_by_one = judge(url, **{"teacher.endpoints": [{"base_url": url, "in_flight": 1}]})
        with pytest.raises(TeacherError, match="credit of this key is used up"):
            attribute_by_judge(wrong_ones(4), one_by_one, tmp_path / "judge.sqlite")
        teacher.script.clear()
        found, took = attribute_by_judge(wrong_ones(4), one_by_one, tmp_path / "judge.sqlite")
        assert took["replies"] == teacher.paid.total() == 4 and len(found) == 4
        teacher.key = "another"
        with pytest.raises(TeacherError, match="was refused") as refused:
            attribute_by_judge(wrong_ones(5), one_by_one, tmp_path / "judge.sqlite")
    assert KEY not in str(refused.value) + "".join(capsys.readouterr())
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_agreement_of_judge_and_trying_by_hand(tmp_path: Path) -> None:
    """Trying says memory for 0, 1, 2, reason for 3, 4; the judge memory for 0, 1, reason for 2, 3, both for 4. `both`
    is no verdict of trying, so four are compared: three agree, kappa is (0.75 - 0.5) / 0.5 (chance: 3/4·2/4 + 1/4·2/4).
    """
    gold, verdicts = [asked(n) for n in range(5)], ["memory", "memory", "reason", "reason", "both"]
    traces = [made(trace) for trace in gold]

    def says(body: Any) -> Any:
        number = int(body["messages"][1]["content"].split("item ")[1][0])
        return {**GOOD, "verdict": verdicts[number]}

    tried = tried_on(gold, traces, lambda name, begun: str(name == "gold" and begun.question.text[11] in "012"))
    with serving(ScriptedTeacher(answer=says)) as url:
        judged, _ = attribute_by_judge(traces, judge(url), tmp_path / "judge.sqlite")
    by_trying = attribute_by_trying(traces, "labelled", gold_lines(gold)[1], tried)
    (table,) = compare_ways({"judge": judged, "counterfactual": by_trying})
    assert table["between"] == ["counterfactual", "judge"] and table["wrong"] == 5
    assert table["confusion"] == {"memory, memory": 2, "memory, reason": 1, "reason, both": 1, "reason, reason": 1}
    assert (table["agreement"]["n"], table["agreement"]["share"]) == (4, 0.75)
    assert table["agreement"]["wilson"] == pytest.approx([0.301, 0.954], abs=1e-3)
    assert table["kappa"]["kappa"] == pytest.approx(0.5)
    low, high = table["kappa"]["by_group"]
    assert low < 0.5 < high == 1.0


def tiny_run(folder: Path, count: int = 6) -> tuple[Path, Path]:
    """A run of a tiny model, and a file of labelled traces of another task. Untrained: it answers wrongly or not at
    all, so half the answers are such that a reader finds them."""
    own = folder / "mine.jsonl"
    write_traces(own, [asked(n, facts=(f"Item {n} is light.",), answer=str(n % 2 == 0)) for n in range(count)])
    return pipeline.train(tiny_recipe(folder, save_base(folder / "base"))), own


def test_faults_of_another_task_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, own = tiny_run(tmp_path)
    words = ["faults", str(run), "--eval.task", str(own), "--eval.max_new_tokens", "6", "--eval.n", "4"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "mine.jsonl: lines can be checked exactly on atlas only. Give --counterfactual, or --judge MODEL." in said
    assert not list(run.glob("checkpoint-*/eval"))  # refused before anything is answered
    assert main([*words, "--counterfactual"]) == 0
    assert "gold: labelled" in capsys.readouterr().out
    (path,) = run.glob("checkpoint-*/eval/mine-test-*/faults.json")
    table, lines = read_json(path), [line for _, line in read_jsonl(path.with_name("faults.jsonl"))]
    assert table["n"] == len(lines) == 4 and sum(table["counts"].values()) == 4
    assert set(table["ways"]) == {"counterfactual"} and "exact" not in lines[0]["ways"] and not table["trends"]
    shown = lines[0]["counterfactual"]
    assert set(shown) == {"gold", "own", "other"} and shown["gold"]["given"][0]["text"].endswith("is of cork.")
    assert main([*words, "--gold", "facts"]) == 0
    assert "gold: facts" in capsys.readouterr().out
    assert len(list(path.parent.glob("given-*.jsonl"))) == 5  # own lines are tried once


def test_a_judged_run_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was generated is replaced by readable wrong answers: an untrained model gives none."""
    monkeypatch.setenv("MY_KEY", KEY)
    run, own = tiny_run(tmp_path)
    words = ["faults", str(run), "--eval.task", str(own), "--eval.max_new_tokens", "6", "--counterfactual"]
    assert main(words) == 0
    (path,) = run.glob("checkpoint-*/eval/mine-test-*/faults.json")
    samples = path.with_name("samples.jsonl")
    written = [line for _, line in read_jsonl(samples)]
    steps = [{"kinds": ["memory"], "text": "It is of lead."}, {"kinds": ["reason"], "text": "So it sinks."}]
    samples.write_text("".join(json.dumps({**line, "steps": steps, "prediction": "False"}) + "\n" for line in written))
    capsys.readouterr()
    with serving(ScriptedTeacher(key=KEY)) as url:
        flags = ["--judge", "scripted", "--base-url", url, "--key-env", "MY_KEY", "--teacher.max_tokens", "64"]
        assert main([*words, *flags]) == 0
        out = capsys.readouterr().out
    assert "counterfactual (down), judge (across)" in out and "3 asked, 0 unjudged, 3 replies" in out
    assert max(map(len, out.split("where it lies")[0].splitlines())) <= 80
    table, lines = read_json(path), [line for _, line in read_jsonl(path.with_name("faults.jsonl"))]
    assert table["wrong"] == table["judge"]["asked"] == 3 and table["ways"]["judge"]["memory"] == 3
    assert {line["ways"]["judge"] for line in lines} == {"memory", "right"}
    assert [(line["judge"]["line"], line["judge"]["text"]) for line in lines if "judge" in line] == [
        (1, "It is of lead.")
    ] * 3
    assert not [one for one in run.rglob("*") if one.is_file() and KEY.encode() in one.read_bytes()]


def test_ways_gone_before_stay_beside_a_new_one(tmp_path: Path) -> None:
    """Whichever is asked for later: the files are those of both at once. Of other samples nothing is kept."""
    run, own = tiny_run(tmp_path)
    settings = pipeline.load_recipe(None, {"eval.task": str(own), "eval.max_new_tokens": 6}).eval
    folder = Path(pipeline.evaluate(run, settings=settings)["folder"])
    samples = folder / "samples.jsonl"
    written = [line for _, line in read_jsonl(samples)]
    steps = [{"kinds": ["memory"], "text": "It is of lead."}]
    write_jsonl(samples, [{**line, "steps": steps, "prediction": "False"} for line in written])
    with serving(ScriptedTeacher()) as url:
        asking: dict[str, Any] = {"judge": judge(url)}
        trying: dict[str, Any] = {"counterfactual": True}

        def made(*ways: dict[str, Any]) -> tuple[Any, list[Any]]:
            for name in ("faults.json", "faults.jsonl"):
                (folder / name).unlink(missing_ok=True)
            for way in ways:
                table = inside.faults(run, settings=settings, **way)
            assert table == read_json(folder / "faults.json")
            return table, [line for _, line in read_jsonl(folder / "faults.jsonl")]

        whole = made({**trying, **asking})
        assert set(whole[0]["ways"]) == {"counterfactual", "judge"} and whole[0]["agreement"][0]["wrong"] == 3
        assert made(trying, asking) == made(asking, trying) == made(trying, asking, {**asking}) == whole
        write_jsonl(samples, [{**line, "steps": steps, "prediction": "True"} for line in written])
        table = inside.faults(run, settings=settings, **asking)
    assert set(table["ways"]) == {"judge"} and "counterfactual" not in table and not table["agreement"]


def test_flags_of_a_judge_need_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["faults", str(tmp_path), "--base-url", "http://127.0.0.1:9/v1"]) == 2
    assert "teacher.endpoints: whom is that for? Give --judge MODEL" in capsys.readouterr().err


def test_a_search_is_handed_in(tmp_path: Path) -> None:
    run, own = tiny_run(tmp_path, 2)

    @dataclass(frozen=True)
    class Passage:
        id: str
        text: str

    settings = pipeline.load_recipe(None, {"eval.task": str(own), "eval.max_new_tokens": 4}).eval
    table = inside.faults(
        run,
        settings=settings,
        counterfactual=True,
        gold="retrieved",
        search=lambda queries, k: [[Passage("p1", "Cork floats.")] for _ in queries],
    )
    assert table["counterfactual"]["gold"] == "retrieved"
    line = next(iter(read_jsonl(Path(table["folder"]) / "faults.jsonl")))[1]
    assert line["counterfactual"]["gold"]["given"] == [{"kinds": ["memory"], "text": "Cork floats.", "source": "p1"}]


def test_gold_lines_are_searched_for_in_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMREASON_HOME", str(tmp_path / "home"))
    run, own = tiny_run(tmp_path, 2)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": f"d{n}", "text": f"Item {n} is of cork."}) + "\n" for n in range(2)))
    words = ["faults", str(run), "--eval.task", str(own), "--eval.max_new_tokens", "4", "--gold", "retrieved"]
    assert main([*words, "--eval.corpus", str(corpus)]) == 0
    (path,) = run.glob("checkpoint-*/eval/mine-test-*/faults.jsonl")
    given = next(iter(read_jsonl(path)))[1]["counterfactual"]["gold"]["given"]
    assert given[0]["text"] == "Item 0 is of cork." and given[0]["source"]
