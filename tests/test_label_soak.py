"""Long labelling runs, behind `make soak`: ten thousand questions and five kills; a real server with a real model."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest

from memreason import labels
from memreason.core.files import read_json, read_jsonl, read_traces, write_traces
from memreason.core.labelling import load_label_recipe
from memreason.core.trace import Question, Trace
from memreason.data.atlas import make_atlas
from memreason.encode.base import pull
from real_servers import transformers_serve

pytestmark = pytest.mark.soak
COUNT = 10_000


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def label_command(url: str) -> list[str]:
    shared = ["--task", "q.jsonl", "--protocol", "single", "--teacher", "scripted", "--base-url", url]
    return [sys.executable, "-m", "memreason", "label", *shared, "--in-flight", "64", "--attempts", "5"]


@contextmanager
def scripted(*flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The scripted teacher in a process of its own, so that it takes no time of the run's."""
    command = [sys.executable, "-m", "memreason.label.scripted", "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), process
    finally:
        process.kill()
        process.communicate()


def paid(url: str) -> dict[str, int]:
    """How many completions the server gave, and the most that one request got."""
    found: dict[str, int] = httpx2.get(url.removesuffix("/v1") + "/counts").json()
    return found


def write_questions(count: int) -> None:
    texts = (f"Is item number {n} of the catalogue green?" for n in range(count))
    write_traces("q.jsonl", [Trace(Question(text, str(n % 2 == 0)), ()) for n, text in enumerate(texts)])


def test_ten_thousand_questions_at_three_hundred_a_second() -> None:
    write_questions(COUNT)
    with scripted() as (url, _):
        process = subprocess.Popen(label_command(url), stderr=subprocess.PIPE)
        while not paid(url)["paid"]:
            time.sleep(0.02)
        start, memory = time.monotonic(), []
        while process.poll() is None:
            try:
                memory.append((paid(url)["paid"], psutil.Process(process.pid).memory_info().rss))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.5)
        assert process.wait() == 0
        seconds = time.monotonic() - start
        assert paid(url) == {"paid": COUNT, "most": 1}
    running = [rss for count, rss in memory if COUNT / 10 < count < COUNT]
    sizes = f"{running[0] >> 20} to {running[-1] >> 20} MiB"
    print(f"{COUNT / seconds:.0f} requests a second from the first reply to the end; memory {sizes}")
    assert read_json("labels/q-train/summary.json")["accepted"] == COUNT
    assert max(running) < 1.1 * running[0]
    assert COUNT / seconds >= 300


def test_five_kills_lose_nothing_and_double_nothing() -> None:
    write_questions(COUNT)
    drawn = random.Random(0)
    with scripted("--trouble", "500", "0.01", "--trouble", "bad_json", "0.03", "--trouble", "cut", "0.01") as (url, _):
        for _ in range(5):
            process = subprocess.Popen(label_command(url), stderr=subprocess.DEVNULL)
            before = paid(url)["paid"]
            while paid(url)["paid"] < before + 200:
                assert process.poll() is None
                time.sleep(0.05)
            time.sleep(4 * drawn.random())
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert subprocess.run(label_command(url), stderr=subprocess.DEVNULL, check=False).returncode == 0
        counts = paid(url)
    summary = read_json("labels/q-train/summary.json")
    traces = read_traces("labels/q-train/traces.jsonl")
    assert len({trace.question.id for trace in traces}) == len(traces) == summary["accepted"]
    assert summary["accepted"] + summary["rejected"] == COUNT
    assert summary["accepted"] == COUNT  # five tries are enough for these troubles
    again = counts["paid"] - summary["usage"]["replies"]
    print(f"{again} replies of {counts['paid']} were paid for and not kept, at five kills with 64 in flight")
    assert 0 <= again <= 5 * 64


def test_a_real_server_with_a_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher of 135M parameters writes poor traces: what counts is that each question comes to an end."""
    shared = os.environ.get("MEMREASON_SHARED")
    source = Path(shared or "") / "data" / "labelled" / "StrategyQA_train_clean.json"
    if shared and source.is_file():
        rows = [{"question": row["question"], "answer": row["answer"]} for row in json.loads(source.read_text())[:50]]
    else:
        rows = [{"question": trace.question.text, "answer": trace.question.answer} for trace in make_atlas("train", 50)]
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = str(pull("smollm2-135m"))
    with transformers_serve(model) as url:
        endpoint = {"base_url": url, "in_flight": 2}
        teacher = {"model": model, "endpoints": [endpoint], "max_tokens": 256, "timeout": 900, "local": False}
        recipe = load_label_recipe(None, {"task": "q.jsonl", "protocol": "self", "attempts": 1, "teacher": teacher})
        found = labels.label_questions(recipe)
    print({name: found[name] for name in ("questions", "accepted", "rejected", "checks", "usage")})
    assert found["accepted"] + found["rejected"] == found["questions"] == 50 and found["failed"] == 0
    assert found["usage"]["replies"] == 50 and found["usage"]["completion_tokens"] > 0
    rejected = [line for _, line in read_jsonl("labels/q-train/rejected.jsonl")]
    assert all(re.search(r"\w", json.dumps(line["history"])) for line in rejected)
