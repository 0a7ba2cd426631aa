"""What was seen of attention: its table in the terminal, and which pictures are drawn of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from memreason.core.errors import MemreasonError
from memreason.measure.flows import HEADLINES, Array
from memreason.measure.look import Closeup, Mark
from memreason.measure.segments import Part
from memreason.report.console import COLOURS, console, figures, note, print_trace
from memreason.report.drawing import needs_matplotlib, visible
from memreason.report.heatmap import draw_groups, draw_heads, draw_steps, draw_tokens

__all__ = ["draw_closeup", "draw_overview", "show_closeup", "show_overview"]

MEANING = (
    "Rows look at columns: what a token of the row gives to all tokens of the column together, mean over its tokens, "
    "{over}. Rows sum to one."
)
LEGEND = (
    "What a token of the left segment gives to all of the right one, mean over its tokens, layers, heads and "
    "questions; right less wrong answers with intervals of 95 %, also among questions of the same form and lines "
    "alone; and what it gives to one token (right, wrong)."
)


def draw_overview(found: Mapping[str, Any], arrays: Mapping[str, Array], folder: Path) -> list[Path]:
    """Kind × kind, right against wrong, and layer × head for the main flows."""
    parts = [_part(name) for name in found["segments"]]
    groups = {name: found["n"][name] for name in ("correct", "wrong") if found["n"][name]}
    told = ", ".join(f"{count} {name}" for name, count in groups.items())
    mass = {name: arrays[name].mean((0, 1)) for name in groups}
    where = f"{found['task']} / {found['split']}: {told} answers. "
    about = where + MEANING.format(over=f"over {found['layers']} layers and {found['heads']} heads, and over questions")
    about += " The difference is not adjusted for what was asked." if len(mass) > 1 else ""
    drawn = draw_groups(mass, parts, about, folder / "flow")
    names = found["segments"]
    pairs = [(names.index(row), names.index(column)) for row, column in HEADLINES if {row, column} <= {*names}]
    if pairs:
        about = f"{where}Mass that each head lets flow, mean over all of them; each on a scale of its own."
        drawn += draw_heads(arrays["all"], pairs, parts, about, folder / "heads")
    return drawn


def _part(name: str) -> Part:
    return Part(name.removesuffix(" block"), block=name.endswith(" block"))


def draw_closeup(found: Closeup, folder: Path) -> list[Path]:
    """Line × line, and the map of each chosen head."""
    title = found.question.text
    about = MEANING.format(over="over layers and heads")
    drawn = draw_steps(found.steps, found.lines, title, about, folder / "steps")
    marks = [Mark(visible(mark.text), mark.part) for mark in found.tokens]
    for (layer, head), weights in found.maps.items():
        which = f"layer {layer}, " + ("mean over heads" if head is None else f"head {head}")
        about = (
            f"{which}. Each token of the trace (row) looks at what stands before it (column). Darkness: square root of "
            "the weight, full at the largest outside the first token. Block tokens stand on their kind's colour."
        )
        name = f"layer-{layer}-" + ("mean" if head is None else f"head-{head}")
        drawn += draw_tokens(weights, marks, title, about, folder / name)
    return drawn


def show_overview(found: Mapping[str, Any], arrays: Mapping[str, Array], folder: Path) -> None:
    """Draw and print an evaluation's flow. Without matplotlib the pictures are left out, and that is said."""
    try:
        needs_matplotlib()
        drawn = draw_overview(found, arrays, folder / Path(found["folder"]).name)
    except MemreasonError as error:
        drawn = []
        note(str(error))
    n = found["n"]
    console.print(
        Text(f"{found['task']} / {found['split']}: {n['correct']} right and {n['wrong']} wrong answers", style="bold")
        + Text(f", {found['layers']} layers, {found['heads']} heads", style="not bold")
    )
    console.print(_table(found["pairs"]))
    console.print(f"alike: {found['alike']} of {n['all']} questions have both right and wrong answers of their sort")
    if found["strongest"]:
        figures("heads that look there most (layer.head mass)", [_heads(*item) for item in found["strongest"].items()])
    written = Path(found["folder"])
    rows = [("means", str(written / "attention.json")), ("every layer and head", str(written / "attention.npz"))]
    figures("where it lies", rows + _pictures(drawn))


def _table(pairs: list[dict[str, Any]]) -> Table:
    """The flow from lines and answer in %, right against wrong answers with intervals; what matters most in bold."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", caption=LEGEND, caption_justify="left")
    for title in ("% of attention", "right", "wrong", "difference", "if alike", "per token"):
        table.add_column(title, justify="left" if title.startswith("%") else "right", no_wrap=True)
    for one in pairs:
        ends = [Text(one[end], style=COLOURS.get(one[end].removesuffix(" block"), "")) for end in ("from", "to")]
        mass, key = one["mass"], one["per_key"]
        values = [
            _value(mass["correct"], 1),
            _value(mass["wrong"], 1),
            _apart(mass["difference"]),
            _apart(mass["alike"]),
        ]
        each = f"{_value(key['correct'], 2)} {_value(key['wrong'], 2)}"
        table.add_row(ends[0] + " → " + ends[1], *values, each, style="bold" if one["headline"] else "")
    return table


def _value(measured: list[float] | None, digits: int) -> str:
    return "–" if measured is None else f"{100 * measured[0]:.{digits}f}"


def _apart(measured: list[float] | None) -> str:
    if measured is None:
        return "–"
    apart, low, high = (100 * value for value in measured)
    return f"{apart:+.1f} ({low:+.1f} {high:+.1f})"


def _heads(pair: str, heads: list[list[float]]) -> tuple[str, str]:
    return pair.replace(">", "→"), ", ".join(f"{layer:.0f}.{head:.0f} {mass:.2f}" for layer, head, mass in heads)


def _pictures(paths: list[Path]) -> list[tuple[str, str]]:
    drawn = [path.with_suffix("") for path in paths if path.suffix == ".svg"]
    return [(path.name, f"{path}.svg, .pdf") for path in drawn]


def show_closeup(found: Closeup, folder: Path) -> None:
    """Draw and print one trace. An id may be any text, and names a folder here."""
    drawn = draw_closeup(found, folder / re.sub(r"[^\w-]+", "_", found.question.id))
    print_trace(found.trace)
    figures("where it lies", _pictures(drawn))
