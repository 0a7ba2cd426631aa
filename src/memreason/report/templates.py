"""The templates of this folder: how they are filled, and what they share. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from memreason.report.console import COLOURS

__all__ = ["number", "percent", "render", "tone"]

FOLDER = Path(__file__).parent


def render(name: str, values: Mapping[str, Any]) -> str:
    """One page. All that is put in is escaped; `tojson` gives JSON that is safe inside a script element."""
    return _environment().get_template(name).render(values)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "probability": math.exp, "tone": tone}
    environment.globals["inline"] = _inline
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    return environment


def _inline(name: str) -> Markup:
    """A script or style sheet of ours as it stands: it is no template, and nothing of a user is in it."""
    return Markup((FOLDER / name).read_text(encoding="utf-8"))


def number(value: float | None, digits: int = 2) -> str:
    """Whole numbers with commas, others with so many digits, a dash for what does not exist."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def percent(share: float) -> str:
    return f"{share:.1%}"


def tone(kind: str) -> str:
    """The class that colours a kind; of a line of several kinds the first counts."""
    first = kind.split("+")[0]
    return first if first in COLOURS else "line"
