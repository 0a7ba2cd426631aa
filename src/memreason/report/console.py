"""The terminal: one console, notes, figures in two columns, and traces, each kind in its colour. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from memreason.core.trace import LETTERS, Trace

__all__ = ["COLOURS", "console", "duration", "figures", "note", "print_trace"]

COLOURS = {"memory": "cyan", "reason": "yellow"}
console = Console(highlight=False, quiet=os.environ.get("RANK", "0") != "0")  # of several processes one speaks


def note(text: str) -> None:
    """One dim line about something that was left out or decided."""
    console.print(Text("note: ", style="dim").append(text))


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def figures(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Names and values in two columns; a long path is never broken, so that it can be copied."""
    if title:
        console.print(Text(title, style="bold"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(Text(f"  {name:<{width}}  ", style="dim").append(value, style="not dim"), soft_wrap=True)


def print_trace(trace: Trace, verdict: str = "") -> None:
    """One trace, each kind in its colour."""
    text = Text(trace.question.text + "\n", style="bold")
    for letter, choice in zip(LETTERS, trace.question.choices or (), strict=False):
        text.append(f"  {letter}. {choice}\n", style="not bold")
    for step in trace.steps:
        kind = "+".join(step.kinds) or "line"
        text.append(f"  {kind:>7} ", style=f"bold {COLOURS.get(kind, 'white')}")
        text.append(step.text + "\n", style=f"not bold {COLOURS.get(kind, 'white')}")
    text.append(f"   answer {trace.answer or '(none)'}", style="bold green")
    if verdict:
        wanted = "" if verdict == "correct" else f", gold {trace.question.answer}"
        text.append(f"  {verdict.replace('_', ' ')}{wanted}", style="green" if verdict == "correct" else "red")
    if trace.faults:
        text.append(f"\n  faults: {', '.join(trace.faults)}", style="red")
    console.print(text, "")
