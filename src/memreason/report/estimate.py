"""What a recipe would take, as it is printed: a dry run's figures, and those of `memreason estimate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from memreason.report.console import console, duration, figures, note

__all__ = ["print_estimate"]

PARTS = ("weights", "gradients", "optimizer", "activations", "libraries")
JOBS = {"training": "training", "choosing": "choosing the epoch", "evaluation": "evaluation", "total": "all"}


def print_estimate(found: dict[str, Any]) -> None:
    """Figures of the job, memory of one device by what holds it, and time and cost of each part."""
    model, data, machine = found["model"], found["data"], found["hardware"]
    figures(
        f"{found['recipe']} on {machine['name']}",
        [
            ("model", f"{model['base']}, {model['dtype']}" + (", configuration as shipped" * model["config_shipped"])),
            ("trainable parameters", f"{model['trained']:,} of {model['parameters']:,}"),
            ("data", data["source"]),
            ("examples", f"{data['examples']:,} ({data['dropped']} dropped, {data['cut']} cut)"),
            ("validation", f"{data['validation']:,}"),
            ("tokens", f"{data['tokens']:,} (longest {data['longest']})"),
            ("steps", f"{found['steps']:,} of {found['step_examples']} examples, {found['strategy']}"),
            ("operations", f"{_short(found['flops'])}FLOP, {_short(found['flops_per_token'])}FLOP a token"),
            ("of the peak", _reach(found)),
            ("memory, estimated", _memory(found)),
            ("evaluation", _evaluation(found["evaluation"])),
        ],
    )
    console.print(_table(found), "")
    if not found["fits"]:
        ways = "; or ".join(found["remedies"]) or "nothing tried does: a smaller model, or devices with more memory"
        note(
            f"training does not fit: {_gib(found['memory']['total'])} of {_gib(machine['memory'])}. What would: {ways}"
        )


def _reach(found: dict[str, Any]) -> str:
    best, worst = found["peak_share"]
    return f"{worst:.0%} to {best:.0%} of {_short(found['hardware']['flops'])}FLOP/s while it trains"


def _memory(found: dict[str, Any]) -> str:
    memory = found["memory"]
    parts = ", ".join(f"{name} {memory[name] / 2**30:.2f}" for name in PARTS)
    return f"{_gib(memory['total'])} at most on each device of {_gib(found['hardware']['memory'])} ({parts})"


def _evaluation(asked: dict[str, Any]) -> str:
    cache = f"{_gib(asked['memory'])}, {_gib(asked['cache'])} of it keys and values of {asked['in_flight']} in flight"
    return f"{asked['questions']:,} questions, {asked['tokens']:,} tokens; {cache}"


def _table(found: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("", "at best", "at worst", *(("dollars",) if found["dollars"] else ())):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for name, text in JOBS.items():
        low, high = found["seconds"][name]
        if high:
            cost = [_dollars(found["dollars"][name])] if found["dollars"] else []
            table.add_row(Text(text, style="bold" if name == "total" else ""), duration(low), duration(high), *cost)
    return table


def _dollars(ends: Sequence[float]) -> str:
    return " to ".join(f"${value:,.2f}" for value in ends)


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def _short(value: float) -> str:
    """1.2e16 as "12.0 P": decimal prefixes."""
    for exponent, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G")):
        if value >= 10**exponent:
            return f"{value / 10**exponent:,.1f} {prefix}"
    return f"{value / 1e6:,.1f} M"
