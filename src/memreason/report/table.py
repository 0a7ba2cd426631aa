"""The traces of a report as a table: one row for each trace of each run."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

__all__ = ["csv_text"]

ASKED = ("id", "task", "split", "form", "group", "question", "choices", "gold")
MADE = ("prediction", "extracted", "verdict", "rule", "fault", "p", "lines", "memory_false", "memory_unknown", "why")


def csv_text(data: Mapping[str, Any]) -> str:
    """Of what `gather` returns: run, question, answer, verdict, fault, the least sure line's probability, the lines
    ("kind: text", one below another), how many memory lines are false and how many cannot be checked, and why."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ("run", *ASKED, *MADE))
    writer.writeheader()
    for row in data["traces"]:
        for run, made in zip(data["runs"], row["of"], strict=True):
            if made:
                asked = {name: row[name] for name in ASKED} | {"choices": "\n".join(row["choices"])}
                writer.writerow({"run": run["name"], **asked, **_made(made)})
    return out.getvalue()


def _made(made: Mapping[str, Any]) -> dict[str, Any]:
    facts = [line["fact"] for line in made["lines"] if "fact" in line]
    return {
        **{name: made[name] for name in MADE if name in made},
        "lines": "\n".join(f"{line['kind'] or 'line'}: {line['text']}" for line in made["lines"]),
        "memory_false": facts.count(False),
        "memory_unknown": facts.count(None),
        "why": "\n".join([*made["memory"], *made["reason"], *made["defects"]]),
    }
