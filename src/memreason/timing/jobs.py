"""What `memreason bench` times, each job in a process of its own: `python -m memreason.timing.jobs JOB SPEC`.

A job reads its settings from a JSON file and prints one JSON object as its last line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memreason.timing import encoding, evaluation, machine, training

__all__ = ["JOBS", "main"]

JOBS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "train_memreason": training.train_memreason,
    "train_plain": training.train_plain,
    "train_trl": training.train_trl,
    "eval_memreason": evaluation.eval_memreason,
    "eval_transformers": evaluation.eval_transformers,
    "encoding": encoding.measure,
    "export": evaluation.export,
    "machine": machine.measure,
}


def main() -> None:
    name, path = sys.argv[1:]
    start = time.perf_counter()
    figures = JOBS[name](json.loads(Path(path).read_text(encoding="utf-8")))
    print(json.dumps({**figures, "job_seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
