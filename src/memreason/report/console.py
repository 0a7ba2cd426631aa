"""The terminal: one console, notes, and figures in two columns. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

__all__ = ["COLOURS", "console", "figures", "note"]

COLOURS = {"memory": "cyan", "reason": "yellow"}
console = Console(highlight=False, quiet=os.environ.get("RANK", "0") != "0")  # of several processes one speaks


def note(text: str) -> None:
    """One dim line about something that was left out or decided."""
    console.print(Text("note: ", style="dim").append(text))


def figures(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Names and values in two columns; a long path is never broken, so that it can be copied."""
    if title:
        console.print(Text(title, style="bold"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(Text(f"  {name:<{width}}  ", style="dim").append(value, style="not dim"), soft_wrap=True)
