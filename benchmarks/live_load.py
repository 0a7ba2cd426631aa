"""Clients at once against `memreason serve RUN` as a process of its own: is anything lost, or mixed up between them?

Every question is asked alone first; then each client asks and continues questions in an order of its own, as fast as
answers come. An answer that differs from the one given alone counts as mixed up, a stream without an end as lost.

    .venv/bin/python benchmarks/live_load.py runs/demo --clients 8 --seconds 60
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

Job = tuple[str, str]  # path, body


class Answer(NamedTuple):
    text: str  # all that must be the same: question, lines with kinds, prediction
    lines: int
    first: float  # seconds until the first line stood there
    whole: float


@contextmanager
def started(run: str) -> Iterator[int]:
    """A server's port. At the end SIGTERM, and it must leave with 0."""
    command = [sys.executable, "-m", "memreason", "serve", run, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = next((m for line in process.stdout if (m := re.search(r"http://127\.0\.0\.1:(\d+)/", line))), None)
    if found is None:
        sys.exit(f"the server did not start (code {process.wait()})")
    try:
        yield int(found[1])
    finally:
        process.send_signal(signal.SIGTERM)
        if code := process.wait(60):
            sys.exit(f"the server left with {code}")


def answer(wire: http.client.HTTPConnection, job: Job) -> Answer:
    """The end of a stream. Raises ValueError for another status, an error in it, or one that breaks off."""
    start, first, last = time.perf_counter(), 0.0, None
    wire.request("POST", job[0], job[1], {"Content-Type": "application/json"})
    reply = wire.getresponse()
    if reply.status != 200:
        raise ValueError(f"{reply.status}: {reply.read()[:200]!r}")
    for line in reply:
        last = json.loads(line)
        first = first or (time.perf_counter() - start if last["steps"] else 0.0)
    if not last or not last["done"] or "error" in last:
        raise ValueError(f"broke off: {last}")
    said = [last["question"], last["choices"], [[s["kinds"], s["text"]] for s in last["steps"]], last["prediction"]]
    return Answer(json.dumps(said), len(last["steps"]), first, time.perf_counter() - start)


def jobs_of(port: int, count: int) -> list[Job]:
    """Questions of the run's evaluation to ask, and their traces to continue behind the first line."""
    wire = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    wire.request("GET", "/traces")
    jobs = []
    for row in json.loads(wire.getresponse().read())[:count]:
        asked = {"question": row["question"], "choices": row["choices"]}
        jobs.append(("/ask", json.dumps(asked)))
        if lines := row["of"][0]["lines"]:
            step = {"kinds": [lines[0]["kind"]] if lines[0]["kind"] else [], "text": lines[0]["text"]}
            jobs.append(("/continue", json.dumps({**asked, "steps": [step]})))
    return jobs


class Client(threading.Thread):
    """Asks until its time is over."""

    def __init__(self, number: int, port: int, alone: dict[Job, Answer], until: float) -> None:
        super().__init__()
        self.port, self.alone, self.until, self.draw = port, alone, until, random.Random(number)
        self.answers: list[Answer] = []
        self.trouble: Counter[str] = Counter()

    def run(self) -> None:
        wire = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        while time.perf_counter() < self.until:
            job = self.draw.choice(list(self.alone))
            try:
                found = answer(wire, job)
            except (OSError, ValueError, http.client.HTTPException) as error:
                self.trouble[f"lost: {error}"] += 1
                wire.close()
                continue
            self.answers.append(found)
            if found.text != self.alone[job].text:
                self.trouble["mixed up"] += 1
                print(f"alone {self.alone[job].text}\nnow   {found.text}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run that was evaluated")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--questions", type=int, default=12)
    given = parser.parse_args()
    with started(given.run) as port:
        wire = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        alone = {job: answer(wire, job) for job in jobs_of(port, given.questions)}
        if not alone:
            sys.exit(f"{given.run} was not evaluated: memreason eval {given.run}")
        begin = time.perf_counter()
        clients = [Client(number, port, alone, begin + given.seconds) for number in range(given.clients)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        spent = time.perf_counter() - begin
    answers = [one for client in clients for one in client.answers]
    trouble = sum((client.trouble for client in clients), Counter())
    whole, first = sorted(one.whole for one in answers), [one.first for one in answers]
    print(f"{given.clients} clients, {spent:.0f} s: {len(answers)} answers, {len(answers) / spent:.1f} a second")
    print(f"lines: {sum(one.lines for one in answers) / spent:.1f} a second")
    print(f"latency: median {statistics.median(whole):.2f} s, p95 {whole[int(0.95 * len(whole))]:.2f} s")
    print(f"first line: median {statistics.median(first):.2f} s")
    print(f"alone: median {statistics.median(one.whole for one in alone.values()):.2f} s")
    print(f"trouble: {dict(trouble) or 'none'}")
    return 1 if trouble or not answers else 0


if __name__ == "__main__":
    sys.exit(main())
