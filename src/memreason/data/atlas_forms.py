"""The question forms of atlas: each turns a draw of countries into a question, memory lines and one reason line."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from memreason.core.trace import LETTERS
from memreason.data.atlas_facts import CONTINENTS, Country, borders, countries

__all__ = ["FORMS", "Draft", "Pool", "fact_lines"]


@dataclass(frozen=True)
class Draft:
    """What a form makes of its draw: the text, choices, lines, answer, countries and facts used."""

    text: str
    choices: tuple[str, ...] | None
    memory: tuple[str, ...]
    reason: str
    answer: str
    about: tuple[Country, ...]
    facts: tuple[tuple[str, str, str], ...]


def _cap(text: str) -> str:
    return text[0].upper() + text[1:]


Fact = tuple[str, tuple[str, str, str]]  # a memory line and what it states


def _capital(c: Country) -> Fact:
    return f"The capital of {c.name} is {c.capital}.", (c.name, "capital", c.capital)


def _currency(c: Country) -> Fact:
    return f"The currency of {c.name} is the {c.currency}.", (c.name, "currency", c.currency)


def _continent(c: Country) -> Fact:
    return f"{_cap(c.name)} lies in {c.continent}.", (c.name, "continent", c.continent)


def _borders(a: Country, b: Country) -> Fact:
    return f"{_cap(a.name)} borders {b.name}.", (a.name, "borders", b.name)


def fact_lines() -> Iterator[Fact]:
    """Every fact about every country, said as a memory line says it; a border from both sides."""
    for country in countries().values():
        yield from (state(country) for state in (_capital, _currency, _continent))
    for pair in borders(list(countries())):
        a, b = (countries()[name] for name in pair)
        yield from (_borders(a, b), _borders(b, a))


def _truth(text: str, stated: Sequence[Fact], compared: Sequence[str], about: Sequence[Country]) -> Draft:
    """True if all that is compared is equal. The line names it before it judges: a small model cannot look ahead."""
    lines, facts = zip(*stated, strict=True)
    same = len(set(compared)) == 1
    reason = f"{', '.join(compared[:-1])} and {compared[-1]} are {'the same' if same else 'different'}."
    return Draft(text, None, lines, reason, str(same), tuple(about), facts)


def _choice(
    text: str,
    options: Sequence[str],
    right: str,
    slot: int,
    stated: Sequence[Fact],
    about: Sequence[Country],
    says: str = "The choice",
) -> Draft:
    """Multiple choice with the right option in place `slot`; the reason line repeats it as the question prints it."""
    others = [option for option in options if option != right]
    ordered = [*others[:slot], right, *others[slot:]]
    lines, facts = zip(*stated, strict=True)
    reason = f"{says} is {_cap(right)} ({LETTERS[slot]})."
    return Draft(text, tuple(_cap(o) for o in ordered), lines, reason, LETTERS[slot], tuple(about), facts)


Draw = Callable[[random.Random, "Pool", int], "Draft | None"]


@dataclass(frozen=True)
class Pool:
    """The countries that a split (and the obscurity knob) leaves, and their bordering pairs."""

    all: list[Country]
    fixed: list[Country]
    borders: list[tuple[str, str]]


def _capital_is(r: random.Random, pool: Pool, slot: int) -> Draft:
    a, b = r.sample(pool.all, 2)
    named = b if slot % 2 else a
    return _truth(f"Is {named.capital} the capital of {a.name}?", [_capital(a)], (a.capital, named.capital), [a])


def _capital_choice(r: random.Random, pool: Pool, slot: int) -> Draft | None:
    four = r.sample(pool.all, 4)
    a = four[0]
    text = f"What is the capital of {a.name}?"
    return _choice(text, [c.capital for c in four], a.capital, slot % 4, [_capital(a)], [a])


def _continent_choice(r: random.Random, pool: Pool, slot: int) -> Draft:
    a = r.choice(pool.fixed)
    others = r.sample([name for name in CONTINENTS.values() if name != a.continent], 3)
    return _choice(f"Where does {a.name} lie?", [a.continent, *others], a.continent, slot % 4, [_continent(a)], [a])


def _neighbour_choice(r: random.Random, pool: Pool, slot: int) -> Draft | None:
    """One neighbour among countries of other continents."""
    if not pool.borders:
        return None
    pair = [countries()[name] for name in r.choice(pool.borders)]
    a, b = pair if r.random() < 0.5 else reversed(pair)
    far = [c for c in pool.fixed if c.continent not in (a.continent, b.continent) and a.fixed]
    if len(far) < 3:
        return None
    stated = [_borders(a, b)]
    options = [b.name, *(c.name for c in r.sample(far, 3))]
    return _choice(f"Which of these countries borders {a.name}?", options, b.name, slot % 4, stated, [a, b])


def _continent_is(r: random.Random, pool: Pool, slot: int) -> Draft:
    a = r.choice(pool.fixed)
    asked = _other_continent(r, a) if slot % 2 else a.continent
    return _truth(f"Does {a.name} lie in {asked}?", [_continent(a)], (a.continent, asked), [a])


def _other_continent(r: random.Random, country: Country) -> str:
    return r.choice([name for name in CONTINENTS.values() if name != country.continent])


def _some(r: random.Random, pool: Pool, n: int, alike: bool) -> list[Country] | None:
    """`n` countries that do or do not all lie on one continent, None if this draw has none such."""
    some = r.sample(pool.fixed, n)
    if n == 3 and alike:  # by chance alone one draw in twenty would do
        kin = [c for c in pool.fixed if c.continent == some[0].continent]
        some = r.sample(kin, n) if len(kin) >= n else some
    return some if (len({c.continent for c in some}) == 1) == alike else None


def _same_continent(r: random.Random, pool: Pool, slot: int) -> Draft | None:
    pair = _some(r, pool, 2, slot % 2 == 0)
    if not pair:
        return None
    a, b = pair
    text = f"Do {a.name} and {b.name} lie on the same continent?"
    return _truth(text, [_continent(a), _continent(b)], [a.continent, b.continent], pair)


def _three_on_continent(r: random.Random, pool: Pool, slot: int) -> Draft | None:
    three = _some(r, pool, 3, slot % 2 == 0)
    if not three:
        return None
    a, b, c = three
    text = f"Do {a.name}, {b.name} and {c.name} all lie on the same continent?"
    return _truth(text, [_continent(one) for one in three], [one.continent for one in three], three)


def _capitals_on_continent(r: random.Random, pool: Pool, slot: int) -> Draft | None:
    pair = _some(r, pool, 2, slot % 2 == 0)
    if not pair:
        return None
    a, b = pair
    text = f"Do the capitals of {a.name} and {b.name} lie on the same continent?"
    stated = [_capital(a), _continent(a), _capital(b), _continent(b)]
    return _truth(text, stated, [a.continent, b.continent], pair)


def _capital_on_continent(r: random.Random, pool: Pool, slot: int) -> Draft:
    a = r.choice(pool.fixed)
    asked = _other_continent(r, a) if slot % 2 else a.continent
    text = f"Does the capital of {a.name} lie in {asked}?"
    return _truth(text, [_capital(a), _continent(a)], (a.continent, asked), [a])


def _continent_of_capital(r: random.Random, pool: Pool, slot: int) -> Draft:
    a = r.choice(pool.fixed)
    others = r.sample([name for name in CONTINENTS.values() if name != a.continent], 3)
    text, stated = f"Where does the capital of {a.name} lie?", [_capital(a), _continent(a)]
    return _choice(text, [a.continent, *others], a.continent, slot % 4, stated, [a])


def _country_on_continent(r: random.Random, pool: Pool, slot: int) -> Draft | None:
    a = r.choice(pool.fixed)
    others = [c for c in pool.fixed if c.continent != a.continent]
    if len(others) < 2:
        return None
    two = r.sample(others, 2)
    ordered = [*two[: slot % 3], a, *two[slot % 3 :]]
    text = f"Which of these countries lies in {a.continent}?"
    says = f"The one in {a.continent}"
    stated = [_continent(c) for c in ordered]
    return _choice(text, [c.name for c in ordered], a.name, slot % 3, stated, ordered, says)


def _currency_choice(r: random.Random, pool: Pool, slot: int) -> Draft | None:
    a = r.choice(pool.all)
    others = sorted({c.currency for c in pool.all} - {a.currency})
    if len(others) < 3:
        return None
    options = [a.currency, *r.sample(others, 3)]
    return _choice(f"What is the currency of {a.name}?", options, a.currency, slot % 4, [_currency(a)], [a])


# name -> (draw, facts that must be combined, chance)
FORMS: dict[str, tuple[Draw, int, float]] = {
    "capital_is": (_capital_is, 1, 1 / 2),
    "continent_is": (_continent_is, 1, 1 / 2),
    "same_continent": (_same_continent, 2, 1 / 2),
    "capital_on_continent": (_capital_on_continent, 2, 1 / 2),
    "three_on_continent": (_three_on_continent, 3, 1 / 2),
    "capitals_on_continent": (_capitals_on_continent, 4, 1 / 2),
    "capital_choice": (_capital_choice, 1, 1 / 4),
    "continent_choice": (_continent_choice, 1, 1 / 4),
    "currency_choice": (_currency_choice, 1, 1 / 4),
    "neighbour_choice": (_neighbour_choice, 1, 1 / 4),
    "continent_of_capital": (_continent_of_capital, 2, 1 / 4),
    "country_on_continent": (_country_on_continent, 3, 1 / 3),
}
