"""Which kinds of lines each way of telling step types gives: `data.step_types` -> `tokens.kinds`."""

from __future__ import annotations

__all__ = ["CLUSTERED", "OPERATIONS", "OPERATORS", "PAUSE", "VAES", "kinds_of"]

PAUSE = "pause"
OPERATORS = ("+", "-", "*", "/")
# Of MATH and AQuA: the four, and what else their solutions compute.
OPERATIONS = (
    *OPERATORS, "power", "root", "fraction", "percent", "ratio", "log", "trig", "factorial", "modulo", "compare",
)  # fmt: skip
VAES = ("vae", "vae-next-step", "vae-contrastive")
CLUSTERED = ("tf-idf", "k-means", "balanced-k-means", *VAES)


def kinds_of(step_types: str, n_types: int) -> tuple[str, ...] | None:
    """The kinds that a way of telling step types gives; None where the traces themselves have them."""
    if step_types in CLUSTERED:
        return tuple(f"type_{number}" for number in range(n_types))
    return {"arithmetic": OPERATORS, "arithmetic-14": OPERATIONS, "pause": (PAUSE,)}.get(step_types)
