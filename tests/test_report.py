"""The report: what is gathered from folders, the page as a file, tables, two runs, the command."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from made_run import answered, falsified, save_evaluation, save_findings, save_retrieval, save_run
from memreason.cli import main
from memreason.core.errors import CheckpointError
from memreason.core.files import read_json, read_jsonl, write_json, write_jsonl
from memreason.core.trace import MEMORY, REASON, Question, Step, Trace
from memreason.data.atlas import make_atlas
from memreason.pages import write_report
from memreason.report import charts
from memreason.report.gather import gather
from memreason.report.page import page
from memreason.report.table import csv_text

EVIL = '</script><script>alert("x")</script><!--<script>'
FOUND = ("accuracy", "faults", "confidence", "retrieval", "attention", "probe")
SECTIONS = (*FOUND, "learning", "setup", "cost", "explorer")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 60 atlas questions with every finding beside its samples."""
    folder = save_run(tmp_path_factory.mktemp("runs") / "one", 60)
    save_findings(evaluation_of(folder))
    save_retrieval(folder / "checkpoint-113")
    return folder


def evaluation_of(run: Path) -> Path:
    (folder,) = run.glob("checkpoint-*/eval/*")
    return folder


class Page(HTMLParser):
    """The tags of a page, the JSON in it, and whether all were closed in order."""

    VOID = ("meta", "link", "br", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.stack: list[str] = []
        self.text, self.json = "", ""
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.stack[-1] if self.stack else ""
        if inside == "script" and self.seen[-1][1].get("type") == "application/json":
            self.json += data
        elif inside not in ("script", "style"):
            self.text += data

    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.seen if "id" in attributes]


# --- what is gathered


def test_every_question_stands_with_its_lines_figures_and_fault(run: Path) -> None:
    data = gather([run])
    samples = [line for _, line in read_jsonl(evaluation_of(run) / "samples.jsonl")]
    faults = {line["id"]: line for _, line in read_jsonl(evaluation_of(run) / "faults.jsonl")}
    assert [row["id"] for row in data["traces"]] == [line["id"] for line in samples]
    for row, sample in zip(data["traces"], samples, strict=True):
        (made,) = row["of"]
        assert (row["question"], row["gold"], row["form"]) == (
            sample["question"],
            sample["answer"],
            sample["meta"]["form"],
        )
        assert [line["text"] for line in made["lines"]] == [step["text"] for step in sample["steps"]]
        assert (made["fault"], made["memory"]) == (faults[row["id"]]["verdict"], faults[row["id"]]["memory"])
        assert made["p"] == min(line["p"] for line in made["lines"])
        texts = [sample["logprobs"][body:end] for body, (_, end) in zip(*_places(sample), strict=True)]
        for line, values in zip(made["lines"], texts, strict=True):
            assert line["p"] == pytest.approx(math.exp(sum(values) / len(values)), abs=1e-4)


def _places(sample: dict[str, Any]) -> tuple[list[int], list[list[int]]]:
    return sample["meta"]["bodies"], sample["meta"]["spans"]


def test_memory_lines_are_checked_where_facts_are_known(tmp_path: Path) -> None:
    first, *_ = make_atlas("train", 3, forms=["capital_choice"])
    steps = (first.steps[0], falsified(first.steps[0]), Step((MEMORY,), "Rome is old."), first.steps[-1])
    other = Trace(Question("Is Rome old?", "True", "strategyqa"), steps, prediction="True")
    made = [replace(first, steps=steps, prediction=first.question.answer), other]
    save_evaluation(tmp_path / "eval" / "a", made[:1])
    save_evaluation(tmp_path / "eval" / "b", made[1:])
    atlas, foreign = (row["of"][0]["lines"] for row in gather([tmp_path])["traces"])
    assert [line.get("fact", "no memory") for line in atlas] == [True, False, None, "no memory"]
    assert [line.get("fact", "no memory") for line in foreign] == [None, None, None, "no memory"]


def test_the_newest_evaluation_of_each_task_counts(tmp_path: Path) -> None:
    import os

    draw = random.Random(0)
    made = [answered(trace, draw) for trace in make_atlas("train", 8)]
    for place, (name, some) in enumerate({"z-old": made, "a-new": made[:3]}.items()):
        results = save_evaluation(tmp_path / "checkpoint-9" / "eval" / name, some) / "results.json"
        os.utime(results, (place, place))
    for path in (tmp_path, tmp_path / "checkpoint-9", tmp_path / "checkpoint-9/eval/a-new"):
        assert len(gather([path])["traces"]) == 3
    assert len(gather([tmp_path / "checkpoint-9/eval/z-old"])["traces"]) == 8


def test_a_run_means_its_best_checkpoint(run: Path, tmp_path: Path) -> None:
    assert gather([run])["runs"][0]["checkpoint"] == "checkpoint-113"
    with pytest.raises(CheckpointError, match="holds no evaluation"):
        gather([tmp_path])
    with pytest.raises(CheckpointError, match="no such run"):
        gather([tmp_path / "none"])


def test_several_samples_of_a_question_stand_apart(tmp_path: Path) -> None:
    (made,) = make_atlas("train", 1)
    folder = save_evaluation(tmp_path / "eval" / "a", [replace(made, prediction="A")])
    (sample,) = [line for _, line in read_jsonl(folder / "samples.jsonl")]
    again = {**sample, "meta": {**sample["meta"], "sample": 1}}
    write_jsonl(folder / "samples.jsonl", [sample, again])
    first, second = gather([tmp_path])["traces"]
    assert (first["id"], second["id"]) == (sample["id"], f"{sample['id']}.1")
    assert (first["of"][0]["fault"], second["of"][0]["fault"]) != (None, None)
    assert second["of"][0]["fault"] is None  # faults are told of the first sample


def test_figures_that_json_lacks_become_null(run: Path, tmp_path: Path) -> None:
    folder = save_evaluation(tmp_path / "eval" / "a", [replace(make_atlas("train", 1)[0], prediction="A")])
    text = (folder / "confidence.json").read_text(encoding="utf-8")
    (folder / "confidence.json").write_text(re.sub(r'"auroc": null', '"auroc": NaN', text), encoding="utf-8")
    data = gather([tmp_path])
    assert data["runs"][0]["evaluations"][0]["confidence"]["auroc"] is None
    json.dumps(data, allow_nan=False)
    Page(page(data))


# --- the page


def test_page_is_whole_and_fetches_nothing(run: Path) -> None:
    html = page(gather([run]))
    parsed = Page(html)
    assert set(SECTIONS) <= set(parsed.ids())
    assert len(parsed.ids()) == len(set(parsed.ids()))
    links = [value for _, attributes in parsed.seen for key, value in attributes.items() if key in ("src", "href")]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert not any("style" in attributes or key.startswith("on") for _, attributes in parsed.seen for key in attributes)
    assert "@import" not in html and "url(" not in html and "http" not in html
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", html)
    assert {tag for tag, _ in parsed.seen}.isdisjoint({"img", "iframe", "object"})


def test_texts_of_users_stay_texts(run: Path, tmp_path: Path) -> None:
    steps = (Step((MEMORY,), f"{EVIL} says so."), Step(("<b>",), "<img src=x onerror=alert(1)>"))
    question = Question(f"Is it {EVIL}?", "A", "<i>task", choices=(EVIL, "<u>"))
    folder = tmp_path / "<em>run" / "eval" / "<a>"
    save_evaluation(folder, [Trace(question, steps, prediction=EVIL)])
    write_json(folder / "probe.json", read_json(evaluation_of(run) / "probe.json"))
    data = gather([tmp_path / "<em>run"])
    html = page(data)
    parsed = Page(html)
    assert html.count("<script") == html.lower().count("</script") == 2
    assert json.loads(parsed.json)["traces"] == data["traces"]
    assert json.loads(parsed.json)["traces"][0]["of"][0]["prediction"] == EVIL
    assert {tag for tag, _ in parsed.seen}.isdisjoint({"em", "u", "img", "task", "a>"})
    assert "<em>run" in parsed.text


def test_only_sections_of_what_is_there(tmp_path: Path) -> None:
    made = Trace(Question("Is Rome old?", "True", "strategyqa"), (Step((REASON,), "It is."),), prediction="True")
    save_evaluation(tmp_path / "eval" / "a", [made])
    ids = Page(page(gather([tmp_path]))).ids()
    assert {"accuracy", "setup", "cost", "explorer"} <= set(ids)
    assert {"between", "faults", "confidence", "retrieval", "attention", "probe", "learning"}.isdisjoint(ids)


def test_attention_stands_with_the_comparison_among_alike_questions(run: Path) -> None:
    text = " ".join(Page(page(gather([run]))).text.split())
    assert "answer → memory5.1––-0.1 (-1.0 to +0.7)" in text and "reason → reason" not in text


def test_a_curve_of_retrieval_stands_with_its_table(run: Path) -> None:
    html = page(gather([run]))
    text = " ".join(Page(html).text.split())
    assert "none0.0000.880 (0.810 to 0.920) calibrated0.3100.940 (0.870 to 0.980)0.938 all1.0000.950" in text
    assert "Calibrated on 179 memory lines of atlas / validation, 25 of them false" in text
    assert html.count('class="ring"') == 1


def test_points_of_a_curve_are_not_the_newest_evaluation(run: Path, tmp_path: Path) -> None:
    """What `retrieve` evaluated last would hide the run's own answers; alone it counts, and so does one asked for."""
    import os

    checkpoint = tmp_path / "checkpoint-9"
    made = [answered(trace, random.Random(0)) for trace in make_atlas("train", 8)]
    for place, (name, some) in enumerate({"own": made, "looked-up": made[:3], "asked-for": made[:5]}.items()):
        os.utime(save_evaluation(checkpoint / "eval" / name, some) / "results.json", (place, place))
    assert len(gather([checkpoint])["traces"]) == 5
    save_retrieval(checkpoint, "asked-for")
    assert len(gather([checkpoint])["traces"]) == 3
    save_retrieval(checkpoint, "looked-up")
    assert len(gather([checkpoint])["traces"]) == 5


def test_lines_are_flagged_below_the_calibrated_threshold(run: Path, tmp_path: Path) -> None:
    bare = save_run(tmp_path / "bare", 4)
    data = gather([run, bare])
    assert [one["unsure"] for one in data["runs"]] == [
        {"below": pytest.approx(math.exp(-0.0645), abs=1e-4), "on": "atlas / validation"},
        {"below": 0.9, "on": None},
    ]
    parsed = Page(page(data))
    text = " ".join(parsed.text.split())
    assert json.loads(parsed.json)["unsure"] == [0.9375, 0.9]
    assert "0.938 (geometric mean over their tokens), the threshold calibrated on atlas / validation." in text
    assert f"not calibrated for this model: memreason calibrate {bare} does that." in text


def test_a_retrieved_line_stands_with_its_source_and_what_the_model_had(tmp_path: Path) -> None:
    (made,) = make_atlas("train", 1, forms=["capital_choice"])
    folder = save_evaluation(tmp_path / "eval" / "a", [replace(made, prediction="A")])
    (line,) = [line for _, line in read_jsonl(folder / "samples.jsonl")]
    line["steps"][0]["source"] = "p1"
    line["meta"]["recalled"] = [{"step": 0, "text": "Mine.", "sureness": -2.0}]
    write_jsonl(folder / "samples.jsonl", [line])
    first, *others = gather([tmp_path])["traces"][0]["of"][0]["lines"]
    assert (first["source"], first["own"]) == ("p1", "Mine.") and not any("own" in one for one in others)


def test_faults_found_by_other_ways_alone_are_shown(run: Path) -> None:
    """Away from atlas there is no exact way: nothing is lucky or both, nothing has a level, some are unjudged."""
    data = gather([run])
    (one,) = data["runs"][0]["evaluations"]
    rate = {"share": 0.5, "wilson": [0.4, 0.6], "n": 9}
    beyond = {"mended": {"n": 9, "difference": 0.25, "by_group": [0.1, 0.4], "p": 0.03125}}
    tried = {"accuracy": {"before": rate, "gold": rate}, "mended": {"gold": rate}, "changed": {"gold": rate}}
    tried |= {"beyond_chance": beyond}
    pair = {"between": ["counterfactual", "judge"], "agreement": rate, "kappa": {"kappa": 0.7, "by_group": [0.6, 0.8]}}
    counts = {"memory": 3, "reason": 2, "format": 0, "right": 50, "unjudged": 5}
    shares = {name: {**rate, "by_group": [0.3, 0.7]} for name in counts}
    one["faults"] = {"counts": counts, "shares": shares, "of_wrong": {"memory": None}, "by": {}, "trends": {}}
    assert "by form" not in Page(page(data)).text
    one["faults"] |= {"counterfactual": tried, "agreement": [pair]}
    text = Page(page(data)).text
    assert "unjudged 5" in text and "Cohen's kappa 0.700 (0.600 to 0.800)" in text and "as generated" in text
    assert "wrong answers mended: +0.250 (+0.100 to +0.400); McNemar's p 0.0312, 9 questions" in text


def test_page_says_that_the_test_split_chose(run: Path) -> None:
    data = gather([run])
    assert "optimistic" not in page(data)
    data["runs"][0]["evaluations"][0]["select_on"] = "test"
    assert "this accuracy is optimistic" in page(data)


def test_2000_traces_stay_under_5_mb(tmp_path: Path) -> None:
    write_report(save_run(tmp_path / "run", 2000))
    assert (tmp_path / "run" / "report.html").stat().st_size < 5_000_000


def test_a_live_page_brings_its_script(run: Path) -> None:
    data = gather([run])
    still, live = page(data), page({**data, "live": True})
    assert json.loads(Page(still).json)["live"] is False and json.loads(Page(live).json)["live"] is True
    assert still.count("window.memreasonLive = ") == 0 and live.count("window.memreasonLive = ") == 1


# --- pictures


def test_pictures_put_values_in_their_places() -> None:
    drawn = charts.interval(0.25, 0.1, 0.5, {"chance": 0.75})
    assert 'cx="25.00%"' in drawn and 'x1="10.00%" x2="50.00%"' in drawn and 'x1="75.00%"' in drawn
    assert 'cx="75.00%"' in charts.difference(0.1, 0.0, 0.2, 0.2)
    widths = re.findall(r'class="part \w+" x="([\d.]+)%" width="([\d.]+)%"', charts.stack({"memory": 1, "right": 3}))
    assert widths == [("0.00", "25.00"), ("25.00", "75.00")]
    assert 'points="0.00,0.00 100.00,50.00"' in charts.curve("loss", [(0, 4.0), (10, 2.0)], last=10, top=4.0)
    sure = [{"low": 0.4, "high": 0.6, "n": 10, "mean_confidence": 0.5, "share_true": 0.5}]
    assert 'cx="0.00%" cy="85.0"' in charts.reliability(sure)
    point = {"name": "calibrated", "retrieved": 0.25, "accuracy": 0.9, "interval": [0.8, 1.0]}
    drawn = charts.retrieval([point])
    assert 'class="dot" cx="25.00%" cy="85.0"' in drawn and 'class="ring" cx="25.00%" cy="85.0"' in drawn
    assert 'x1="25.00%" x2="25.00%" y1="170.0" y2="0.0"' in drawn
    cells = re.findall(r'class="cell" fill-opacity="([\d.]+)"', charts.heat(["a", "b"], [[0.5, None], [0.25, 0.0]]))
    assert cells == ["0.750", "0.000", "0.375", "0.000"]


def test_pictures_escape_their_names() -> None:
    drawn = [charts.heat(["<b>"], [[1.0]]), charts.stack({"<b>": 1}), charts.interval(0, 0, 1, {"<b>": 0.5})]
    assert not any("<b>" in one for one in drawn) and all("&lt;b&gt;" in one for one in drawn)


# --- tables


def test_csv_and_json_hold_every_trace(run: Path, tmp_path: Path) -> None:
    out = write_report(run, out=tmp_path / "r.html", csv=tmp_path / "r.csv", json=tmp_path / "r.json")
    assert out == tmp_path / "r.html"
    data = read_json(tmp_path / "r.json")
    assert data == json.loads(json.dumps(gather([run])))
    with (tmp_path / "r.csv").open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["id"] for row in rows] == [row["id"] for row in data["traces"]]
    for row, trace in zip(rows, data["traces"], strict=True):
        (made,) = trace["of"]
        assert (row["verdict"], row["fault"], row["question"]) == (made["verdict"], made["fault"], trace["question"])
        assert row["lines"].split("\n") == [f"{line['kind']}: {line['text']}" for line in made["lines"]]
        assert int(row["memory_false"]) == sum(line.get("fact") is False for line in made["lines"])


def test_csv_keeps_commas_quotes_and_lines(run: Path) -> None:
    data = gather([run])
    data["traces"][0]["question"] = 'A, "b"\nand c'
    assert next(csv.DictReader(io.StringIO(csv_text(data))))["question"] == 'A, "b"\nand c'


# --- several runs


def test_two_runs_are_compared_question_by_question(tmp_path: Path) -> None:
    gold = [replace(trace, prediction=trace.question.answer) for trace in make_atlas("train", 20)]
    worse = [replace(trace, prediction="") if place < 5 else trace for place, trace in enumerate(gold)]
    first, second = save_run(tmp_path / "a", 0, traces=gold), save_run(tmp_path / "b", 0, traces=worse[:15])
    data = gather([first, second])
    (found,) = data["comparisons"]
    assert (found["n"], found["only_first"], found["only_other"]) == (15, 5, 0)
    assert found["difference"] == pytest.approx(-1 / 3) and found["p"] == pytest.approx(2 / 2**5)
    assert found["interval"][0] < -1 / 3 < found["interval"][1] < 0.1
    assert [row["of"][1] is None for row in data["traces"]] == [False] * 15 + [True] * 5
    parsed = Page(page(data))
    assert "between" in parsed.ids() and "a and b" in parsed.text
    assert len(list(csv.DictReader(io.StringIO(csv_text(data))))) == 35


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [save_run(tmp_path / parent / "demo", 4) for parent in ("x", "y")]
    assert [run["name"] for run in gather(runs)["runs"]] == [str(run) for run in runs]


# --- the command


def test_report_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run), "--csv", "t.csv", "--json", "t.json"]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    assert (run / "report.html").is_file() and Path("t.csv").is_file() and Path("t.json").is_file()
    assert main(["report", str(run), str(run / "checkpoint-113")]) == 0
    assert "<!doctype html>" in Path("report.html").read_text(encoding="utf-8")[:200]
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no evaluation" in capsys.readouterr().err


def test_a_report_needs_no_torch(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from memreason.pages import write_report; "
        "write_report(sys.argv[1], out=sys.argv[2]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(run), str(tmp_path / "r.html")], check=True, capture_output=True)


def test_run_of_a_tiny_model(tmp_path: Path) -> None:
    """What training and evaluation really write can be read."""
    from conftest import save_base, tiny_recipe
    from memreason import pipeline

    changes = {"data.paths": [], "data.task": "atlas", "data.n_train": 12, "eval.n": 4, "train.n_select": 2}
    made = pipeline.train(tiny_recipe(tmp_path, save_base(tmp_path / "base"), **changes))
    pipeline.evaluate(made)
    data = gather([made])
    assert len(data["traces"]) == 4 and data["runs"][0]["curve"]["loss"]
    parsed = Page(page(data))
    assert {"accuracy", "learning", "setup", "cost", "explorer"} <= set(parsed.ids())
