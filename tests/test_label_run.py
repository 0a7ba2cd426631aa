"""Labelling runs against a real server on loopback that misbehaves on order."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conftest import save_base, tiny_recipe
from memreason import labels, pipeline
from memreason.cli import main
from memreason.core.errors import DataError, RecipeError, TeacherError
from memreason.core.files import read_jsonl, read_traces, write_traces
from memreason.core.labelling import LabelRecipe, load_label_recipe
from memreason.core.trace import Question, Step, Trace
from memreason.label.scripted import TROUBLES, ScriptedTeacher, serving

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return tmp_path


def questions(count: int) -> str:
    """A file of questions."""
    texts = (f"Is item number {n} of the catalogue green?" for n in range(count))
    write_traces("q.jsonl", [Trace(Question(text, str(n % 2 == 0)), ()) for n, text in enumerate(texts)])
    return "q.jsonl"


def recipe(*urls: str, count: int = 12, in_flight: int = 4, **changes: Any) -> LabelRecipe:
    endpoints = [{"base_url": url, "in_flight": in_flight} for url in urls or ("http://127.0.0.1:9/v1",)]
    shared = {"task": questions(count), "protocol": "single", "teacher.model": "scripted"}
    return load_label_recipe(None, {**shared, "teacher.endpoints": endpoints, **changes})


def rejected(folder: str = "labels/q-train") -> list[Any]:
    return [line for _, line in read_jsonl(f"{folder}/rejected.jsonl")]


@pytest.mark.parametrize("protocol", ["plan+fill", "single", "ordered", "self"])
def test_a_run_labels_every_question_once(protocol: str) -> None:
    teacher = ScriptedTeacher()
    with serving(teacher) as url:
        settings = recipe(url, protocol=protocol, **{"teacher.local": False, "checks.skip": ["answer"]})
        found = labels.label_questions(settings)
        again = labels.label_questions(settings)
    assert (found["accepted"], found["rejected"], found["open"]) == (12, 0, 0)
    traces = read_traces("labels/q-train/traces.jsonl")
    assert [trace.question.text for trace in traces] == [trace.question.text for trace in read_traces("q.jsonl")]
    assert {step.kinds for trace in traces for step in trace.steps} == {("memory",), ("reason",)}
    calls = 12 * (2 if protocol == "plan+fill" else 1)
    assert found["this_run"] == {"replies": calls, "done": 12}
    assert again["this_run"] == {"replies": 0, "done": 0}
    assert teacher.paid.total() == calls and set(teacher.paid.values()) == {1}


TROUBLE = [name for name in TROUBLES if name not in ("400", "401", "quota", "slow")]


def test_every_trouble_is_survived_and_counted() -> None:
    teacher = ScriptedTeacher(script=TROUBLE, retry_after=0.1)
    with serving(teacher) as url:
        found = labels.label_questions(recipe(url, in_flight=1, attempts=20, count=3))
    assert found["accepted"] == 3
    assert found["checks"] == {
        "not_json": 1,
        "no_content": 1,
        "truncated": 1,
        "refused": 1,
        "kinds": 1,
        "gives_away": 1,
        "one_line": 1,
        "answer": 1,
        "length": 1,
    }
    assert found["usage"]["replies"] == teacher.paid.total() == 8 + 3  # 429, 500 and cut came to no reply
    journal = sqlite3.connect("labels/q-train/journal.sqlite")
    kept = journal.execute("select finish_reason, refusal from replies").fetchall()
    assert ("length", None) in kept and ("stop", "I can't help with that.") in kept


def test_a_failure_is_never_kept_as_a_success() -> None:
    """Published: failures are saved as data. Here they are named, with what the teacher wrote."""
    teacher = ScriptedTeacher(script=["null", "wrong_answer", "ok"])
    with serving(teacher) as url:
        found = labels.label_questions(recipe(url, in_flight=1, attempts=2, count=2))
    assert (found["accepted"], found["rejected"]) == (1, 1)
    (line,) = rejected()
    assert [entry["checks"] for entry in line["history"]] == [["no_content"], ["answer"]]
    assert "none of these" in line["history"][1]["reply"]
    assert line["id"] not in {trace.question.id for trace in read_traces("labels/q-train/traces.jsonl")}


@pytest.mark.parametrize(
    ("trouble", "said"), [("401", "the key in OPENAI_API_KEY was refused"), ("quota", "credit of this key is used up")]
)
def test_what_no_retry_mends_stops_at_once(trouble: str, said: str) -> None:
    teacher = ScriptedTeacher(script=["ok"] * 4 + [trouble] * 100)
    with serving(teacher) as url:
        with pytest.raises(TeacherError, match=said):
            labels.label_questions(recipe(url, in_flight=1))
        assert teacher.asked.total() == 5
        assert len(read_traces("labels/q-train/traces.jsonl")) == 4  # nothing lost
        teacher.script.clear()
        assert labels.label_questions(recipe(url))["this_run"]["replies"] == 8


def test_the_key_is_nowhere(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Not in journal, files, errors or output, even where the server sends it back."""
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    echo = ScriptedTeacher(key=KEY, script=["500", "ok", "400", "400", "400"])
    with serving(echo) as url, serving(ScriptedTeacher(key="another")) as other:
        flags = [
            "label",
            "--task",
            questions(6),
            "--protocol",
            "single",
            "--teacher",
            "scripted",
            "--key-env",
            "MY_KEY",
        ]
        assert main([*flags, "--base-url", url, "--in-flight", "1"]) == 0
        assert main([*flags, "--base-url", other, "--name", "refused"]) == 2
    out, err = capfd.readouterr()
    assert "the key in MY_KEY was refused" in err
    whole = (
        out + err + "".join(path.read_bytes().decode("latin1") for path in Path("labels").rglob("*") if path.is_file())
    )
    assert "MY_KEY" in whole and KEY not in whole


def test_retry_after_is_honoured() -> None:
    teacher = ScriptedTeacher(script=["429", "ok"], retry_after=1.2)
    with serving(teacher) as url:
        start = time.monotonic()
        assert labels.label_questions(recipe(url, count=1))["accepted"] == 1
    assert time.monotonic() - start > 1.2


def test_a_server_that_asks_for_patience_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memreason.label.teacher.NEVER", 0.0)
    teacher = ScriptedTeacher(script=["429"] * 3, retry_after=0.1)
    with serving(teacher) as url:
        assert labels.label_questions(recipe(url, count=1))["accepted"] == 1


def test_a_prompt_that_cannot_be_rendered_costs_no_reply(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "fill.j2").write_text("{% block user %}{{ nothing }}{% endblock %}")
    teacher = ScriptedTeacher()
    with serving(teacher) as url:
        with pytest.raises(RecipeError, match=r"prompts: fill\.j2: 'nothing' is undefined"):
            labels.label_questions(
                recipe(url, count=3, in_flight=1, protocol="plan+fill", prompts=str(tmp_path / "own"))
            )
        labels.label_questions(recipe(url, count=3, protocol="plan+fill"))
    assert set(teacher.paid.values()) == {1}


def test_json_is_asked_for_in_the_strictest_way_that_is_taken() -> None:
    teacher = ScriptedTeacher(json_schema=False)
    with serving(teacher) as url:
        assert labels.label_questions(recipe(url, in_flight=1))["accepted"] == 12
    ways = [(body.get("response_format") or {}).get("type") for body in teacher.bodies]
    assert ways == ["json_schema"] + ["json_object"] * 12  # found out once


def test_a_request_that_no_server_takes_is_tried_again_next_time() -> None:
    teacher = ScriptedTeacher(script=["400"] * 3)
    with serving(teacher) as url:
        found = labels.label_questions(recipe(url, count=3, in_flight=1))
        assert (found["accepted"], found["failed"]) == (2, 1)
        assert rejected()[0]["history"][0]["checks"] == ["no_reply"]
        assert labels.label_questions(recipe(url, count=3))["accepted"] == 3
    teacher = ScriptedTeacher(script=["400"] * 300)
    with serving(teacher) as url, pytest.raises(TeacherError, match="20 requests in a row were refused"):
        labels.label_questions(recipe(url, count=40, name="all"))


def test_a_dead_endpoint_is_left_out_and_tried_again() -> None:
    good, bad = ScriptedTeacher(seconds=0.05), ScriptedTeacher(script=["500"] * 5)
    with serving(good) as one, serving(bad) as two:
        found = labels.label_questions(recipe(one, two, "http://127.0.0.1:9/v1", count=150))
    assert found["accepted"] == 150
    assert 5 < bad.asked.total() < 150  # it came back
    assert good.paid.total() + bad.paid.total() == 150


def test_the_circuit_opens_when_everything_fails() -> None:
    teacher = ScriptedTeacher(script=["ok"] * 3 + ["500"] * 10_000)
    with serving(teacher) as url:
        settings = recipe(url, **{"teacher.patience": 0.5})
        with pytest.raises(TeacherError, match=r"no reply for 0.5 s from any of 1 endpoints.*internal error"):
            labels.label_questions(settings)
        assert teacher.asked.total() < 60  # it does not hammer
        assert len(read_traces("labels/q-train/traces.jsonl")) == 3
        teacher.script.clear()
        assert labels.label_questions(settings)["accepted"] == 12


def test_a_wrong_address_is_told_soon() -> None:
    with pytest.raises(TeacherError, match=r"no reply for 0.2 s.*no connection .*127\.0\.0\.1"):
        labels.label_questions(recipe("http://127.0.0.1:9/v1", **{"teacher.patience": 0.2}))
    assert rejected() == []


def test_a_slow_reply_is_given_up_and_asked_for_again() -> None:
    teacher = ScriptedTeacher(script=["slow"], slow_seconds=3.0)
    with serving(teacher) as url:
        start = time.monotonic()
        assert labels.label_questions(recipe(url, count=2, **{"teacher.timeout": 0.5}))["accepted"] == 2
    assert time.monotonic() - start < 3.0


def test_limits_a_minute_are_kept() -> None:
    teacher = ScriptedTeacher()
    with serving(teacher) as url:
        settings = recipe(url, count=12)
        settings.teacher.endpoints[0].requests_per_minute = 240  # four a second, so that twelve take two
        start = time.monotonic()
        labels.label_questions(settings)
        assert 1.8 < time.monotonic() - start < 6


def test_tokens_a_minute_are_kept() -> None:
    with serving(ScriptedTeacher()) as url:
        settings = recipe(url, count=12)
        settings.teacher.endpoints[0].tokens_per_minute = 240_000  # four thousand a second, twice that are asked for
        start = time.monotonic()
        labels.label_questions(settings)
        assert 0.5 < time.monotonic() - start < 6


def test_a_second_opinion_is_a_second_call() -> None:
    teacher = ScriptedTeacher()
    with serving(teacher) as url:
        labels.label_questions(recipe(url))
        found = labels.label_questions(recipe(url, sample=1))
    assert found["this_run"]["replies"] == 12 and found["usage"]["replies"] == 24
    assert {trace.question.meta["label"]["sample"] for trace in read_traces("labels/q-train/traces.jsonl")} == {1}


def test_changed_checks_judge_the_replies_that_are_there() -> None:
    teacher = ScriptedTeacher(script=["wrong_answer"] * 12)
    with serving(teacher) as url:
        assert labels.label_questions(recipe(url, attempts=1))["rejected"] == 12
        found = labels.label_questions(recipe(url, attempts=1, **{"checks.skip": ["answer"]}))
    assert found["accepted"] == 12 and found["this_run"]["replies"] == 0 and teacher.paid.total() == 12


def test_tag_labels_lines_that_are_there() -> None:
    steps = (Step((), "The catalogue lists it."), Step((), "So it is in the catalogue."))
    write_traces("cot.jsonl", [Trace(Question(f"Is it in catalogue {n}?", "True"), steps) for n in range(3)])
    Path("text.jsonl").write_text(
        json.dumps({"question": "Is it in?", "answer": "True", "steps": [step.text for step in steps]}) + "\n"
    )
    with serving(ScriptedTeacher()) as url:
        for name in ("cot", "text"):
            labels.label_questions(recipe(url, protocol="tag", task=f"{name}.jsonl", name=name))
            for trace in read_traces(f"labels/{name}/traces.jsonl"):
                assert [step.text for step in trace.steps] == [step.text for step in steps]
                assert [step.kinds for step in trace.steps] == [("memory",), ("reason",)]


def test_shards_part_the_questions_and_merge() -> None:
    with serving(ScriptedTeacher()) as url:
        counts = [labels.label_questions(recipe(url, count=30, shard=f"{k}/3"))["accepted"] for k in (1, 2, 3)]
        assert sum(counts) == 30 and min(counts) > 2
        journals = sorted(Path("labels/q-train").glob("journal-*.sqlite"))
        found = labels.merge(recipe(url, count=30), journals)
    assert (found["accepted"], found["open"]) == (30, 0)
    assert len(read_traces("labels/q-train/traces.jsonl")) == 30


def test_estimates_keep_what_they_paid_for() -> None:
    teacher = ScriptedTeacher()
    with serving(teacher) as url:
        settings = recipe(url, count=50, **{"teacher.model": "gpt-4o"})
        found = labels.estimate_run(settings)
        assert found["sample"] == 10 and found["replies"] == 50 and found["accepted"] == 1.0
        usage = labels.label_questions(settings)["usage"]
    assert teacher.paid.total() == 50
    assert found["dollars"] == pytest.approx(
        2.5e-6 * usage["prompt_tokens"] + 1e-5 * usage["completion_tokens"], rel=0.05
    )


def test_batches_go_round_until_nothing_is_open() -> None:
    """What a user does with OpenAI's Batch: upload, wait, download, run the same command again."""
    settings, teacher = recipe(protocol="plan+fill", **{"teacher.model": "gpt-4o"}), ScriptedTeacher()
    folder = Path("batches")
    report, _ = labels.batch(settings, folder)
    assert (report.written, [path.name for path in report.files]) == (12, ["requests-1.jsonl"])
    again, _ = labels.batch(settings, folder)
    assert (again.written, again.waiting) == (0, 12)  # uploaded already: it would be paid twice
    _answer_batch(teacher, folder / "requests-1.jsonl", folder / "out-1.jsonl", errors=2)
    report, _ = labels.batch(settings, folder)
    assert (report.read, report.errors, report.written) == (10, 2, 12)  # ten fills, two plans once more
    assert labels.batch(settings, folder)[0].written == 0  # the errors of a file count once
    _answer_batch(teacher, folder / "requests-2.jsonl", folder / "out-2.jsonl")
    report, _ = labels.batch(settings, folder)
    assert (report.settled, report.written) == (10, 2)
    (folder / "requests-3.jsonl").unlink()  # never uploaded: open again
    assert labels.batch(settings, folder)[0].written == 2
    _answer_batch(teacher, folder / "requests-3.jsonl", folder / "out-3.jsonl")
    report, found = labels.batch(settings, folder)
    assert (report.settled, report.written, found["accepted"]) == (2, 0, 12)
    assert set(teacher.paid.values()) == {1}
    usage = found["usage"]
    assert found["dollars"] == pytest.approx(1.25e-6 * usage["prompt_tokens"] + 5e-6 * usage["completion_tokens"])


def _answer_batch(teacher: ScriptedTeacher, asked: Path, out: Path, errors: int = 0) -> None:
    lines = []
    for number, (_, line) in enumerate(read_jsonl(asked)):
        assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
        assert line["body"]["response_format"]["type"] == "json_schema"
        if number < errors:
            lines.append({"custom_id": line["custom_id"], "response": None, "error": {"code": "expired"}})
            continue
        (status, body), _ = teacher.reply(line["body"])
        lines.append({"custom_id": line["custom_id"], "response": {"status_code": status, "body": body}, "error": None})
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_folder_belongs_to_one_task() -> None:
    with serving(ScriptedTeacher()) as url:
        labels.label_questions(recipe(url, name="mine"))
        write_traces("other.jsonl", read_traces("q.jsonl"))
        with pytest.raises(RecipeError, match=r"holds labels of q\.jsonl/train"):
            labels.label_questions(recipe(url, name="mine", task="other.jsonl"))


def test_a_question_that_stands_twice_is_asked_once() -> None:
    teacher = ScriptedTeacher(seconds=0.01)
    with serving(teacher) as url:
        settings = recipe(url, count=6)
        write_traces("q.jsonl", [*read_traces("q.jsonl"), *read_traces("q.jsonl")])
        assert labels.label_questions(settings)["questions"] == 6 == teacher.paid.total()
        lines = [{"id": "same", "question": text, "answer": "True"} for text in ("One?", "Two?")]
        Path("q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(DataError, match="the id 'same' stands for 'One\\?' and 'Two\\?'"):
            labels.label_questions(settings)


COMMAND = [sys.executable, "-m", "memreason", "label", "--task", "q.jsonl", "--protocol", "plan+fill", "--teacher", "s"]


@contextmanager
def running(url: str, *flags: str) -> Iterator[subprocess.Popen[str]]:
    command = [*COMMAND, "--base-url", url, "--in-flight", "4", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(teacher: ScriptedTeacher, paid: int) -> None:
    end = time.monotonic() + 60
    while teacher.paid.total() < paid:
        assert time.monotonic() < end, "the run does not ask"
        time.sleep(0.01)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_stopped_runs_go_on(stop: signal.Signals) -> None:
    questions(40)
    teacher = ScriptedTeacher(seconds=0.05)
    with serving(teacher) as url:
        with running(url) as process:
            until(teacher, 20)
            process.send_signal(stop)
            code = process.wait(timeout=30)
            if stop is signal.SIGINT:
                assert code == 130 and "run the same command again" in process.communicate()[1]
                assert read_traces("labels/q-train/traces.jsonl")
        with running(url) as process:
            assert process.wait(timeout=60) == 0
    traces = read_traces("labels/q-train/traces.jsonl")
    assert len({trace.question.id for trace in traces}) == len(traces) == 40
    assert 0 <= teacher.paid.total() - 80 <= 4  # paid twice at most what was in flight


def test_two_processes_share_the_work() -> None:
    questions(40)
    teacher = ScriptedTeacher(seconds=0.03)
    with serving(teacher) as url, running(url) as one, running(url) as two:
        assert one.wait(timeout=60) == two.wait(timeout=60) == 0
    assert len(read_traces("labels/q-train/traces.jsonl")) == 40
    assert teacher.paid.total() == 80 and set(teacher.paid.values()) == {1}


def test_a_labelled_file_goes_straight_into_training() -> None:
    with serving(ScriptedTeacher()) as url:
        traces = labels.label_questions(recipe(url, count=24))["traces"]
    run = pipeline.train(tiny_recipe(Path(), save_base(Path("base")), **{"data.paths": [traces]}))
    assert (run / "manifest.json").is_file()


def test_the_model_to_be_trained_labels_for_itself(tmp_path: Path) -> None:
    """A run writes its own traces; a base model is asked by its chat template, or in plain text."""
    base = save_base(tmp_path / "base")
    run = pipeline.train(tiny_recipe(tmp_path, base, **{"train.max_steps": 40, "method.name": "full"}))
    shared: dict[str, Any] = {"protocol": "self", "teacher.max_tokens": 24, "attempts": 1}
    for name, model in (("run", run), ("base", base)):
        found = labels.label_questions(recipe(count=5, name=name, **shared, **{"teacher.model": str(model)}))
        assert found["usage"]["replies"] == 5
        assert found["accepted"] + found["rejected"] == 5
        replies = [line["content"] for line in _exported(name, shared, str(model))]
        assert len(replies) == 5
        assert any(reply.startswith("Memory: ") for reply in replies) == (name == "run")  # it learnt to
    for path in run.rglob("*.safetensors"):
        os.utime(path, (1, 1))  # trained anew: its old replies are another model's
    again = labels.label_questions(recipe(count=5, name="run", **shared, **{"teacher.model": str(run)}))
    assert again["this_run"]["replies"] == 5
    with pytest.raises(RecipeError, match="--protocol self"):
        labels.label_questions(recipe(count=2, name="no", **{"teacher.model": str(run), "teacher.local": True}))


def _exported(name: str, shared: dict[str, Any], model: str) -> list[Any]:
    labels.export(recipe(count=5, name=name, **shared, **{"teacher.model": model}), "replies.jsonl")
    return [line for _, line in read_jsonl("replies.jsonl")]
