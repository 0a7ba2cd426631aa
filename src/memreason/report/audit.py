"""The findings of an audit, for people: one self-contained HTML page, and figures in the terminal. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from memreason.report.console import COLOURS, console, figures
from memreason.report.templates import number, render, tone

__all__ = ["page", "print_audit"]

MEANINGS = {
    "leak": "the question also stands in a set that is held out",
    "near leak": "nearly the same question stands in a set that is held out",
    "same question": "the question stands several times",
    "same steps": "all lines are those of another trace",
    "no steps": "a training question without lines",
    "kinds": "lacks a memory or a reason line",
    "empty": "a line without words",
    "duplicate": "two lines say the same",
    "one_line": "a line with a line break",
    "gives_away": "a memory line gives the answer away",
    "uses_above": "a reason line uses nothing that stands above it",
    "length": "too few or too many lines, or too long a line",
    "language": "lines in another language than the question",
}
SEQUENCES = {"number of lines": "count", "kinds": "kinds", "kinds in order": "order"}
OPTIONAL = {"file": "traces", "held_out": None, "imported": None, "agreement": None}
HEIGHT = 120  # pixels of the tallest column


def page(findings: Mapping[str, Any]) -> str:
    """One HTML page without scripts and without anything to fetch. All texts of the file are escaped.

    `findings` are those of `measure.audit.audit`; beside them may stand `file` and `held_out` (names), `imported`
    (what reading the file left out) and `agreement` (of `measure.agreement.agreement`, with the other `file`).
    """
    lengths = findings["lengths"]
    drawn = {
        "step_columns": columns({"line": findings["steps"]["histogram"]}),
        "line_columns": columns({kind: found["histogram"] for kind, found in lengths["kinds"].items()}),
        "trace_columns": columns({"line": lengths["trace"]["histogram"]}),
        "place_columns": _place_columns(findings),
    }
    return render("audit.html.j2", {**OPTIONAL, **findings, **drawn, "meanings": MEANINGS, "height": HEIGHT})


def columns(histograms: Mapping[str, Sequence[Mapping[str, int]]]) -> list[dict[str, Any]]:
    """Columns of a picture, the histograms of several kinds on one scale stacked: x and width in %, y in pixels."""
    shown = {kind: bars for kind, bars in histograms.items() if bars}
    frames = next(iter(shown.values()), ())
    counts = [{kind: bars[place]["count"] for kind, bars in shown.items()} for place in range(len(frames))]
    titles = [f"{bar['low']}" if bar["low"] == bar["high"] else f"{bar['low']} to {bar['high']}" for bar in frames]
    drawn = _stacked(titles, counts)
    for column, bar in zip(drawn, frames, strict=True):  # whole ranges do not fit under narrow columns
        column["name"] = f"{bar['low']}" + "+" * (bar is frames[-1] and bar["high"] > bar["low"])
    return drawn


def _place_columns(findings: Mapping[str, Any]) -> list[dict[str, Any]]:
    kinds = list(findings["kinds"])
    counts = [{kind: place.get(kind, 0) for kind in kinds} for place in findings["places"]]
    return _stacked([str(place) for place, _ in enumerate(counts, 1)], counts)


def _stacked(titles: Sequence[str], counts: Sequence[Mapping[str, int]]) -> list[dict[str, Any]]:
    peak = max((sum(column.values()) for column in counts), default=0) or 1
    width = 100 / max(1, len(titles))
    drawn = []
    for place, (title, column) in enumerate(zip(titles, counts, strict=True)):
        parts, top = [], float(HEIGHT)
        for kind, count in column.items():
            size = HEIGHT * count / peak
            top -= size
            parts.append({"kind": kind, "count": count, "y": round(top, 1), "height": round(size, 1)})
        total = sum(column.values())
        drawn.append(
            {
                "name": title,
                "title": title,
                "x": place * width,
                "width": width,
                "parts": parts,
                "total": total,
                "top": round(top, 1),
            }
        )
    return drawn


def print_audit(findings: Mapping[str, Any]) -> None:
    """The figures of an audit in 80 columns; all of them, and the traces, are on the page."""
    found = OPTIONAL | dict(findings)
    steps, words = found["steps"], found["lengths"]["line"]
    kinds = found["kinds"].items()
    figures(
        found["file"],
        [
            ("traces", f"{found['traces']:,}, {found['questions']:,} different questions"),
            *([("without steps", f"{found['without_steps']:,}")] if found["without_steps"] else []),
            ("lines", f"{found['lines']:,}, {steps['mean']:.2f} per trace, {words['mean']:.1f} words each"),
            ("kinds", ", ".join(f"{kind} {of['share']:.1%}" for kind, of in kinds) or "none"),
            ("traces lacking", ", ".join(f"{kind} {of['lacking']:,}" for kind, of in kinds) or "–"),
            ("gold answers", _answers(found["answers"])),
            ("commonest answer", f"{found['answers']['majority']:.3f} of all; chance {found['answers']['chance']:.3f}"),
        ],
    )
    _print_imported(found["imported"])
    _print_patterns(found["patterns"])
    shared, total = found["duplicates"], found["traces"]
    rows = [(name, f"{of['traces']:,} ({of['traces'] / total:.1%})") for name, of in found["problems"].items()]
    figures("problems, in how many traces", [*rows, ("any of these", f"{found['problem_traces']:,}")])
    figures("duplicates", [("lines that several traces share", f"{shared['lines']['distinct']:,}")])
    for leak in found["leakage"]:
        between = f"questions of {leak['between'][0]} in {leak['between'][1]}"
        figures(between, [("same", f"{len(leak['same']):,}"), ("nearly the same", f"{len(leak['near']):,}")])
    _print_agreement(found["agreement"])
    _print_worst(found["worst"])


def _answers(answers: Mapping[str, Any], shown: int = 5) -> str:
    rows = [f"{_cut(row['answer'], 16)} {row['share']:.1%}" for row in answers["top"][:shown]]
    return ", ".join([*rows, "…"] if answers["distinct"] > shown else rows)


def _print_imported(imported: Mapping[str, Any] | None) -> None:
    if imported:
        left = f"{imported['unknown']:,} with an unknown label, {imported['empty']:,} without text"
        rows = [("rows read, kept", f"{imported['read']:,}, {imported['kept']:,}"), ("lines left out", left)]
        figures("reading the file", rows)


def _print_patterns(patterns: Mapping[str, Any], shown: int = 5) -> None:
    console.print(Text(f"orders of kinds: {patterns['distinct']:,}, the commonest", style="bold"))
    for row in patterns["top"][:shown]:
        text = Text(f"  {row['share']:>6.1%}  ", style="dim")
        for kind in row["kinds"]:
            colour = COLOURS.get(tone(kind))
            text.append(kind[:1].upper() if colour else f"{kind} ", style=f"not dim {colour or 'white'}")
        console.print(text)


def _print_agreement(found: Mapping[str, Any] | None) -> None:
    if not found:
        return
    same, other = found["same_lines"], found["other_texts"]
    low, high = same["interval"]
    kappa = " to ".join(number(end, 3) for end in same["kappa_interval"])
    memory = other["memory_share"]
    rows = [
        ("questions in both", f"{found['questions']:,}; same lines in {found['same_texts']:,}"),
        ("other gold answers", f"{found['answers']['differ']:,}"),
        ("lines in both", f"{same['lines']:,}"),
        ("of them, other kind", f"{same['flips']:,}: {same['rate']:.1%}  (95 % Wilson {low:.1%} to {high:.1%})"),
        ("Cohen's kappa", f"{number(same['kappa'], 3)}  (95 %, by question: {kappa})"),
    ]
    if other["questions"]:
        named = [(f"same {name}", other[f"same_{key}"]) for name, key in SEQUENCES.items()]
        rows += [
            ("questions, other lines", f"{other['questions']:,}"),
            *((name, f"{n:,}: {share:.1%}  (by chance {chance:.1%})") for name, (n, share, chance) in named),
            ("memory share, difference", f"{number(memory['mean_difference'])} on average"),
            ("memory share, correlation", number(memory["correlation"])),
        ]
    figures(f"agreement with {found['file']}", rows)


def _print_worst(worst: Sequence[Mapping[str, Any]]) -> None:
    if not worst:
        return
    console.print(Text("traces with the heaviest problems", style="bold"))
    for row in worst:
        names = ", ".join(dict.fromkeys(problem["name"] for problem in row["problems"]))
        text = Text(f"  {row['trace']:>6}  ", style="dim").append(names, style="not dim red")
        console.print(text.append(f"  {_cut(row['question'], max(16, 66 - len(names)))}", style="not dim default"))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
