"""A picture of the clusters of steps, with examples of each; and the same in the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memreason.core.trace import Trace
from memreason.encode.step_types.typer import Features
from memreason.report.console import console, figures
from memreason.report.drawing import INK, RULE, SOFT, canvas, drawable, pictures, save, title_over

__all__ = ["draw_clusters", "print_clusters"]

MOST = 1500  # points that are drawn
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6d31", "#7f7f7f")
MARKERS = "osD^vPX*"  # with the colours 64 pairs that differ
MAP, SIDE, LINE = 5.2, 5.6, 0.155  # inches: the map's sides, the examples' width, a line of them
HEAD = 0.75


def flat(vectors: Any, seed: int) -> NDArray[np.float32]:
    """(n, features) -> (n, 2): t-SNE of the 50 strongest directions."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.manifold import TSNE

    count, width = vectors.shape
    if width > 50:
        vectors = TruncatedSVD(50, random_state=seed).fit_transform(vectors)
    elif hasattr(vectors, "toarray"):
        vectors = vectors.toarray()
    perplexity = min(30.0, max(1.0, (count - 1) / 3))
    places: NDArray[np.float32] = TSNE(perplexity=perplexity, random_state=seed, init="random").fit_transform(vectors)
    return places


def draw_clusters(traces: Sequence[Trace], found: Features, about: dict[str, Any], path: Path) -> list[Path]:
    """Every step a point, its type a colour and a sign; beside them typical steps of each. Writes .svg and .pdf."""
    kinds = np.array(["+".join(step.kinds) for trace in traces for step in trace.steps])[found.known]
    chosen = np.sort(np.random.default_rng(about["seed"]).permutation(len(kinds))[:MOST])
    places, kinds = flat(found.vectors[chosen], about["seed"]), kinds[chosen]
    types = {name: row for name, row in about["types"].items() if name != "none"}
    lines = [_lines(name, row, about["steps"]) for name, row in types.items()]
    tall = max(MAP, LINE * sum(len(one) + 1 for one in lines))
    with pictures():
        figure, (axes, side) = canvas((MAP + SIDE + 0.5, tall + HEAD + 0.2), (0.15, tall - MAP + 0.1, MAP, MAP),
                                      (MAP + 0.4, 0.1, SIDE, tall))  # fmt: skip
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(RULE)
        side.set(xlim=(0, SIDE), ylim=(tall, 0))
        side.axis("off")
        below = LINE
        for number, (name, texts) in enumerate(zip(types, lines, strict=True)):
            style = {"color": COLOURS[number % 8], "marker": MARKERS[(number + number // 8) % 8]}
            axes.scatter(*places[kinds == name].T, s=9, linewidths=0, alpha=0.75, **style)
            side.scatter([0.08], [below - 0.045], s=26, linewidths=0, **style)
            for place, text in enumerate(texts):
                bold = {"fontweight": "bold", "color": INK} if place == 0 else {"color": SOFT}
                side.text(0.22, below, drawable(text), fontsize=7.5, va="baseline", **bold)
                below += LINE
            below += LINE
        title_over(figure, f"{len(types)} types of steps: {about['method']}", _caption(about, len(chosen)))
        return save(figure, path)


def _lines(name: str, row: dict[str, Any], steps: int) -> list[str]:
    known = [f"{kind} {n}" for kind, n in row["labelled"].items() if kind != "none"][:4]
    labelled = f" · labelled {', '.join(known)}" if known else ""
    head = f"{name} · {row['steps']} steps, {row['steps'] / steps:.0%}{labelled}"
    return [head, *(textwrap.shorten(text, 88, placeholder=" …") for text in row["examples"])]


def _caption(about: dict[str, Any], shown: int) -> str:
    pure = "" if about["purity"] is None else f" Purity against the labelled kinds: {about['purity']:.3f}."
    return f"t-SNE of {shown} of {about['steps']} steps of {about['traces']} traces ({about['of']}).{pure}"


def print_clusters(about: dict[str, Any]) -> None:
    """Types, sizes, labelled kinds and typical steps; the purity last."""
    for name, row in about["types"].items():
        head, *texts = _lines(name, row, about["steps"])
        console.print(head, style="bold", markup=False)
        for text in texts[:3]:
            console.print(f"  {textwrap.shorten(text, 76, placeholder=' …')}", markup=False, style="dim")
    if about["purity"] is not None:
        figures("", [("purity against the labelled kinds", f"{about['purity']:.3f}")])
