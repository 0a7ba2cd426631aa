"""The embedded default task: real facts of countries, composed into questions by a rule.

Gold traces are written by the same rule: memory lines state facts, reason lines combine those above.
Train, validation and test share no country, so a test answer must be recalled from pre-training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from memreason.core.errors import TaskError
from memreason.core.trace import LETTERS, MEMORY, REASON, Question, Step, Trace
from memreason.data.atlas_facts import CONTINENTS, Country, borders, countries, memory_line_true, split_of

__all__ = ["FORMS", "atlas_table", "make_atlas", "memory_line_true"]

PATIENCE = 400  # draws without a new question before a form counts as used up


@dataclass(frozen=True)
class _Draft:
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


def _capital(c: Country) -> tuple[str, tuple[str, str, str]]:
    return f"The capital of {c.name} is {c.capital}.", (c.name, "capital", c.capital)


def _currency(c: Country) -> tuple[str, tuple[str, str, str]]:
    return f"The currency of {c.name} is the {c.currency}.", (c.name, "currency", c.currency)


def _continent(c: Country) -> tuple[str, tuple[str, str, str]]:
    return f"{_cap(c.name)} lies in {c.continent}.", (c.name, "continent", c.continent)


def _truth(text: str, stated: Sequence[Any], reason: str, truth: bool, about: Sequence[Country]) -> _Draft:
    lines, facts = zip(*stated, strict=True)
    return _Draft(text, None, lines, reason, str(truth), tuple(about), facts)


def _choice(
    text: str, options: Sequence[str], right: str, slot: int, stated: Sequence[Any], about: Sequence[Country]
) -> _Draft:
    """Multiple choice with the right option in place `slot`."""
    others = [option for option in options if option != right]
    ordered = [*others[:slot], right, *others[slot:]]
    lines, facts = zip(*stated, strict=True)
    reason = f"{_cap(right)} is choice {LETTERS[slot]}."
    return _Draft(text, tuple(_cap(o) for o in ordered), lines, reason, LETTERS[slot], tuple(about), facts)


Draw = Callable[[random.Random, "_Pool", int], "_Draft | None"]


@dataclass(frozen=True)
class _Pool:
    """The countries that a split (and the obscurity knob) leaves, and their bordering pairs."""

    all: list[Country]
    fixed: list[Country]
    borders: list[tuple[str, str]]


def _capital_is(r: random.Random, pool: _Pool, slot: int) -> _Draft:
    a, b = r.sample(pool.all, 2)
    named = b if slot % 2 else a
    so = f"{a.capital} is {named.capital}." if named is a else f"{a.capital} is not {named.capital}."
    return _truth(f"Is {named.capital} the capital of {a.name}?", [_capital(a)], "So " + so, named is a, [a])


def _capital_choice(r: random.Random, pool: _Pool, slot: int) -> _Draft | None:
    four = r.sample(pool.all, 4)
    a = four[0]
    return _choice(
        f"What is the capital of {a.name}?", [c.capital for c in four], a.capital, slot % 4, [_capital(a)], [a]
    )


def _continent_choice(r: random.Random, pool: _Pool, slot: int) -> _Draft:
    a = r.choice(pool.fixed)
    others = r.sample([name for name in CONTINENTS.values() if name != a.continent], 3)
    return _choice(f"Where does {a.name} lie?", [a.continent, *others], a.continent, slot % 4, [_continent(a)], [a])


def _same_continent(r: random.Random, pool: _Pool, slot: int) -> _Draft | None:
    a, b = r.sample(pool.fixed, 2)
    same = a.continent == b.continent
    if same == bool(slot % 2):
        return None
    so = f"{a.continent} is {'' if same else 'not '}{b.continent}."
    text = f"Do {a.name} and {b.name} lie on the same continent?"
    return _truth(text, [_continent(a), _continent(b)], "So " + so, same, [a, b])


def _same_currency(r: random.Random, pool: _Pool, slot: int) -> _Draft | None:
    a, b = r.sample(pool.all, 2)
    same = a.currency == b.currency
    if same == bool(slot % 2):
        return None
    so = f"The {a.currency} and the {b.currency} have {'the same name' if same else 'different names'}."
    text = f"Do the currencies of {a.name} and {b.name} have the same name?"
    return _truth(text, [_currency(a), _currency(b)], so, same, [a, b])


def _capital_on_continent(r: random.Random, pool: _Pool, slot: int) -> _Draft:
    a = r.choice(pool.fixed)
    wrong = r.choice([name for name in CONTINENTS.values() if name != a.continent])
    asked = wrong if slot % 2 else a.continent
    so = f"So {a.capital} lies in {a.continent}" + ("." if asked == a.continent else f", not in {asked}.")
    return _truth(f"Is {a.capital} a city in {asked}?", [_capital(a), _continent(a)], so, asked == a.continent, [a])


def _country_on_continent(r: random.Random, pool: _Pool, slot: int) -> _Draft | None:
    a = r.choice(pool.fixed)
    others = [c for c in pool.fixed if c.continent != a.continent]
    if len(others) < 3:
        return None
    three = r.sample(others, 3)
    ordered = [*three[: slot % 4], a, *three[slot % 4 :]]
    text = f"Which of these countries lies in {a.continent}?"
    names = [c.name for c in ordered]
    return _choice(text, names, a.name, slot % 4, [_continent(c) for c in ordered], ordered)


def _capital_order(r: random.Random, pool: _Pool, slot: int) -> _Draft | None:
    a, b = r.sample(pool.all, 2)
    before = a.capital.casefold() < b.capital.casefold()
    if before == bool(slot % 2) or a.capital[0] == b.capital[0]:
        return None
    text = f"Does the capital of {a.name} come before the capital of {b.name} in the alphabet?"
    so = f"{a.capital} comes {'before' if before else 'after'} {b.capital}."
    return _truth(text, [_capital(a), _capital(b)], so, before, [a, b])


def _border(r: random.Random, pool: _Pool, slot: int) -> _Draft | None:
    table = countries()
    if not pool.borders:
        return None
    near = set(pool.borders)
    a, b = (table[name] for name in r.choice(pool.borders)) if slot % 2 == 0 else r.sample(pool.all, 2)
    if slot % 2 and {(a.name, b.name), (b.name, a.name)} & near:
        return None
    if r.random() < 0.5:
        a, b = b, a
    true = slot % 2 == 0
    line = f"{_cap(a.name)} {'borders' if true else 'does not border'} {b.name}."
    stated = [(line, (a.name, "borders" if true else "not_borders", b.name))]
    so = f"So {a.name} and {b.name} {'touch' if true else 'do not touch'}."
    return _truth(f"Can one walk from {a.name} straight into {b.name}?", stated, so, true, [a, b])


def _currency_of_capital(r: random.Random, pool: _Pool, slot: int) -> _Draft | None:
    a = r.choice(pool.all)
    others = sorted({c.currency for c in pool.all} - {a.currency})
    if len(others) < 3:
        return None
    options = [a.currency, *r.sample(others, 3)]
    text = f"What is paid with in {a.capital}?"
    return _choice(text, options, a.currency, slot % 4, [_capital(a), _currency(a)], [a])


# name -> (draw, facts that must be combined, chance)
FORMS: dict[str, tuple[Draw, int, float]] = {
    "capital_is": (_capital_is, 1, 0.5),
    "capital_choice": (_capital_choice, 1, 0.25),
    "continent_choice": (_continent_choice, 1, 0.25),
    "border": (_border, 1, 0.5),
    "same_continent": (_same_continent, 2, 0.5),
    "same_currency": (_same_currency, 2, 0.5),
    "capital_on_continent": (_capital_on_continent, 2, 0.5),
    "capital_order": (_capital_order, 2, 0.5),
    "currency_of_capital": (_currency_of_capital, 2, 0.25),
    "country_on_continent": (_country_on_continent, 4, 0.25),
}


def _pool(split: str, obscurity: tuple[float, float] | None) -> _Pool:
    low, high = obscurity or (0.0, 1.0)
    kept = [c for name, c in countries().items() if split_of()[name] == split and low <= c.rank <= high]
    return _Pool(kept, [c for c in kept if c.fixed], borders([c.name for c in kept]))


def _trace(draft: _Draft, form: str, split: str) -> Trace:
    about = sorted(c.name for c in draft.about)
    question = Question(
        text=draft.text,
        answer=draft.answer,
        task="atlas",
        split=split,
        choices=draft.choices,
        facts=tuple({"subject": s, "relation": relation, "object": o} for s, relation, o in draft.facts),
        meta={
            "form": form,
            "hops": FORMS[form][1],
            "group": draft.about[0].name,
            "countries": about,
            "obscurity": round(sum(c.rank for c in draft.about) / len(draft.about), 3),
        },
    )
    steps = (*(Step((MEMORY,), line) for line in draft.memory), Step((REASON,), draft.reason))
    return Trace(question, steps)


def make_atlas(
    split: str,
    n: int,
    *,
    seed: int = 0,
    hops: Sequence[int] | None = None,
    obscurity: tuple[float, float] | None = None,
    forms: Sequence[str] | None = None,
) -> list[Trace]:
    """`n` labelled traces of a split, balanced over forms and, within each, over its answers.

    `hops` keeps forms by how many facts they combine, `obscurity` countries by population rank (0 to 1).
    Raises TaskError for an unknown split or form and for more questions than there are.
    """
    unknown = [form for form in forms or () if form not in FORMS]
    if split not in ("train", "validation", "test") or unknown:
        raise TaskError(
            f"atlas has no {f'form {unknown[0]!r}' if unknown else f'split {split!r}'}. Forms: {', '.join(FORMS)}."
        )
    pool = _pool(split, obscurity)
    wanted = [form for form in forms or FORMS if not hops or FORMS[form][1] in hops]
    if len(pool.fixed) < 4 or not wanted:
        raise TaskError(
            f"atlas/{split}: hops {hops} and obscurity {obscurity} leave {len(pool.all)} countries, {len(wanted)} forms"
        )
    draws = random.Random(f"{split}-{seed}")
    traces: dict[str, Trace] = {}
    counts = dict.fromkeys(wanted, 0)
    while len(traces) < n:
        if not counts:
            raise TaskError(
                f"atlas/{split} holds only about {len(traces)} questions of these forms, {n} were asked for"
            )
        form = min(counts, key=lambda name: counts[name])
        trace = _new(form, pool, split, counts[form], draws, traces)
        if trace is None:
            del counts[form]
        else:
            traces[trace.question.id] = trace
            counts[form] += 1
    ordered = list(traces.values())
    draws.shuffle(ordered)
    return ordered


def _new(form: str, pool: _Pool, split: str, slot: int, draws: random.Random, known: dict[str, Trace]) -> Trace | None:
    """A question of this form that is not there yet, or None if none was drawn in PATIENCE tries."""
    for _ in range(PATIENCE):
        draft = FORMS[form][0](draws, pool, slot)
        if draft is None or (draft.choices and len(set(draft.choices)) < 4):
            continue
        trace = _trace(draft, form, split)
        if trace.question.id not in known:
            return trace
    return None


def atlas_table(traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """Per form: how many, chance, and the share of the commonest answer."""
    rows = []
    for form, (_, hops, chance) in FORMS.items():
        answers = [trace.question.answer for trace in traces if trace.question.meta["form"] == form]
        if answers:
            share = max(answers.count(answer) for answer in set(answers)) / len(answers)
            rows.append({"form": form, "hops": hops, "n": len(answers), "chance": chance, "majority": share})
    return rows
