"""Reads the published label files: a JSON list of `question`, `answer`, `cot_steps` and `split`.

A step reads `[label]: text`. A label that is not understood never moves the labels after it: its own
step is left out, or its trace is, and the report says which.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from memreason.core.errors import DataError, RecipeError
from memreason.core.files import read_json
from memreason.core.trace import LETTERS, MEMORY, REASON, Question, Step, Trace

__all__ = ["NO_LABEL", "ImportReport", "import_published", "label_kind", "split_choices", "split_label"]

NO_LABEL = "(no label)"
STEMS = {"fact": MEMORY, "reason": REASON}
LABELS = {
    "rag": MEMORY,
    "memory": MEMORY,
    "knowledge": MEMORY,
    "fact": MEMORY,
    "factual": MEMORY,
    "reason": REASON,
    "reasoning": REASON,
}
ANSWERS = {"true": "True", "false": "False", "yes": "True", "no": "False"}

# [label]  [label]:  [label:]  [label:   with or without bold marks around it
BRACKETED = re.compile(r"\s*\**\s*\[\s*([^\[\]:]{0,40}?)\s*(?:\]\s*\**\s*:?|:\s*\]?)\s*\**\s*")
BARE = re.compile(rf"\s*\**((?:{'|'.join(LABELS)})(?: knowledge)?)\**\s*:\**\s*", re.IGNORECASE)
JOINT = re.compile(r"\s*(?:\band\b|\bor\b|[,/&+|])\s*", re.IGNORECASE)
MARKER = re.compile(r"(?:^|(?<=\s))([A-Z])\.\s*")
OPTIONS = re.compile(r"\s*\bOptions:\s*")


@dataclass
class ImportReport:
    """What an import did. Rows and steps count from 1."""

    path: str
    task: str
    read: int = 0
    kept: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, str | None] = field(default_factory=dict)
    unknown: list[tuple[int, int, str]] = field(default_factory=list)
    empty: list[tuple[int, int]] = field(default_factory=list)
    bare: list[int] = field(default_factory=list)
    rejected: list[tuple[int, str]] = field(default_factory=list)
    duplicates: list[int] = field(default_factory=list)
    steps: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        rows = [
            ("traces", "read", self.read),
            ("", "kept", self.kept),
            ("", "kept without steps", _counted(self.bare)),
            ("", "rejected", len(self.rejected)),
            ("", "duplicates removed", _counted(self.duplicates)),
            *(("steps", f"kept as {kind}", count) for kind, count in sorted(self.steps.items())),
            ("", "left out, no text", len(self.empty)),
            ("", "with unknown label", len(self.unknown)),
            *(("label", f"{raw} -> {self.kinds[raw] or 'UNKNOWN'}", n) for raw, n in self.labels.most_common()),
            *(("unknown", raw, f"trace {row}, step {step}") for row, step, raw in self.unknown),
            *(("rejected", reason, _counted(where)) for reason, where in self._reasons().items()),
        ]
        width = max(len(what) for _, what, _ in rows)
        listed = "\n".join(f"  {head:<9} {what:<{width}}  {value}" for head, what, value in rows)
        return f"{self.path} ({self.task})\n{listed}"

    def _reasons(self) -> dict[str, list[int]]:
        reasons: dict[str, list[int]] = {}
        for row, reason in self.rejected:
            reasons.setdefault(reason, []).append(row)
        return reasons


def _counted(rows: list[int], shown: int = 8) -> str:
    if not rows:
        return "0"
    more = ", …" * (len(rows) > shown)
    return f"{len(rows)} (trace {', '.join(map(str, rows[:shown]))}{more})"


def import_published(
    path: Path | str, task: str, *, unknown: Literal["step", "trace"] = "step"
) -> tuple[list[Trace], ImportReport]:
    """Read one published file. `unknown` says what a label that is not understood costs: its step or its trace.

    Where a file has labelled traces, a training trace left without steps is a failed labelling and is
    rejected; a test question needs no steps and stays. Raises DataError if nothing can be used.
    """
    if unknown not in ("step", "trace"):
        raise RecipeError(f"unknown={unknown!r}: say 'step' (leave the step out) or 'trace' (reject its trace)")
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        found = "an empty list" if rows == [] else f"a JSON {type(rows).__name__}"
        raise DataError(f"{path}: a list of objects with question, answer and cot_steps is needed, got {found}")
    report = ImportReport(str(path), task, read=len(rows))
    labelled = any(isinstance(row, Mapping) and row.get("cot_steps") for row in rows)
    traces: dict[tuple[str, str], Trace] = {}
    for number, row in enumerate(rows, 1):
        trace = _read_row(row, number, task, unknown, labelled, report)
        if trace is None:
            continue
        key = (trace.question.split, trace.question.id)
        if key in traces:
            report.duplicates.append(number)
            continue
        traces[key] = trace
        report.steps.update(step.kinds[0] for step in trace.steps)
        if not trace.steps:
            report.bare.append(number)
    report.kept = len(traces)
    if not traces:
        row, reason = report.rejected[0]
        raise DataError(f"{path}: none of its {len(rows)} traces can be used; trace {row}: {reason}")
    return list(traces.values()), report


def _read_row(row: Any, number: int, task: str, unknown: str, labelled: bool, report: ImportReport) -> Trace | None:
    """One object of the file as a trace; None if it was rejected, with the reason in the report."""
    problem = _row_problem(row)
    if problem:
        report.rejected.append((number, problem))
        return None
    question = _question(row, task)
    steps, understood = _steps(row.get("cot_steps") or [], number, report)
    if question is None:
        problem = f"the choices cannot be told apart, or the answer {_answer(row)} is not among them"
    elif unknown == "trace" and not understood:
        problem = "has a step with an unknown label"
    elif labelled and not steps and question.split == "train":
        problem = "no step is left" if row.get("cot_steps") else "has no steps (a failed labelling)"
    if problem:
        report.rejected.append((number, problem))
        return None
    assert question is not None
    return Trace(question, tuple(steps))


def _row_problem(row: Any) -> str | None:
    """Why an object of the file is no trace at all, or None."""
    if not isinstance(row, Mapping):
        return f"an object is needed, got {type(row).__name__}"
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        return "its question is missing"
    if not _answer(row):
        return "its answer is missing"
    steps = row.get("cot_steps")
    if steps is not None and not (isinstance(steps, list) and all(isinstance(step, str) for step in steps)):
        return "its cot_steps are not a list of texts"
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # JSON may hold half a surrogate pair, which no file can be written with
        return "holds a broken character (half of a surrogate pair)"
    return None


def _answer(row: Mapping[str, Any]) -> str:
    answer = row.get("answer")
    text = str(answer).strip() if isinstance(answer, str | bool | int | float) else ""
    return ANSWERS.get(text.lower(), text.upper() if len(text) == 1 else text)


def _question(row: Mapping[str, Any], task: str) -> Question | None:
    """The question with its choices split out where the answer is a letter; None if that fails."""
    text, answer = row["question"].strip(), _answer(row)
    split = str(row.get("split") or "")
    if len(answer) != 1 or answer not in LETTERS:
        return Question(_bare_question(text), answer, task, split)
    parts = split_choices(text, answer)
    return parts and Question(parts[0], answer, task, split, choices=parts[1])


def _bare_question(text: str) -> str:
    return text.removeprefix("Question:").strip()


def split_choices(text: str, answer: str) -> tuple[str, tuple[str, ...]] | None:
    """Split "Q? A. one. B. two." or "Question: Q Options: A.one B.two" into question and choices.

    The markers are the run A, B, C … whose places look most like the start of a choice. None unless
    two choices or more come out, none of them empty, with the answer among them.
    """
    options = list(OPTIONS.finditer(text))
    start = options[-1].end() if options else 0
    for weigh in (_weigh_tight,) if options else (_weigh_sentences, _weigh_any):
        spans = _best_run([(m, weigh(text, m)) for m in MARKER.finditer(text, start)])
        ends = [m.start() for m in spans[1:]] + [len(text)]
        choices = tuple(text[m.end() : end].strip() for m, end in zip(spans, ends, strict=bool(spans)))
        question = _bare_question(text[: options[-1].start() if options else spans[0].start()]) if spans else ""
        if question and len(choices) > 1 and all(choices) and answer in LETTERS[: len(choices)]:
            return question, choices
    return None


def _weigh_tight(text: str, marker: re.Match[str]) -> int:
    """After "Options:" a choice follows its dot at once; "E. coli" inside a choice does not."""
    return 2 if text[marker.end() - 1] == "." else 1


def _weigh_sentences(text: str, marker: re.Match[str]) -> int:
    """A choice starts where a sentence ended. "by J. B. Rhine" and "Vitamin D." must not start one."""
    before = text[: marker.start()].rstrip()
    initial = re.search(r"(?:^|\s)[A-HJ-Z]\.$", before)  # not I: "World War I. B. …"
    return 2 if re.search(r"""[.?!…]["'”’)]*$""", before) and not initial else -1


def _weigh_any(text: str, marker: re.Match[str]) -> int:
    """Where sentences have no full stops, every marker may start a choice."""
    return 1


def _best_run(weighed: list[tuple[re.Match[str], int]]) -> list[re.Match[str]]:
    """The markers A, B, C … in order with the greatest weight in sum; the earliest of equals."""
    best: dict[str, tuple[int, list[re.Match[str]]]] = {}
    for marker, weight in weighed:
        letter = marker[1]
        before = best.get(LETTERS[LETTERS.index(letter) - 1]) if letter != "A" else (0, [])
        if before is None:
            continue
        run = (before[0] + weight, [*before[1], marker])
        if letter not in best or run[0] > best[letter][0]:
            best[letter] = run
    return max(best.values(), key=lambda run: run[0], default=(0, []))[1]


def _steps(raw_steps: list[str], number: int, report: ImportReport) -> tuple[list[Step], bool]:
    """The steps whose label is understood and whose text is not empty; False if a label was not understood."""
    steps, understood = [], True
    for place, raw in enumerate(raw_steps, 1):
        label, kind, text = split_label(raw)
        report.labels[label] += 1
        report.kinds[label] = kind
        if kind is None:
            report.unknown.append((number, place, label))
            understood = False
        elif not text:
            report.empty.append((number, place))
        else:
            steps.append(Step((kind,), text))
    return steps, understood


def split_label(raw: str) -> tuple[str, str | None, str]:
    """A step as (label as written, kind or None, text). Two labels of different kinds have no kind."""
    first = BRACKETED.match(raw) or BARE.match(raw)
    if first is None:
        return NO_LABEL, None, raw.strip()
    end, kinds = first.end(), {label_kind(first[1])}
    while True:
        joint = JOINT.match(raw, end)
        more = BRACKETED.match(raw, joint.end() if joint else end)
        # A bracket further on is a label only if it says so exactly: "said [a] man" and "[1, 5]" are text.
        if more is None or label_kind(more[1], typos=False) is None:
            break
        kinds.add(label_kind(more[1]))
        end = more.end()
    kind = kinds.pop() if len(kinds) == 1 else None
    return raw[:end].strip().rstrip(":* "), kind, raw[end:].strip()


def label_kind(label: str, *, typos: bool = True) -> str | None:
    """The kind a label means, or None. Every part of it must be understood and mean the same."""
    kinds = {_part_kind(part, typos) for part in JOINT.split(label.strip())}
    return kinds.pop() if len(kinds) == 1 else None


def _part_kind(part: str, typos: bool) -> str | None:
    words = re.findall(r"\w+", part.lower())
    kinds = [_word_kind(word, typos) for word in words]
    known = {kind for kind in kinds if kind}
    return kinds[0] if len(known) == 1 else None  # "fact-based reasoning" means two things


def _word_kind(word: str, typos: bool) -> str | None:
    stem = next((kind for stem, kind in STEMS.items() if word.startswith(stem)), None)
    if word in LABELS or stem or not typos:
        return LABELS.get(word, stem)
    near = {kind for label, kind in LABELS.items() if _one_edit(word, label)}
    return near.pop() if len(near) == 1 else None


def _one_edit(one: str, other: str) -> bool:
    """True if one letter added, lost, changed, or two neighbours swapped, makes one word of the other."""
    while one and other and one[0] == other[0]:
        one, other = one[1:], other[1:]
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return max(len(one), len(other)) <= 1 or (len(one) == 2 and one == other[::-1])
