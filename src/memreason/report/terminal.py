"""What a person reads in the terminal of a run: its figures, some of its traces, a bench."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from memreason.core.trace import Trace
from memreason.generate.answer import read_samples
from memreason.measure.score import score_trace
from memreason.report.console import console, figures, print_trace

__all__ = ["print_bench", "print_results", "print_samples"]


def print_results(results: dict[str, Any]) -> None:
    """The figures of one evaluation, and where its files lie."""
    low, high = results["interval"]
    figures(
        f"{results['task']} / {results['split']}",
        [
            ("questions", f"{results['n']}"),
            ("accuracy", f"{results['accuracy']:.3f}  (95 % Wilson {low:.3f} to {high:.3f})"),
            ("chance, majority class", f"{results['chance']:.3f}, {results['majority']:.3f}"),
            ("no answer", f"{results['no_answer']:.3f}"),
            ("well-formed traces", f"{results['well_formed']:.3f}"),
            *([("cut off at the limit", f"{results['cut_off']:.3f}")] if results["cut_off"] else []),
            ("lines per trace", ", ".join(f"{kind} {count:.2f}" for kind, count in results["blocks"].items())),
            *([("memory retrieved", _retrieved(results))] if "retrieved" in results else []),
            ("tokens per trace", f"{results['tokens_per_trace']:.1f}"),
            ("time", f"{results['seconds']:.0f} s"),
            ("peak memory", f"{results['peak_memory'] / 2**30:.1f} GiB"),
        ],
    )
    folder = Path(results["folder"])
    figures(
        "where it lies",
        [
            ("run", str(folder.parents[2])),
            ("checkpoint", results["checkpoint"]),
            ("figures", str(folder / "results.json")),
            ("every trace", str(folder / "samples.jsonl")),
            ("to read", str(folder / "generations.txt")),
        ],
    )


def _retrieved(results: dict[str, Any]) -> str:
    below = "" if results["unsure_below"] is None else f", those below {results['unsure_below']:.4f}"
    return f"{results['retrieved']:.3f} of {results['memory_lines']} lines{below}"


def print_samples(results: dict[str, Any], count: int = 4, seed: int = 0) -> None:
    """A few coloured traces of an evaluation, a wrong one among them if there is one."""
    traces = [Trace.from_json(line) for line in read_samples(Path(results["folder"]))]
    scored = [(trace, score_trace(trace).verdict) for trace in traces]
    random.Random(seed).shuffle(scored)
    wrong = [pair for pair in scored if pair[1] != "correct"][:1]
    right = [pair for pair in scored if pair[1] == "correct"]
    for trace, verdict in (right[: count - len(wrong)] + wrong)[:count]:
        print_trace(trace, verdict)


def print_bench(results: dict[str, Any]) -> None:
    """The table of a bench: what is compared, the ratio, its extremes over several turns, and both absolute figures."""
    machine = results["machine"]
    console.print(
        f"{machine['processor']}, {machine['threads']} threads; matrix products {machine['gemm_fp32']:,.0f} GFLOP/s in "
        f"fp32, {machine['gemm_bf16']:,.0f} in bf16; memory reads {machine['read_bandwidth']:.0f} GB/s",
        soft_wrap=True,
    )
    meaning = "ratio: how many times better ours is, over the turns"
    table = Table(box=None, header_style="bold", pad_edge=False, caption=meaning, caption_justify="left")
    for title in ("job", "ratio", "turns", "reach", "ours", "theirs"):
        table.add_column(title, justify="left" if title == "job" else "right", no_wrap=title != "job")
    for row in results["table"]:
        job = Text(row["job"]) + (Text(f"\n  {row['against']}", style="dim") if row["against"] else Text())
        turns = f"{row['from']:.2f} to {row['to']:.2f}" if row.get("from") != row.get("to") else ""
        ratio, *values = [_short(row[name]) if name in row else "" for name in ("ratio", "ours", "theirs")]
        table.add_row(job, ratio, turns, row["reach"], *values)
    console.print(table)


def _short(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value > 1e8 else f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
