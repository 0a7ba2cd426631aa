"""What pictures of attention share: marks beside rows and columns, their colours, cells, letters, files."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from memreason.core.errors import MemreasonError
from memreason.core.files import writing
from memreason.core.trace import MEMORY, REASON
from memreason.encode.scheme import ANSWER
from memreason.measure.flows import Array
from memreason.measure.look import Mark
from memreason.measure.segments import FIRST, QUESTION, Part

__all__ = [
    "CELL",
    "INK",
    "RULE",
    "SHADES",
    "SOFT",
    "canvas",
    "drawable",
    "headings",
    "ink",
    "marks_beside",
    "needs_matplotlib",
    "numbers",
    "pictures",
    "save",
    "scale",
    "shade",
    "title_over",
    "visible",
]

TONES = {MEMORY: "#2ab7d0", REASON: "#e0a02b", ANSWER: "#a98bc4", QUESTION.kind: "#b4bccb", FIRST.kind: "#e3e2dd"}
INKS = {MEMORY: "#0b6173", REASON: "#875300", ANSWER: "#5b3a73", QUESTION.kind: "#4a556b"}
OTHERS = ("#009e73", "#cc79a7", "#d55e00", "#56b4e9")  # of other kinds, told apart by the colour-blind too
INK, SOFT, RULE = "#1d2433", "#5d6678", "#d9d8d2"
SHADES = ("#fbfaf8", "#dcdbe8", "#a8a6c9", "#6c6aa3", "#3d3b73", "#1b1a3d")
CELL, LETTER = 0.155, 7.0  # inches of a token, points of its letters
INCH = 0.06  # thickness of a stripe
LABEL = 18  # characters of a token that are shown
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans")  # the later ones where a glyph is missing


def needs_matplotlib() -> None:
    """Raises MemreasonError where it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MemreasonError("pictures need matplotlib: pip install 'memreason[inside]'") from error


def visible(token: str) -> str:
    """A token as a label: white space alone, and line breaks anywhere, as signs that can be seen; not too long."""
    text = token.replace(" ", "␣") if token.isspace() else token.strip(" ")
    shown = drawable(text.replace("\n", "⏎").replace("\t", "⇥"))
    return shown if len(shown) <= LABEL else shown[: LABEL - 1] + "…"


def drawable(text: str) -> str:
    """A text without what XML forbids or no font has: control characters, halves of characters."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs", "Cn", "Zl", "Zp") else c for c in text)


def tone(part: Part) -> str:
    """The colour of a kind; others than the usual ones take theirs by their name, always the same."""
    return TONES.get(part.kind) or OTHERS[sum(part.kind.encode()) % len(OTHERS)]


def ink(part: Part) -> str:
    return INKS.get(part.kind, SOFT)


@contextmanager
def pictures() -> Iterator[None]:
    """Matplotlib's settings meanwhile."""
    from matplotlib import font_manager, rc_context

    there = set(font_manager.get_font_names())
    settings: Any = {
        "text.parse_math": False,  # "$" in a token is a dollar sign
        "svg.fonttype": "none",  # letters stay letters: they can be searched for
        "svg.hashsalt": "memreason",  # the same picture is the same file
        "pdf.fonttype": 42,
        "font.family": [name for name in FONTS if name in there] or ["sans-serif"],
        "font.size": LETTER,
    }
    with rc_context(settings):
        yield


def canvas(size: tuple[float, float], *boxes: tuple[float, float, float, float]) -> tuple[Any, list[Any]]:
    """A figure and its axes, each given as left, bottom, width, height; all in inches."""
    from matplotlib.figure import Figure

    width, height = size
    figure = Figure(figsize=size, facecolor="white")
    return figure, [figure.add_axes((x / width, y / height, w / width, h / height)) for x, y, w, h in boxes]


def shade(axes: Any, values: Any, top: float, power: float = 1.0) -> Any:
    """A map from 0 to `top`; masked cells stay white."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    shades = LinearSegmentedColormap.from_list("ink", SHADES, bad="white")
    image = axes.imshow(values, shades, PowerNorm(power, 0.0, top, clip=True), aspect="auto", interpolation="nearest")
    _plain(axes)
    return image


def numbers(axes: Any, values: Array, shades: Sequence[str], most: float, *, signed: bool = False) -> None:
    """A coarse map with its numbers in the cells. What nothing is known of is grey, what is nothing is empty."""
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    colours = LinearSegmentedColormap.from_list("cells", list(shades), bad="#efeee9")
    norm = Normalize(-most if signed else 0.0, most, clip=True)
    axes.imshow(values, colours, norm, aspect="auto", interpolation="nearest")
    _plain(axes)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value) and abs(value) >= 0.0005:
            told = f"{value:+.3f}".replace("-", "−") if signed else f"{value:.2f}"
            light = sum(colours(norm(value))[:3]) < 1.75
            axes.text(column, row, told, ha="center", va="center", fontsize=6.5, color="white" if light else INK)


def _plain(axes: Any) -> None:
    for spine in axes.spines.values():
        spine.set_color(RULE)


def marks_beside(axes: Any, rows: Sequence[Mark], columns: Sequence[Mark], cell: tuple[float, float]) -> None:
    """Labels with a stripe in their kind's colour; those of block tokens stand on that colour.

    `cell` is width and height in inches. Plain texts: an axis with so many ticks takes thrice as long to draw.
    """
    axes.set(xticks=[], yticks=[])
    wide, high = (INCH / side for side in cell)
    left, below = -0.5 - 2.6 * wide, len(rows) - 0.5 + 2.2 * high
    for n, mark in enumerate(rows):
        axes.text(left, n, mark.text, ha="right", va="center", **_ink(mark.part))
    for n, mark in enumerate(columns):
        axes.text(n, below, mark.text, ha="center", va="top", rotation=90, **_ink(mark.part))
    for first, size, part in _runs(rows):
        _stripe(axes, (-0.5 - 1.4 * wide, first - 0.5), wide, size, part)
    for first, size, part in _runs(columns):
        _stripe(axes, (first - 0.5, len(rows) - 0.5 + 0.4 * high), size, high, part)


def _ink(part: Part) -> dict[str, Any]:
    box = {"facecolor": tone(part), "edgecolor": "none", "pad": 0.8}
    return {"color": INK, "bbox": box} if part.block else {"color": ink(part)}


def _runs(marks: Sequence[Mark]) -> Iterator[tuple[int, int, Part]]:
    """First, size and segment of marks that belong together, a line's block and its text."""
    first = 0
    for (kind, line), group in groupby(marks, key=lambda mark: (mark.part.kind, mark.part.line)):
        size = len(list(group))
        yield first, size, Part(kind, line)
        first += size


def _stripe(axes: Any, corner: tuple[float, float], width: float, height: float, part: Part) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle(corner, width, height, facecolor=tone(part), edgecolor="none", clip_on=False))


def headings(axes: Any, rows: Sequence[Mark], columns: Sequence[Mark]) -> None:
    """The name of each segment over its columns, and thin rules between them."""
    for first, size, part in _runs(columns):
        if size >= 2:
            narrow = size * CELL * 72 < 0.6 * LETTER * len(part.name)
            axes.text(
                first + size / 2 - 0.5, -0.9, part.name, ha="left" if narrow else "center", va="bottom",
                rotation=50 if narrow else 0, color=ink(part), fontweight="bold", fontsize=LETTER + 1,
            )  # fmt: skip
        if first:
            axes.axvline(first - 0.5, color=RULE, linewidth=0.6)
    for first, _, _ in _runs(rows):
        if first:
            axes.axhline(first - 0.5, color=RULE, linewidth=0.6)


def title_over(figure: Any, title: str, about: str) -> None:
    """What is shown, in bold, and how to read it below; both broken into lines that fit."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(drawable(" ".join(title.split())), max(20, int(width * 72 / 6.6)))[:2]
    figure.text(0.12 / width, 1 - 0.12 / height, "\n".join(lines), va="top", fontsize=11, fontweight="bold", color=INK)
    below = textwrap.fill(about, max(30, int(width * 72 / 4.4)))
    figure.text(0.12 / width, 1 - (0.2 + 0.19 * len(lines)) / height, below, va="top", fontsize=7.5, color=SOFT)


def scale(figure: Any, axes: Any, image: Any, name: str) -> None:
    """A short colour bar at the right of the axes."""
    from matplotlib.ticker import MaxNLocator

    width, height = figure.get_size_inches()
    box = axes.get_position()
    tall = min(box.height * height, 1.6)
    bar = figure.add_axes((box.x1 + 0.18 / width, box.y1 - tall / height, 0.1 / width, tall / height))
    figure.colorbar(image, cax=bar, ticks=MaxNLocator(4))
    bar.tick_params(length=2, color=RULE, labelcolor=SOFT)
    bar.set_ylabel(name, color=SOFT)
    bar.spines[:].set_color(RULE)


def save(figure: Any, path: Path) -> list[Path]:
    """Write NAME.svg and NAME.pdf; return both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dates: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    written = []
    for suffix, metadata in dates.items():
        target = path.with_name(path.name + suffix)
        with writing(target):
            figure.savefig(target, metadata=metadata, dpi=200)
        written.append(target)
    return written
