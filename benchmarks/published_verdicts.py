"""Score the published saved generations and explain every verdict that differs from the published one.

    python benchmarks/published_verdicts.py --shared ../shared

A difference is explained only if the published extraction rule, written anew from its description
(REFERENCE.md, "Its faults"), gives the published verdict, and a named fault of that rule is found
in the very text. Ends with 1 if a difference, or a published verdict, stays unexplained.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memreason.core.files import read_json
from memreason.core.trace import LETTERS
from memreason.measure.reading import PHRASE
from memreason.measure.score import Score, score
from memreason.measure.stats import wilson

WORDS = "The answer is:"


@dataclass(frozen=True)
class Published:
    """What the published rule reads: the answer, where it stands in the text, and how it came there."""

    answer: str | None
    place: int
    phrase: bool


def first_phrase(text: str, letters: str) -> Published:
    """StrategyQA: what follows the first phrase, case minded."""
    begin = text.find(WORDS)
    if begin < 0:
        return Published(None, -1, False)
    rest = text[begin + len(WORDS) :].split("\n")[0].strip()
    return Published(rest, text.index(rest, begin + len(WORDS)), True)


def first_letter(text: str, letters: str) -> Published:
    """Multiple choice: the first letter of the range after the last phrase, else the last one anywhere."""
    begin = text.rfind(WORDS)
    places = [
        i for i in range(max(begin, -len(WORDS)) + len(WORDS) if begin >= 0 else 0, len(text)) if text[i] in letters
    ]
    if not places:
        return Published(None, -1, begin >= 0)
    place = places[0] if begin >= 0 else places[-1]
    return Published(text[place], place, begin >= 0)


Reads = Callable[[str, str], Published]
TASKS: dict[str, tuple[str, Reads, str]] = {  # file of gold answers, published rule, its letters
    "strategyqa": ("StrategyQA_test_clean.json", first_phrase, ""),
    "commonsenseqa": ("commonsense_qa_test_clean_CC.json", first_letter, "ABCDE"),
    "truthfulqa": ("truthful_qa_test_clean_CC.json", first_letter, "ABCDEFGHIJKLMN"),
}


@dataclass(frozen=True)
class Case:
    text: str
    prompt: str
    choices: int | None
    gold: str
    result: str
    published: Published
    ours: Score


# Faults of the published rule, each with what must be seen in the text. The first that holds is named.
FAULTS: tuple[tuple[str, Callable[[Case], bool]], ...] = (
    ("letter out of the prompt", lambda c: 0 <= c.published.place < len(c.prompt)),
    ("letter out of garbage without the phrase", lambda c: c.published.answer is not None and not c.published.phrase),
    ("no answer counted as wrong", lambda c: c.ours.rule == "no phrase" and c.published.answer is None),
    ("several answers, one taken", lambda c: c.ours.rule.endswith("several answers")),
    (
        "first phrase taken, not the last",
        lambda c: len(PHRASE.findall(c.text[len(c.prompt) :])) > 1 and bool(c.ours.extracted),
    ),
    ("letter beyond the choices", lambda c: _alone(c) and LETTERS.index(str(c.published.answer)) >= (c.choices or 26)),
    (
        "first letter of a text that gives none",
        lambda c: len(str(c.published.answer)) == 1 and c.ours.extracted is None,
    ),
    ("case or marks minded", lambda c: str(c.published.answer).strip(' .*"').casefold() == c.gold.casefold()),
)


def _alone(case: Case) -> bool:
    """Whether the published letter is a letter that stands by itself, with no word behind it."""
    letter = str(case.published.answer)
    return len(letter) == 1 and bool(re.match(r"[A-Z]\W*(?:\n|$)", case.text[case.published.place :]))


def plain(question: str) -> str:
    return " ".join(question.removeprefix("Question:").split())


def count_choices(question: str, gold: str) -> int | None:
    """How many letters A., B., C. ... follow one another in the question; None for a truth question."""
    if gold in ("True", "False"):
        return None
    count, place = 0, 0
    while (found := re.search(rf"(?:^|\s){LETTERS[count]}\.", question[place:])) is not None:
        count, place = count + 1, place + found.end()
    return count


def cases(shared: Path, task: str) -> list[Case]:
    """One case for each saved generation; a question without a gold answer ends the script."""
    labels, rule, letters = TASKS[task]
    gold = {plain(row["question"]): row["answer"] for row in read_json(shared / "data" / "labelled" / labels)}
    found = []
    row: dict[str, Any]
    for number, row in enumerate(read_json(shared / "data" / "outputs" / f"{task}_llama2-7b.json"), 1):
        text = row["generated_text"]
        prompt = text.partition("<prefix_0>")[0]
        question = plain(prompt)
        if question not in gold:
            sys.exit(f"{task}, generation {number}: no labelled question reads {question!r}")
        choices = count_choices(question, gold[question])
        assert choices is None or gold[question] in LETTERS[:choices], f"{task}, generation {number}: {choices} choices"
        ours = score(text[len(prompt) :], gold[question], choices=choices)
        found.append(Case(text, prompt, choices, gold[question], row["result"], rule(text, letters), ours))
    return found


def explain(case: Case) -> str | None:
    """The fault that explains a difference, or None if the published rule does not give this verdict."""
    if (case.published.answer == case.gold) != (case.result == "correct"):
        return None
    return next((name for name, holds in FAULTS if holds(case)), None)


def report(task: str, found: list[Case]) -> int:
    """Print one line, and one for each difference; returns how many are unexplained."""
    differ = [(number, case) for number, case in enumerate(found, 1) if case.ours.verdict != case.result]
    repeated = sum((case.published.answer == case.gold) == (case.result == "correct") for case in found)
    theirs = sum(case.result == "correct" for case in found)
    correct = sum(case.ours.verdict == "correct" for case in found)
    low, high = wilson(correct, len(found))
    counts = f"{len(found):>6} {len(found) - len(differ):>6} {len(differ):>6}   {repeated:>6}"
    print(f"{task:<14} {counts}   {theirs / len(found):>9.4f} {correct / len(found):>7.4f}  {low:.3f} to {high:.3f}")
    unexplained = len(found) - repeated
    for number, case in differ:
        fault = explain(case)
        unexplained += fault is None and (case.published.answer == case.gold) == (case.result == "correct")
        theirs_read = f"published {case.result} (read {case.published.answer!r})"
        ours_read = f"here {case.ours.verdict} ({case.ours.rule})"
        print(f"    generation {number}: gold {case.gold}, {theirs_read}, {ours_read}: {fault or 'UNEXPLAINED'}")
        print(f"        {case.ours.evidence[-60:]!r}")
    return unexplained


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder that holds data/outputs and data/labelled")
    shared = parser.parse_args().shared
    print("file                n  agree differ   repeats   published    here  95 % interval")
    unexplained = sum(report(task, cases(shared, task)) for task in TASKS)
    print(f"unexplained: {unexplained}")
    print("repeats: published verdicts that the published rule, written anew, gives too")
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
