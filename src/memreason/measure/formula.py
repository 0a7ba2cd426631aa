r"""Whether two formulas are the same value, as \frac{1}{2}, 1/2 and 0.5 are. LaTeX is read by math-verify."""

from __future__ import annotations

import re
import threading
from functools import cache
from typing import Any

__all__ = ["same_value"]

SECONDS = 3  # for one comparison: 2^{10^{10}} would take for ever
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{(.*)\}\s*$")
AROUND = re.compile(r"^(?:\s|\$|\\\(|\\\[)+|(?:\s|\.(?!\d)|\$|\\\)|\\\])+$")  # dollars, brackets of LaTeX, a full stop


def same_value(found: str, gold: str) -> bool:
    """Compare as texts, then as what math-verify reads in them.

    Its clock is a signal, which only a main thread may set: elsewhere texts alone are compared.
    """
    found, gold = _bare(found), _bare(gold)
    if found.replace(" ", "") == gold.replace(" ", ""):
        return True
    if not (found and gold) or threading.current_thread() is not threading.main_thread():
        return False
    from math_verify import verify

    return bool(verify(_read(gold), _read(found), timeout_seconds=SECONDS))


def _bare(text: str) -> str:
    boxed = BOX.search(AROUND.sub("", text))
    return AROUND.sub("", boxed[1] if boxed else text)


@cache
def _read(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    # As LaTeX alone: for plain expressions it would use SymPy's parse_expr, which is eval.
    return list(parse(f"${text}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=SECONDS))
