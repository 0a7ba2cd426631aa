"""`memreason bench`: how fast this machine trains and evaluates, beside the public libraries, in one run.

Every job has a process of its own, so that its peak memory and its start are its own; jobs of one comparison take
turns (A B A B), and what is reported is the median of each and of the ratios turn by turn. A baseline with several
settings has each tried once, and the best of them is its turn. Absolute times say little on a shared machine; ratios of
one run do.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memreason.core.errors import MemreasonError
from memreason.core.files import cache_dir, file_hash, write_json
from memreason.fast.compiling import ENOUGH, pays
from memreason.timing import machine
from memreason.timing.curves import curves
from memreason.timing.table import table

__all__ = ["Settings", "bench"]

Figures = dict[str, Any]
LOOKUP = 8  # tokens that `generate` may draft from what it read, which it can at batch 1 alone: ours does so too


@dataclass(frozen=True)
class Settings:
    """What is measured. `run`: a trained run for the evaluations (None: training alone); `rounds`: turns of
    our training and the plain loop's, whose jobs are short, all others have one; `steps`: those of ours that count, the
    baselines take one of `batch` examples, more than the passes that warm them up; `slow_questions`: of
    the questions, how many `generate` gets, in batches and at batch 1; `vllm_python`: the interpreter of an environment
    that holds vLLM (None: without it); `curves`: also those of curves.py."""

    recipe: str = "strategyqa-smollm2"
    run: Path | None = None
    out: Path = Path("bench")
    rounds: int = 2
    steps: int = 1
    batch: int = 16
    questions: int = 300
    slow_questions: tuple[int, int] = (64, 2)
    max_new_tokens: int = 400
    in_flight: int = 192
    generate_batches: tuple[int, ...] = (32, 64)
    vllm_python: Path | None = None
    curves: bool = False
    traces: int = 100_000


def bench(settings: Settings) -> Figures:
    """Measure and write results-MACHINE.json, which is returned. Raises MemreasonError if a job fails."""
    settings.out.mkdir(parents=True, exist_ok=True)
    results: Figures = {"machine": machine.describe(), "settings": {k: str(v) for k, v in vars(settings).items()}}
    results["machine"] |= _job("machine", {}, settings)
    results["start"] = _starts(settings)
    dtype = _faster_dtype(results["machine"])
    results["training"] = _training(settings, dtype)
    if settings.run:
        results["evaluation"] = _evaluation(settings, dtype)
        if settings.curves:
            jobs = _shared_training(settings), _shared_evaluation(settings)
            results["curves"] = curves(lambda name, spec: _job(name, spec, settings), *jobs, settings.out)
    results["encoding"] = _job("encoding", {"traces": settings.traces, "recipe": settings.recipe}, settings)
    results["table"] = table(results)
    write_json(settings.out / f"results-{results['machine']['name']}.json", results)
    return results


def _job(name: str, spec: Figures, settings: Settings) -> Figures:
    """Run one job in a process of its own. Adds `wall_seconds`, from its start to its end."""
    path = settings.out / f"{name}.spec.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return _process([sys.executable, "-m", "memreason.timing.jobs", name, str(path)], name)


def _process(command: Sequence[str], name: str) -> Figures:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    if done.returncode:
        raise MemreasonError(f"bench: {name} failed:\n{done.stderr[-3000:]}")
    figures: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{wall:7.1f} s  {name}", file=sys.stderr, flush=True)
    return {**figures, "wall_seconds": wall}


def _turns(jobs: dict[str, tuple[str, Figures]], rounds: int, settings: Settings) -> dict[str, list[Figures]]:
    """Each job once a round, in turn."""
    found: dict[str, list[Figures]] = {label: [] for label in jobs}
    for _ in range(rounds):
        for label, (name, spec) in jobs.items():
            found[label].append(_vllm(spec, settings) if name == "vllm" else _job(name, spec, settings))
    return found


def _starts(settings: Settings) -> Figures:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "memreason", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    return {"help_seconds": statistics.median(seconds)}


def _best(
    name: str, shared: Figures, tries: Sequence[Figures], figure: str, settings: Settings
) -> tuple[Figures, Figures]:
    """The baseline's best setting here, each tried once: the one that a careful user would find; and its figures."""
    found = [_job(name, {**shared, **setting}, settings) for setting in tries]
    best, figures = max(zip(tries, found, strict=True), key=lambda pair: pair[1][figure])
    print(f"{name}: best of {len(tries)} settings {best}", file=sys.stderr)
    return best, figures


def _faster_dtype(measured: Figures) -> str:
    """What a careful user would give the baselines here: without matrix units bf16 takes ten times as long."""
    return "bf16" if measured["gemm_bf16"] > measured["gemm_fp32"] else "fp32"


def _training(settings: Settings, dtype: str) -> dict[str, list[Figures]]:
    """Ours and the plain loop take turns. TRL's best try is its only turn, behind the first of theirs: compiling takes
    minutes."""
    shared = _shared_training(settings)
    once = {**shared, "steps": 1, "dtype": dtype}
    tries: list[Figures] = [{"micro": micro, "compile": False} for micro in (1, 4)]
    tries += [{"micro": 1, "compile": True}] if pays(ENOUGH) else []
    ours, plain = ("train_memreason", {**shared, "steps": settings.steps + 1}), ("train_plain", {**shared, "steps": 1})
    jobs = {"memreason": ours, "plain loop": plain}
    found = _turns(jobs, 1, settings)
    best, figures = _best("train_trl", once, tries, "tokens_per_second", settings)
    rest = _turns(jobs, settings.rounds - 1, settings)
    label = f"TRL, {dtype}, batch {best['micro']}{', compiled' if best['compile'] else ''}"
    return {name: found[name] + rest[name] for name in jobs} | {label: [figures]}


def _shared_training(settings: Settings) -> Figures:
    return {"recipe": settings.recipe, "batch": settings.batch, "steps": settings.steps}


def _shared_evaluation(settings: Settings) -> Figures:
    """With folders for the merged model and the prompts, named by the weights that they come from."""
    assert settings.run is not None
    weights = sorted(settings.run.glob("**/*.safetensors"))
    if not weights:
        raise MemreasonError(f"bench: {settings.run} holds no weights. Name a trained run or a checkpoint.")
    folder = cache_dir() / "bench" / file_hash(weights[0])[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "run": str(settings.run),
        "merged": str(folder / "merged"),
        "prompts": str(folder / "prompts.json"),
        "questions": settings.questions,
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.in_flight,
    }


def _evaluation(settings: Settings, dtype: str) -> dict[str, list[Figures]]:
    shared = _shared_evaluation(settings)
    _job("export", shared, settings)
    batched, single = (min(count, settings.questions) for count in settings.slow_questions)
    some = {**shared, "questions": batched, "dtype": dtype}
    tries = [{"batch_size": size} for size in sorted({min(size, batched) for size in settings.generate_batches})]
    one_by_one = {**shared, "questions": single, "dtype": "fp32", "batch_size": 1}
    jobs: dict[str, tuple[str, Figures]] = {
        "memreason": ("eval_memreason", shared),
        "generate one by one, fp32": ("eval_transformers", one_by_one),
        "generate with prompt lookup, batch 1, fp32": ("eval_transformers", one_by_one | {"lookup": LOOKUP}),
    }
    if settings.vllm_python:
        if not _vllm_answers(shared).exists():  # its cache of compiled code is filled, which later starts find
            _vllm({**shared, "max_new_tokens": 1}, settings)
        jobs["vLLM"] = ("vllm", shared)
    found = _turns(jobs, 1, settings)
    best, figures = _best("eval_transformers", some, tries, "tokens_per_second", settings)
    return found | {f"generate sorted, {dtype}, batch {best['batch_size']}": [figures]}


def _vllm_answers(spec: Figures) -> Path:
    return Path(spec["prompts"]).with_name("vllm.json")


def _vllm(spec: Figures, settings: Settings) -> Figures:
    """vLLM in its own environment, which knows nothing of this package: a script, prompts as ids, answers as ids."""
    out = _vllm_answers(spec)
    script = str(Path(__file__).with_name("vllm_script.py"))
    command = [str(settings.vllm_python), "-P", script, "--model", spec["merged"], "--prompts", spec["prompts"]]
    command += ["--out", str(out), "--max-new-tokens", str(spec["max_new_tokens"])]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "--in-flight", str(settings.in_flight)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise MemreasonError(f"bench: vLLM failed:\n{done.stderr[-3000:]}")
    wall = time.perf_counter() - start
    print(f"{wall:7.1f} s  vLLM", file=sys.stderr, flush=True)
    figures: Figures = json.loads(out.read_text(encoding="utf-8"))
    rate = figures["tokens"] / figures["generate_seconds"]
    return {**figures, "tokens_per_second": rate, "wall_seconds": wall, "questions": len(figures["ids"])}
