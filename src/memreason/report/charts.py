"""Pictures of a report as inline SVG. Places are in % of the width and in pixels of the height, so that letters keep
their size on a phone; colours come from classes, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from memreason.measure.stats import wilson

__all__ = ["curve", "difference", "heat", "interval", "reliability", "retrieval", "scatter", "stack"]

Point = tuple[float, float]
HEIGHT = 170  # pixels of a plot
CELL = 34
HEAD = 70  # pixels above a table, for names that stand aslant
SEEN = 0.005  # less is not written into its cell


def _tag(tag: str, /, *parts: Markup | str, **attributes: object) -> Markup:
    """An element; texts in it are escaped. class_ stands for class, text_anchor for text-anchor."""
    said = [Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items()]
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), Markup("").join(said), Markup("").join(map(escape, parts)))


def _picture(name: str, height: float, *parts: Markup, style: str = "") -> Markup:
    shape = {"class_": f"chart {style}".strip(), "width": "100%", "height": height, "role": "img", "aria_label": name}
    return _tag("svg", *parts, **shape)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def interval(share: float, low: float, high: float, marks: Mapping[str, float]) -> Markup:
    """A share between 0 and 1, its interval as a whisker, and other shares to see it beside."""
    told = {name: f"{name} {value:.3f}" for name, value in marks.items()}
    parts = [_tag("rect", class_="track", y=10, width="100%", height=8, rx=4)]
    for name, value in marks.items():
        place = {"x1": _percent(value), "x2": _percent(value), "y1": 3, "y2": 25}
        parts.append(_tag("line", _tag("title", told[name]), class_=f"mark {name}", **place))
    parts.append(_tag("line", class_="whisker", x1=_percent(low), x2=_percent(high), y1=14, y2=14))
    parts.append(_tag("circle", class_="dot", cx=_percent(share), cy=14, r=5))
    return _picture("; ".join([f"{share:.3f}, interval {low:.3f} to {high:.3f}", *told.values()]), 28, *parts)


def difference(value: float, low: float, high: float, span: float) -> Markup:
    """A difference with its interval around zero, on a scale from -span to span."""
    at = [_percent(0.5 + 0.5 * one / span) for one in (low, value, high)]
    parts = [
        _tag("rect", class_="track", y=10, width="100%", height=8, rx=4),
        _tag("line", class_="zero", x1="50%", x2="50%", y1=3, y2=25),
        _tag("line", class_="whisker", x1=at[0], x2=at[2], y1=14, y2=14),
        _tag("circle", class_="dot", cx=at[1], cy=14, r=6),
    ]
    return _picture(f"{value:+.3f}, interval {low:+.3f} to {high:+.3f}", 28, *parts)


def stack(counts: Mapping[str, int]) -> Markup:
    """Counts as parts of one bar, each with the class of its name."""
    total, left, parts = sum(counts.values()) or 1, 0.0, []
    for name, count in counts.items():
        share = count / total
        title = _tag("title", f"{name}: {count:,} ({share:.1%})")
        size = {"x": _percent(left), "width": _percent(share), "height": CELL}
        parts.append(_tag("rect", title, class_=f"part {name}", **size))
        if share > 0.03:
            parts.append(_tag("text", f"{count:,}", class_="inside", x=_percent(left + share / 2), y=CELL / 2 + 4))
        left += share
    return _picture(", ".join(f"{name} {count:,}" for name, count in counts.items()), CELL, *parts)


def _axes(across: Sequence[tuple[float, str]], up: Sequence[tuple[float, str]]) -> list[Markup]:
    """Grid lines with their labels; places are shares of the width and of the height."""
    parts = []
    for share, label in up:
        y = HEIGHT * (1 - share)
        parts.append(_tag("line", class_="axis", x1=0, x2="100%", y1=y, y2=y))
        parts.append(_tag("text", label, class_="side", x=-6, y=y + 4))
    for place, (share, label) in enumerate(across):
        end = " first" if place == 0 else " last" if place == len(across) - 1 else ""
        parts.append(_tag("text", label, class_=f"under{end}", x=_percent(share), y=HEIGHT + 16))
    return parts


def _path(points: Sequence[Point], style: str) -> Markup:
    """A line through points whose places are shares; it stretches, its stroke does not."""
    drawn = " ".join(f"{100 * x:.2f},{100 * (1 - y):.2f}" for x, y in points)
    line = _tag("polyline", class_=style, points=drawn, vector_effect="non-scaling-stroke")
    frame = {"viewBox": "0 0 100 100", "preserveAspectRatio": "none", "width": "100%", "height": HEIGHT}
    return _tag("svg", line, **frame)


def _dots(points: Sequence[Point], titles: Sequence[str]) -> list[Markup]:
    return [
        _tag("circle", _tag("title", title), class_="dot", cx=_percent(x), cy=f"{HEIGHT * (1 - y):.1f}", r=5)
        for (x, y), title in zip(points, titles, strict=True)
    ]


def _whisker(x: float, ends: Sequence[float]) -> Markup:
    low, high = (f"{HEIGHT * (1 - end):.1f}" for end in ends)
    return _tag("line", class_="whisker thin", x1=_percent(x), x2=_percent(x), y1=low, y2=high)


def curve(name: str, points: Sequence[Point], *, last: float, top: float, dotted: bool = False) -> Markup:
    """Values by step, from step 0 to `last` and from 0 to `top`; with dots where the points are few."""
    shares = [(step / last, min(1.0, value / top)) for step, value in points]
    ticks = [(share, f"{top * share:.3g}") for share in (0.0, 0.5, 1.0)]
    titles = [f"step {step:,.0f}: {value:.3f}" for step, value in points]
    dots = _dots(shares, titles) if dotted else []
    across = [(0.0, "step 0"), (1.0, f"{last:,.0f}")]
    told = f"{name} from {points[0][1]:.3f} at step {points[0][0]:,.0f} to {points[-1][1]:.3f} at {points[-1][0]:,.0f}"
    return _picture(told, HEIGHT + 22, *_axes(across, ticks), _path(shares, "curve"), *dots, style="plot")


def reliability(bins: Sequence[Mapping[str, Any]]) -> Markup:
    """How true the lines of each bin are against how sure the model was of them; on the diagonal both are the same."""
    low = min(0.9, int(10 * min(one["mean_confidence"] for one in bins)) / 10)
    points = [((one["mean_confidence"] - low) / (1 - low), one["share_true"]) for one in bins]
    titles, whiskers = [], []
    for (x, _), one in zip(points, bins, strict=True):
        titles.append(f"confidence {one['mean_confidence']:.3f}: {one['share_true']:.3f} true of {one['n']:,}")
        whiskers.append(_whisker(x, wilson(round(one["share_true"] * one["n"]), one["n"])))
    across = [(share, f"{low + (1 - low) * share:.2g}") for share in (0.0, 0.5, 1.0)]
    up = [(share, f"{share:.1f}") for share in (0.0, 0.5, 1.0)]
    lines = [_path([(0, low), (1, 1)], "diagonal"), _path(points, "curve")]
    parts = [*_axes(across, up), *lines, *whiskers, *_dots(points, titles)]
    return _picture("share of true lines by confidence: " + "; ".join(titles), HEIGHT + 22, *parts, style="plot")


def retrieval(points: Sequence[Mapping[str, Any]]) -> Markup:
    """Accuracy, from a round number up to 1, against the share of memory lines retrieved; a ring around what the
    calibrated threshold gives."""
    low = min(0.9, int(10 * min(one["interval"][0] for one in points)) / 10)

    def up(accuracy: float) -> float:
        return (accuracy - low) / (1 - low)

    places = [(one["retrieved"], up(one["accuracy"])) for one in points]
    titles, parts = [], [_path(places, "curve")]
    for (x, y), one in zip(places, points, strict=True):
        told = f"{one['name']}: {one['retrieved']:.3f} of lines retrieved, accuracy {one['accuracy']:.3f}"
        titles.append(f"{told} ({one['interval'][0]:.3f} to {one['interval'][1]:.3f})")
        parts.append(_whisker(x, [up(end) for end in one["interval"]]))
        if one["name"] == "calibrated":
            parts.append(_tag("circle", class_="ring", cx=_percent(x), cy=f"{HEIGHT * (1 - y):.1f}", r=10))
    ticks = [(share, f"{low + (1 - low) * share:.2f}") for share in (0.0, 0.5, 1.0)]
    across = [(0.0, "none retrieved"), (0.5, "half"), (1.0, "all")]
    told = "accuracy by share of memory lines retrieved: " + "; ".join(titles)
    return _picture(told, HEIGHT + 22, *_axes(across, ticks), *parts, *_dots(places, titles), style="plot")


def scatter(points: Sequence[Mapping[str, Any]], marks: Mapping[str, float]) -> Markup:
    """Accuracy with its interval against tokens per answer, as far up and down as these reach; a number at each point,
    which a table explains."""
    last = max(one["tokens"] for one in points) * 1.05 or 1.0
    seen: list[float] = [*marks.values(), *(end for one in points for end in one["interval"])]
    low, high = math.floor(10 * min(seen)) / 10, max(math.ceil(10 * max(seen)) / 10, 0.1)

    def up(accuracy: float) -> float:
        return (accuracy - low) / (high - low)

    parts = []
    for name, value in marks.items():
        y = HEIGHT * (1 - up(value))
        told = _tag("title", f"{name} {value:.3f}")
        parts.append(_tag("line", told, class_=f"mark {name}", x1=0, x2="100%", y1=y, y2=y))
    for place, one in enumerate(points, 1):
        x, y = one["tokens"] / last, HEIGHT * (1 - up(one["accuracy"]))
        title = f"{one['arm']}: accuracy {one['accuracy']:.3f}, {one['tokens']:.1f} tokens per answer"
        parts.append(_whisker(x, [up(end) for end in one["interval"]]))
        parts.append(_tag("circle", _tag("title", title), class_="dot", cx=_percent(x), cy=f"{y:.1f}", r=8))
        parts.append(_tag("text", str(place), class_="numbered", x=_percent(x), y=f"{y + 4:.1f}"))
    across = [(share, f"{last * share:.0f}") for share in (0.0, 0.5, 1.0)]
    ticks = [(share, f"{low + (high - low) * share:.2f}") for share in (0.0, 0.5, 1.0)]
    every = "accuracy against tokens per answer: " + "; ".join(f"{p['arm']} {p['accuracy']:.3f}" for p in points)
    return _picture(every, HEIGHT + 22, *_axes(across, ticks), *parts, style="plot")


def heat(names: Sequence[str], rows: Sequence[Sequence[float | None]]) -> Markup:
    """A table of shares, darker where more: row by row, what the row's segment looks at."""
    peak = max((value for row in rows for value in row if value), default=0) or 1
    width, parts = 1 / max(1, len(names)), []
    for place, name in enumerate(names):
        parts.append(_tag("text", name, class_="up", x=_percent((place + 0.4) * width), y=HEAD - 6))
        parts.append(_tag("text", name, class_="side", x=-6, y=HEAD + CELL * (place + 0.6)))
    for down, row in enumerate(rows):
        for across, value in enumerate(row):
            title = _tag("title", f"{names[down]} to {names[across]}: {value or 0:.4f}")
            corner = {"x": _percent(across * width), "y": HEAD + CELL * down}
            depth = f"{0.75 * (value or 0) / peak:.3f}"
            size = {"width": _percent(width), "height": CELL}
            parts.append(_tag("rect", title, class_="cell", fill_opacity=depth, **corner, **size))
            if value and value >= SEEN:
                middle = {"x": _percent((across + 0.5) * width), "y": HEAD + CELL * (down + 0.6)}
                parts.append(_tag("text", f"{value:.2f}".lstrip("0"), class_="value", **middle))
    told = "attention, from rows to columns: " + ", ".join(names)
    return _picture(told, HEAD + CELL * len(rows), *parts, style="plot named")
