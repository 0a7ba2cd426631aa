"""What a teacher costs: a table that the user can edit, and the estimate of a whole run from a sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from memreason.core.errors import RecipeError
from memreason.core.labelling import TeacherRecipe

__all__ = ["BATCH_SHARE", "Price", "estimate", "money", "price_of", "spent"]

SHIPPED = Path(__file__).with_name("prices.yaml")
BATCH_SHARE = 0.5  # of the price, for requests of a batch file


class Price(NamedTuple):
    """US dollars for a million tokens."""

    prompt: float
    reply: float

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (self.prompt * prompt_tokens + self.reply * completion_tokens) / 1e6


def price_of(model: str, table: Path | str | None = None) -> Price | None:
    """The price of a model, the user's table first; None if neither knows it."""
    for path in [*([Path(table)] if table else []), SHIPPED]:
        prices = _read(path)
        names = [name for name in prices if model.startswith(name)]
        if names:
            return prices[max(names, key=len)]
    return None


def _read(path: Path) -> dict[str, Price]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return {str(name): Price(*map(float, pair)) for name, pair in values.items()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise RecipeError(
            f"prices: {path} must map model names to [prompt, reply] dollars ({error})", "label"
        ) from error


def money(price: Price | None, prompt_tokens: float, completion_tokens: float) -> str:
    return f"${price.of(prompt_tokens, completion_tokens):,.2f}" if price else "price unknown"


def spent(price: Price, usage: dict[str, Any]) -> float:
    """Dollars for what a journal holds."""
    batch = price.of(usage["batch_prompt_tokens"], usage["batch_completion_tokens"])
    return price.of(usage["prompt_tokens"], usage["completion_tokens"]) - (1 - BATCH_SHARE) * batch


def estimate(
    asked: int, wanted: int, usage: dict[str, Any], teacher: TeacherRecipe, price: Price | None
) -> dict[str, Any]:
    """What `wanted` questions would take, from the usage of `asked` of them: tokens, dollars, seconds.

    Time is what the requests in flight allow, or the limits of the endpoints, whichever is slower.
    """
    share = wanted / max(1, asked)
    prompt, reply, replies = (share * usage[name] for name in ("prompt_tokens", "completion_tokens", "replies"))
    seconds = share * usage["seconds"] / sum(endpoint.in_flight for endpoint in teacher.endpoints)
    for total, limits in (
        (replies, [endpoint.requests_per_minute for endpoint in teacher.endpoints]),
        (prompt + reply, [endpoint.tokens_per_minute for endpoint in teacher.endpoints]),
    ):
        known = [limit for limit in limits if limit is not None]
        if len(known) == len(limits):  # an endpoint without a limit takes the rest
            seconds = max(seconds, 60 * total / sum(known))
    dollars = price and price.of(prompt, reply)
    return {
        "questions": wanted,
        "replies": round(replies),
        "prompt_tokens": round(prompt),
        "completion_tokens": round(reply),
        "seconds": seconds,
        "dollars": dollars,
        "batch_dollars": dollars and dollars * BATCH_SHARE,
    }
