"""What a labelling run says: its summary, its estimate, and what an exchange of batch files did."""

from __future__ import annotations

from typing import Any

from memreason.label.batch import BatchReport
from memreason.report.console import duration, figures

__all__ = ["print_batch", "print_estimate", "print_labels"]


def _dollars(value: float | None) -> str:
    return "unknown: name the model in a price table (--prices FILE)" if value is None else f"${value:,.2f}"


def _share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})" if total else f"{count:,}"


def print_labels(summary: dict[str, Any]) -> None:
    """Counts, failed checks, what it took, and where the files lie."""
    total, usage = summary["questions"], summary["usage"]
    left = [("failed, asked again next time", "failed"), ("not labelled yet", "open")]
    figures(
        "labels",
        [
            ("questions", f"{total:,}"),
            ("accepted", _share(summary["accepted"], total)),
            ("rejected", _share(summary["rejected"], total)),
            *((name, _share(summary[key], total)) for name, key in left if summary[key]),
            ("replies", f"{usage['replies']:,}"),
            ("tokens", f"{usage['prompt_tokens']:,} in prompts, {usage['completion_tokens']:,} in replies"),
            ("cost", _dollars(summary["dollars"])),
        ],
    )
    if summary["checks"]:
        figures("what failed, first tries included", [(name, f"{n:,}") for name, n in summary["checks"].items()])
    rows = [("traces", summary["traces"]), ("rejected", summary["rejected_file"]), ("every reply", summary["journal"])]
    figures("where it lies", rows)
    if summary["accepted"]:
        figures("", [("train on it", f"memreason train RECIPE --data {summary['traces']}")])


def print_estimate(found: dict[str, Any]) -> None:
    """What all questions would take, told from a sample of them."""
    figures(
        f"estimate from {found['sample']} questions, which are kept",
        [
            ("questions", f"{found['questions']:,}"),
            ("accepted", f"{found['accepted']:.0%} of the sample"),
            ("replies", f"{found['replies']:,}"),
            ("tokens", f"{found['prompt_tokens']:,} in prompts, {found['completion_tokens']:,} in replies"),
            ("cost", _dollars(found["dollars"])),
            *([("cost as a batch", _dollars(found["batch_dollars"]))] if found["dollars"] is not None else []),
            ("time", duration(found["seconds"])),
        ],
    )


def print_batch(report: BatchReport) -> None:
    """What was read and written, and what to do next."""
    rows = [("results read", report.read), ("came back with an error", report.errors), ("unknown", report.unknown)]
    rows += [("questions settled", report.settled), ("requests waited for", report.waiting)]
    figures("batch", [(name, f"{count:,}") for name, count in [*rows, ("requests written", report.written)]])
    if report.files:
        figures("", [("upload", ", ".join(map(str, report.files)))])
        figures("", [("then", "put the results into the same folder and run the same command again")])
