"""The live page's server: answers are those of the pipeline, several at once, behind its guard; and how it ends."""

from __future__ import annotations

import http.client
import json
import math
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_recipe
from memreason import pipeline
from memreason.cli import main
from memreason.core.errors import RetrieverError
from memreason.core.files import read_traces
from memreason.core.trace import Question, Step, Trace
from memreason.finetune.checkpoint import Checkpoint, load_checkpoint
from memreason.generate import decode, engine
from memreason.generate.answer import answer_questions
from memreason.generate.onward import begun_ids, continue_traces
from memreason.generate.recall import retrieving
from memreason.serve import run as serve_run
from memreason.serve.guard import own_host
from memreason.serve.run import address, is_loopback
from served import KNOWN, PAGE, SETTINGS, Served, fluent_run, serving

CONTROL = "Is <memory_0><answer_0> the capital <|end|> of Peru?"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fluent_run(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def checkpoint(trained: Path) -> Checkpoint:
    return load_checkpoint(trained)


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> dict[str, Trace]:
    """What the pipeline answers, asked before any server holds the model."""
    questions = [trace.question for trace in KNOWN] + [Question(CONTROL, "?")]
    traces = answer_questions(checkpoint.model, checkpoint.codec, questions, SETTINGS)
    return {trace.question.text: trace for trace in traces}


@pytest.fixture(scope="module")
def server(checkpoint: Checkpoint, expected: Any, continued: Any, tmp_path_factory: Any) -> Iterator[Served]:
    def search(asked: Any) -> Any:
        return [("p1", f"A passage about {line}") for _, line in asked]

    with serving(checkpoint, tmp_path_factory.mktemp("run"), search=search) as found:
        yield found


GIVEN = (Step(("memory",), "Quito lies in <reason_0> Asia."),)


@pytest.fixture(scope="module")
def continued(checkpoint: Checkpoint) -> Trace:
    ids = {KNOWN[1].question.id: begun_ids(checkpoint.codec, replace(KNOWN[1], steps=GIVEN))}
    (found,) = continue_traces(checkpoint.model, checkpoint.codec, [KNOWN[1].question], ids, SETTINGS)
    return found


def asked(trace: Trace) -> dict[str, Any]:
    return {"question": trace.question.text}


def lines(event: dict[str, Any]) -> list[Step]:
    return [Step(tuple(step["kinds"]), step["text"], step.get("source", "")) for step in event["steps"]]


def same(event: dict[str, Any], trace: Trace) -> bool:
    return (event["question"], lines(event), event["prediction"], event["faults"]) == (
        trace.question.text,
        list(trace.steps),
        trace.prediction,
        list(trace.faults),
    )


def test_an_answer_grows_and_is_the_pipelines(server: Served, expected: dict[str, Trace]) -> None:
    for trace in KNOWN[:3]:
        events = server.events("/ask", asked(trace))
        assert len(events) > 3 and [event["done"] for event in events] == [False] * (len(events) - 1) + [True]
        assert same(events[-1], expected[trace.question.text])
        assert events[-1]["steps"] and not events[-1]["faults"], "the model was trained to write whole traces"
        assert all(0 < step["confidence"] <= 1 for step in events[-1]["steps"])
        assert (events[-1]["answer"], events[-1]["id"]) == (trace.question.answer, trace.question.id)
        grown = ["".join(step["text"] for step in event["steps"]) + event["prediction"] for event in events]
        assert sorted(grown, key=len) == grown and len(set(grown)) > 3
        assert all("The answer" not in event["prediction"] for event in events)


def test_lines_that_are_given_stay_and_the_rest_is_generated_anew(server: Served, continued: Trace) -> None:
    given = [{"kinds": ["memory"], "text": GIVEN[0].text}]
    *_, last = server.events("/continue", {**asked(KNOWN[1]), "steps": given})
    assert same(last, continued)
    assert last["steps"][0] == {**GIVEN[0].to_json(), "confidence": None, "fact": None}  # text, not a planning token


def test_eight_clients_at_once_get_their_own_answers(server: Served, expected: dict[str, Trace]) -> None:
    bodies = [asked(trace) for trace in KNOWN] * 3
    with ThreadPoolExecutor(8) as pool:
        ends = list(pool.map(lambda body: server.events("/ask", body)[-1], bodies))
    assert all(same(end, expected[body["question"]]) for end, body in zip(ends, bodies, strict=True))
    assert not server.live.open and not server.live.waiting


def mars(asked: Any) -> Any:
    """A search that finds the same passage for every line but those about Quito."""
    return [None if "Quito" in line else ("p1", "Mars lies in space.") for _, line in asked]


@pytest.mark.parametrize("precede", [False, True])
def test_memory_lines_come_from_outside(checkpoint: Checkpoint, tmp_path: Path, precede: bool) -> None:
    """Streamed answers are those of an evaluation with the same memory, for several clients at once."""
    looking = retrieving(mars, math.inf, precede=precede)
    questions = [trace.question for trace in KNOWN]
    made = answer_questions(checkpoint.model, checkpoint.codec, questions, SETTINGS, engine=looking)
    assert sum(step.source == "p1" for trace in made for step in trace.steps) >= 4
    with serving(checkpoint, tmp_path, engine=looking) as server:
        with ThreadPoolExecutor(8) as pool:
            streams = list(pool.map(lambda trace: server.events("/ask", asked(trace)), KNOWN))
        given = [{"kinds": ["memory"], "text": GIVEN[0].text}]
        *_, behind = server.events("/continue", {**asked(KNOWN[1]), "steps": given})
        assert not server.live.open
    for events, trace in zip(streams, made, strict=True):
        assert same(events[-1], trace) and len(events) > 3
        shown = [(step.get("source", ""), "own" in step) for step in events[-1]["steps"]]
        assert shown == [(step.source, bool(step.source)) for step in trace.steps]
        json.dumps(events, allow_nan=False)  # tokens that were put in have no figures
        taken = [step for event in events for step in event["steps"] if step.get("source") == "p1"]
        assert all(step["text"] == "Mars lies in space." and step["confidence"] is None for step in taken)
    assert behind["steps"][0]["text"] == GIVEN[0].text and "source" not in behind["steps"][0]


def test_a_line_is_seen_before_a_passage_takes_its_place(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """At every token, asked in the model's thread: what is sent to a slow client leaves states out."""
    seen: list[dict[str, Any]] = []
    with serving(checkpoint, tmp_path, engine=retrieving(mars, math.inf)) as server:
        request = server.live.request(KNOWN[0].question)
        assert server.live.put(request, lambda: seen.append(request.so_far()))
    assert seen[-1]["done"]
    (own, *_) = [step["own"] for step in seen[-1]["steps"] if "own" in step]
    before = [place for place, state in enumerate(seen) if any(step["text"] == own for step in state["steps"])]
    after = [place for place, state in enumerate(seen) if any(step.get("own") == own for step in state["steps"])]
    assert before and after and max(before) < min(after)


def test_a_search_that_fails_is_said_and_the_next_is_answered(checkpoint: Checkpoint, tmp_path: Path) -> None:
    troubles = [RetrieverError("http://127.0.0.1:9/retrieve: no connection")]

    def search(asked: Any) -> Any:
        if troubles:
            raise troubles.pop()
        return mars(asked)

    with serving(checkpoint, tmp_path, engine=retrieving(search, math.inf)) as server:
        *_, first = server.events("/ask", asked(KNOWN[0]))
        *_, second = server.events("/ask", asked(KNOWN[0]))
    assert first["done"] and first["error"] == "http://127.0.0.1:9/retrieve: no connection"
    assert "error" not in second and second["steps"][0]["source"] == "p1"


def test_models_that_transformers_decodes_stream_too(
    trained: Path, expected: dict[str, Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_feeds", lambda network: False)
    with serving(load_checkpoint(trained), tmp_path) as server:
        events = server.events("/ask", asked(KNOWN[0]))
        with ThreadPoolExecutor(3) as pool:
            ends = list(pool.map(lambda trace: server.events("/ask", asked(trace))[-1], KNOWN[:3]))
    assert same(events[-1], expected[KNOWN[0].question.text])
    assert all(0 < step["confidence"] <= 1 for step in events[-1]["steps"])
    assert len({json.dumps(event["steps"]) for event in events}) > 3 and not events[0]["begun"] and events[-1]["begun"]
    assert all(same(end, expected[end["question"]]) for end in ends)


def test_control_tokens_in_a_question_are_text(server: Served, expected: dict[str, Trace]) -> None:
    request = server.live.request(Question(CONTROL, "?"))
    planning = {i for block in server.live.codec.blocks.values() for i in block}
    assert not planning & set(request.row.pending[: -len(server.live.codec.opening())])
    assert server.live.codec.eos_id not in request.row.pending
    *_, last = server.events("/ask", {"question": CONTROL})
    assert same(last, expected[CONTROL]) and last["answer"] is None


class Held:
    """Holds every pass of the engine until it is let go."""

    def __init__(self, server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        server.events("/ask", asked(KNOWN[0]))  # the engine has tried the model by now
        self.free, scores = threading.Event(), engine.Network.scores

        def held(network: Any, cohorts: Any) -> Any:
            self.free.wait(20)
            return scores(network, cohorts)

        monkeypatch.setattr(engine.Network, "scores", held)


def until(true: Callable[[], Any]) -> bool:
    """Whether it comes true within half a minute."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.01)
    return False


def open_stream(server: Served, trace: Trace) -> http.client.HTTPConnection:
    wire = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    wire.request("POST", "/ask", json.dumps(asked(trace)), {"Content-Type": "application/json"})
    return wire


def test_a_full_queue_answers_503(
    checkpoint: Checkpoint, expected: dict[str, Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(checkpoint, tmp_path, limit=2) as server:
        held = Held(server, monkeypatch)
        wires = [open_stream(server, trace) for trace in KNOWN[:2]]
        assert until(lambda: len(server.live.open) == 2)
        status, headers, body = server.post("/ask", asked(KNOWN[2]))
        assert (status, int(headers["retry-after"]) >= 1) == (503, True)
        assert "too many questions" in json.loads(body)["error"]
        held.free.set()
        for wire, trace in zip(wires, KNOWN, strict=False):
            assert same(json.loads(wire.getresponse().read().splitlines()[-1]), expected[trace.question.text])
        assert same(server.events("/ask", asked(KNOWN[2]))[-1], expected[KNOWN[2].question.text])


def test_clients_that_leave_free_their_places(
    checkpoint: Checkpoint, expected: dict[str, Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(checkpoint, tmp_path, limit=3) as server:
        held = Held(server, monkeypatch)
        flying = open_stream(server, KNOWN[0])
        assert until(lambda: server.live.open and not server.live.waiting)  # its first pass is held
        queued = [open_stream(server, trace) for trace in KNOWN[1:3]]
        assert until(lambda: len(server.live.waiting) == 2)
        gone = [*server.live.open]
        for wire in (flying, queued[0]):
            wire.close()
        assert until(lambda: sum(request.gone for request in gone) == 2)
        held.free.set()
        assert same(json.loads(queued[1].getresponse().read().splitlines()[-1]), expected[KNOWN[2].question.text])
        assert until(lambda: not server.live.open)
        assert [len(request.row.ids) for request in gone[:2]] == [1, 0]  # one token more in flight, none in the queue


def test_a_model_that_fails_tells_its_clients_and_goes_on(
    checkpoint: Checkpoint, expected: dict[str, Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(checkpoint, tmp_path) as server, monkeypatch.context() as broken:
        server.events("/ask", asked(KNOWN[1]))

        def fail(*_: Any) -> Any:
            raise RuntimeError("no memory")

        broken.setattr(engine.Network, "scores", fail)
        *_, last = server.events("/ask", asked(KNOWN[0]))
        assert last["done"] and "no memory" in last["error"]
        broken.undo()
        assert same(server.events("/ask", asked(KNOWN[0]))[-1], expected[KNOWN[0].question.text])


def test_only_the_servers_own_page_may_ask(server: Served) -> None:
    own = f"127.0.0.1:{server.port}"
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1:1", f"127.0.0.2:{server.port}", "127.0.0.1"):
        assert server.send("GET", "/", Host=host)[0] == 403
        assert server.post("/ask", asked(KNOWN[0]), Host=host)[0] == 403
    for origin in (
        "http://evil.example",
        "null",
        f"https://{own}",
        f"http://localhost:{server.port}",
        f"http://{own}/",
    ):
        status, headers, body = server.post("/ask", asked(KNOWN[0]), Origin=origin)
        assert status == 403 and origin in json.loads(body)["error"]
        assert not [name for name in headers if name.startswith("access-control")]
    assert server.post("/ask", asked(KNOWN[0]), Origin=f"http://{own}")[0] == 200
    assert server.send("OPTIONS", "/ask", Origin="http://evil.example")[0] == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert server.post("/ask", asked(KNOWN[0]), content_type=kind)[0] == 415
    name = f"localhost:{server.port}"
    assert server.send("GET", "/", Host=name)[0] == 200
    assert server.post("/ask", asked(KNOWN[0]), Host=name, Origin=f"http://{name}")[0] == 200


@pytest.mark.parametrize(
    ("header", "bound", "own"),
    [
        ("192.168.1.5:8000", "0.0.0.0", True),
        ("[fe80::1]:8000", "::", True),
        ("name.example:8000", "0.0.0.0", False),
        ("[::1]:8000", "::1", True),
        ("[0:0:0:0:0:0:0:1]:8000", "::1", True),
        ("box.lan:8000", "box.lan", True),
        ("127.0.0.1:8000", "192.168.1.5", False),
        ("user@127.0.0.1:8000", "127.0.0.1", False),
        ("127.0.0.1:8000.evil.example", "127.0.0.1", False),
        ("", "127.0.0.1", False),
    ],
)
def test_hosts_that_are_own(header: str, bound: str, own: bool) -> None:
    assert own_host(header, bound, 8000) == own


def test_the_page_may_run_its_own_scripts_alone(server: Served) -> None:
    status, headers, body = server.send("GET", "/")
    assert (status, body.decode()) == (200, PAGE)
    csp = headers["content-security-policy"]
    assert "default-src 'none'" in csp and "frame-ancestors 'none'" in csp and "unsafe" not in csp
    assert "script-src 'sha256-a4ayc/80/OGda4BO/1o/V0etpOqiLx1JwB5S3beHW0s='" in csp  # of "1"
    for path in ("/", "/nowhere", "/traces"):
        _, headers, _ = server.send("GET", path)
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert json.loads(server.send("GET", "/traces")[2]) == [{"id": "x"}]


REFUSED: dict[str, tuple[str, Any, int, str]] = {
    "not JSON": ("/ask", b"{", 400, "JSON"),
    "deep": ("/ask", b"[" * 60000, 400, "JSON"),
    "half a character": ("/ask", b'{"question": "\\ud800"}', 400, "JSON"),
    "a list": ("/ask", [], 422, "object"),
    "no question": ("/ask", {}, 422, "question: "),
    "blank question": ("/ask", {"question": "  "}, 422, "question: "),
    "long question": ("/ask", {"question": "x" * 4001}, 422, "question: "),
    "over the model's positions": ("/ask", {"question": "x<?" * 1300}, 422, "question: "),
    "unknown field": ("/ask", {"question": "x", "temperature": 2}, 422, "temperature: "),
    "long choice": ("/ask", {"question": "x", "choices": ["a", "x" * 501]}, 422, "choices.1: "),
    "many choices": ("/ask", {"question": "x", "choices": ["a"] * 27}, 422, "choices: "),
    "long line": (
        "/continue",
        {"question": "x", "steps": [{"kinds": ["memory"], "text": "x" * 1001}]},
        422,
        "steps.0.text",
    ),
    "other kind": ("/continue", {"question": "x", "steps": [{"kinds": ["answer"], "text": "x"}]}, 422, "['answer']"),
    "other kind kept": (
        "/corrections",
        {"question": "x", "answer": "A", "steps": [{"kinds": ["prefix"], "text": "x"}]},
        422,
        "['prefix']",
    ),
    "no answer": ("/corrections", {"question": "x", "steps": [{"kinds": ["memory"], "text": "x"}]}, 422, "answer: "),
    "long body": ("/ask", {"question": "x" * 70000}, 413, "65536"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bodies_that_are_refused(server: Served, case: str) -> None:
    path, body, wanted, named = REFUSED[case]
    status, _, found = server.post(path, body)
    assert status == wanted and named in json.loads(found)["error"]
    assert not server.live.open and not server.corrections.is_file()


def test_a_long_body_without_a_length_is_refused(server: Served) -> None:
    wire = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    parts = (b"x" * 1024 for _ in range(65))
    wire.request("POST", "/ask", parts, {"Content-Type": "application/json"}, encode_chunked=True)
    assert wire.getresponse().status == 413


def test_what_is_known_of_a_question(server: Served) -> None:
    status, _, body = server.post("/facts", {**asked(KNOWN[1]), "line": "Lima"})
    assert (status, json.loads(body)) == (
        200,
        {
            "gold": ["Lima lies in South America."],
            "answer": KNOWN[1].question.answer,
            "retrieved": [{"id": "p1", "text": "A passage about Lima"}],
        },
    )
    assert json.loads(server.post("/facts", {"question": "Who?"})[2])["gold"] == []


def test_corrections_are_labelled_traces_that_train(server: Served, trained: Path, tmp_path: Path) -> None:
    def keep(number: int) -> int:
        steps = [{"kinds": ["memory"], "text": f"Lima is <answer_0>\nnumber {number}."}]
        body = {**asked(KNOWN[number % 4]), "steps": steps, "answer": "False"}
        return server.post("/corrections", body)[0]

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(keep, range(24))) == {201}
    kept = read_traces(server.corrections)
    assert sorted(trace.steps[0].text for trace in kept) == sorted(f"Lima is <answer_0> number {n}." for n in range(24))
    assert {trace.prediction for trace in kept} == {None} and {trace.answer for trace in kept} == {"False"}
    assert {trace.question.id for trace in kept} == {trace.question.id for trace in KNOWN[:4]}
    with server.corrections.open("ab") as torn:
        torn.write(b'{"question": "cut sh')
    assert keep(24) == 201
    assert len(read_traces(server.corrections)) == 25
    recipe = tiny_recipe(tmp_path, trained.parent / "base", **{"data.paths": [str(server.corrections)]})
    assert pipeline.train(recipe.model_copy(update={"output_dir": str(tmp_path / "again")})).is_dir()


def test_after_the_limit_open_requests_are_dropped(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_run, "AFTER", 0.0)
    with serving(checkpoint, tmp_path, grace=0.3) as server:
        held = Held(server, monkeypatch)
        wire = open_stream(server, KNOWN[0])
        assert until(lambda: server.live.open)
        server.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises((http.client.HTTPException, ConnectionError)):  # while the pass is held
            wire.getresponse().read()
        held.free.set()
        assert until(lambda: not server.thread.is_alive())
        wire.close()


@contextmanager
def started(run: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`memreason serve` as a process of its own, and its port."""
    command = [sys.executable, "-m", "memreason", "serve", str(run), "--port", "0", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        found = next(m for line in process.stdout if (m := re.search(r"http://127\.0\.0\.1:(\d+)/", line)))
        yield process, int(found[1])
    finally:
        process.kill()
        process.wait()


def test_sigterm_lets_streams_end_and_takes_no_new_ones(trained: Path, expected: dict[str, Trace]) -> None:
    words = ["--eval.batch_size", "1", "--eval.max_new_tokens", "80"]
    with started(trained, *words) as (process, port):
        server = Served(port, *[None] * 4)  # type: ignore[arg-type]
        assert b"Not evaluated yet" in server.send("GET", "/")[2]
        replies = [open_stream(server, trace).getresponse() for trace in KNOWN * 4]  # all are open, few have ended
        process.send_signal(signal.SIGTERM)
        late: list[http.client.HTTPResponse] = []
        assert until(lambda: late.append(open_stream(server, KNOWN[0]).getresponse()) or late[-1].status == 503)
        assert "stopping" in json.loads(late[-1].read())["error"] and late[-1].headers["Retry-After"]
        for reply, trace in zip([*replies, *late[:-1]], [*KNOWN * 4, *[KNOWN[0]] * len(late)], strict=False):
            assert same(json.loads(reply.read().splitlines()[-1]), expected[trace.question.text])
        assert process.wait(60) == 0


def test_what_is_missing_or_taken_is_said(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(trained), "--port", str(port)]) == 2
        assert f"--port {port}: cannot listen there" in capsys.readouterr().err
    assert main(["serve", str(trained), "--port", "123456"]) == 2
    assert "--port 123456: cannot listen there" in capsys.readouterr().err
    monkeypatch.setattr("memreason.pages.find_spec", lambda name: None if name == "uvicorn" else True)
    assert main(["serve", str(trained)]) == 2
    assert "uvicorn not installed: pip install 'memreason[serve]'" in capsys.readouterr().err


def test_addresses() -> None:
    assert address("0.0.0.0", 80) == "http://localhost:80/" and address("::1", 1) == "http://[::1]:1/"
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "box")] == [True] * 3 + [
        False
    ] * 2
