"""What the tasks beside this file need: their questions, and the answer in what a model wrote.

`memreason lm-eval tasks` writes this folder; reading.py is memreason's own rule. Nothing here needs memreason.
"""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NONE = "[invalid]"
BLOCK = re.compile(r"<(?!prefix_)\w+_\d+>")  # of planning tokens, a line's kind or the answer
ANSWER = re.compile(r"(?:<answer_\d+>\s*)+(.*?)(?=<\w+_\d+>|$)", re.DOTALL)


def _reading() -> Any:
    spec = importlib.util.spec_from_file_location("memreason_reading", HERE / "reading.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reading = _reading()


def questions(file: str, **_: Any) -> dict[str, Any]:
    """The test split: the questions of a JSONL file in this folder, or in lm-eval's word its docs."""
    from datasets import Dataset

    with (HERE / file).open(encoding="utf-8") as lines:
        return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def read_answers(resps: Any, docs: Any) -> list[list[str]]:
    """A filter: of each text its answer, as the target is written, or [invalid]."""
    return [[read_answer(text, doc) for text in texts] for texts, doc in zip(resps, docs, strict=True)]


def read_answer(text: str, doc: dict[str, Any]) -> str:
    """What stands behind the answer block. Of a model that writes no blocks, the last "The answer is" counts."""
    line = ANSWER.search(text)
    if line is None and BLOCK.search(text):
        return NONE
    said, rules = (text, reading.RULES) if line is None else (line[1].strip(), reading.ANSWER_LINE)
    found = reading.read_answer(said, doc["kind"], len(doc["choices"] or ()) or None, rules).answer
    return NONE if found is None else str(found)


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The metrics of one question; a text without an answer counts as wrong and apart."""
    (answer,) = results
    return {"exact_match": float(answer == doc["answer"]), "no_answer": float(answer == NONE)}
