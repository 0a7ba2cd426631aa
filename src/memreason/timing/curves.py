"""Two curves of a bench, as SVG: the time of a token against traces trained on, and answers against those in flight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["curves"]

Figures = dict[str, Any]
STEPS = 101  # of 16 examples: the first warms up, the others are 1,600 traces
IN_FLIGHT = (1, 4, 16, 64, 192)


def curves(run_job: Callable[[str, Figures], Figures], training: Figures, evaluation: Figures, out: Path) -> Figures:
    """Measure both and write traces.svg and in-flight.svg to `out`. Returns what they show."""
    long = run_job("train_memreason", {**training, "steps": STEPS})
    traces, cost = _cost(long, training["batch"])
    answers = []
    for count in IN_FLIGHT:
        asked = min(evaluation["questions"], 4 * count)
        answers.append(run_job("eval_memreason", {**evaluation, "batch_size": count, "questions": asked}))
    rates = [one["tokens_per_second"] for one in answers]
    _plot(traces, cost, "traces trained on", "ms a token, mean so far", out / "traces.svg")
    _plot(IN_FLIGHT, rates, "questions in flight", "tokens a second", out / "in-flight.svg", log=True)
    return {"traces": traces, "ms_per_token": cost, "in_flight": list(IN_FLIGHT), "tokens_per_second": rates}


def _cost(figures: Figures, batch: int) -> tuple[list[int], list[float]]:
    """Milliseconds a token over the first 100, 200, 400, 800 and 1,600 traces."""
    counts, found = [100, 200, 400, 800, 1600], []
    for count in counts:
        steps = -(-count // batch)
        found.append(1e3 * sum(figures["step_seconds"][:steps]) / sum(figures["step_tokens"][:steps]))
    return counts, found


def _plot(x: Sequence[float], y: Sequence[float], across: str, up: str, path: Path, *, log: bool = False) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    axes.plot(x, y, marker="o", color="#0072b2", clip_on=False)
    axes.set(xlabel=across, ylabel=up, xscale="log", yscale="log" if log else "linear")
    axes.set_xticks(list(x), [f"{value:,}" for value in x])
    if log:
        ticks = [n * 10**power for power in range(6) for n in (1, 2, 5) if min(y) / 2 <= n * 10**power <= max(y)]
        axes.set_yticks(ticks, [f"{value:,}" for value in ticks])
    else:
        axes.set_ylim(bottom=0)
    axes.minorticks_off()
    for at, value in zip(x, y, strict=True):
        axes.annotate(
            f"{value:,.2f}" if value < 10 else f"{value:,.0f}", (at, value), (0, 7), textcoords="offset points"
        )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    pyplot.close(figure)
