"""Pictures of attention, as SVG and PDF: token by token, step by step, kind by kind, head by head. Needs matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from memreason.measure.flows import Array
from memreason.measure.look import Mark
from memreason.measure.segments import FIRST, Part
from memreason.report.drawing import (
    CELL,
    INK,
    SHADES,
    SOFT,
    canvas,
    drawable,
    headings,
    ink,
    marks_beside,
    numbers,
    pictures,
    save,
    scale,
    shade,
    title_over,
)

__all__ = ["draw_groups", "draw_heads", "draw_steps", "draw_tokens"]

WIDE, HIGH = 0.5, 0.3  # inches of a segment
APART = ("#b2182b", "#f7b799", "#fbfaf8", "#a7cfe4", "#2166ac")  # less, as much, more


def draw_tokens(weights: Array, marks: Sequence[Mark], title: str, about: str, path: Path) -> list[Path]:
    """Heat map of one head, or a mean of heads: the last tokens (rows) looking at all that stand before them.

    Darkness goes with the square root of the weight, up to the largest one outside the first token's column.
    """
    rows = marks[len(marks) - len(weights) :]
    top = _most(weights, marks)
    ahead = np.arange(len(marks)) > np.arange(len(marks) - len(rows), len(marks))[:, None]
    wide, high = CELL * len(marks), CELL * len(rows)
    with pictures():
        figure, (axes,) = canvas((wide + 2.1, high + 2.55), (1.3, 1.25, wide, high))
        image = shade(axes, np.ma.masked_array(weights, ahead), top, power=0.5)
        marks_beside(axes, rows, marks, (CELL, CELL))
        headings(axes, rows, marks)
        title_over(figure, title, about)
        scale(figure, axes, image, "attention weight")
        return save(figure, path)


def _most(weights: Array, marks: Sequence[Mark]) -> float:
    """The largest weight outside the first token's column, which would leave all others pale."""
    return float(np.nanmax(weights[:, [mark.part != FIRST for mark in marks]], initial=0.0)) or 1.0


def draw_steps(mass: Array, marks: Sequence[Mark], title: str, about: str, path: Path) -> list[Path]:
    """Line × line: the mass that each segment gives to each, as numbers too; the lines' texts stand at the right."""
    asking = [n for n, mark in enumerate(marks) if not np.isnan(mass[n]).all() and mark.part.kind != FIRST.kind]
    names = [Mark(mark.part.name, mark.part) for mark in marks]
    wide, high = WIDE * len(marks), HIGH * len(asking)
    with pictures():
        figure, (axes,) = canvas((wide + 6.2, high + 2.0), (1.3, 1.2, wide, high))
        numbers(axes, mass[asking], SHADES, _most(mass, names))
        marks_beside(axes, [names[n] for n in asking], names, (WIDE, HIGH))
        for place, n in enumerate(asking):
            text = drawable(textwrap.shorten(marks[n].text, 75, placeholder=" …"))
            axes.text(len(marks) - 0.3, place, text, va="center", color=ink(marks[n].part), fontsize=8)
        title_over(figure, title, about)
        return save(figure, path)


def draw_groups(groups: Mapping[str, Array], parts: Sequence[Part], about: str, path: Path) -> list[Path]:
    """Kind × kind of an evaluation, a panel for each group of answers, and one for right less wrong."""
    marks = [Mark(part.name, part) for part in parts]
    asking = [n for n, part in enumerate(parts) if part != FIRST]  # it sees itself alone
    panels = dict(groups)
    if {"correct", "wrong"} <= groups.keys():
        panels["correct − wrong"] = groups["correct"] - groups["wrong"]
    wide, high = WIDE * len(parts), HIGH * len(asking)
    boxes = [(1.3 + n * (wide + 0.3), 1.1, wide, high) for n in range(len(panels))]
    top = max(_most(mass, marks) for mass in groups.values())
    with pictures():
        figure, drawn = canvas((1.4 + len(panels) * (wide + 0.3), high + 1.95), *boxes)
        for n, (axes, (name, mass)) in enumerate(zip(drawn, panels.items(), strict=True)):
            signed = name not in groups
            most = float(np.nanmax(np.abs(mass), initial=0.0)) or 1.0
            numbers(axes, mass[asking], APART if signed else SHADES, most if signed else top, signed=signed)
            marks_beside(axes, [Mark("" if n else parts[k].name, parts[k]) for k in asking], marks, (WIDE, HIGH))
            axes.set_title(name, fontsize=9, fontweight="bold", color=INK)
        title_over(figure, "Attention between segments", about)
        return save(figure, path)


def draw_heads(
    mass: Array, pairs: Sequence[tuple[int, int]], parts: Sequence[Part], about: str, path: Path
) -> list[Path]:
    """Layer × head: of each pair of segments the mass that every head lets flow, each on its own scale."""
    layers, heads = mass.shape[:2]
    wide, high = max(0.17 * heads, 1.5), max(0.12 * layers, 0.8)
    boxes = [(0.55 + n * (wide + 1.0), 0.5, wide, high) for n in range(len(pairs))]
    with pictures():
        figure, drawn = canvas((0.6 + len(pairs) * (wide + 1.0), high + 1.4), *boxes)
        for axes, (row, column) in zip(drawn, pairs, strict=True):
            values = mass[:, :, row, column]
            image = shade(axes, values, float(np.nanmax(values, initial=0.0)) or 1.0)
            axes.set_xticks(range(0, heads, -(-heads // 9)))
            axes.set_yticks(range(0, layers, -(-layers // 12)))
            axes.tick_params(length=2, color=SOFT, labelcolor=SOFT)
            axes.set_title(f"{parts[row].name} → {parts[column].name}", fontsize=9, fontweight="bold", color=INK)
            axes.set_xlabel("head", color=SOFT)
            axes.set_ylabel("layer", color=SOFT)
            scale(figure, axes, image, "")
        title_over(figure, "Which heads look where", about)
        return save(figure, path)
