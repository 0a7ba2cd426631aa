"""Task files for lm-eval (lm-evaluation-harness): a folder for `--include_path` that asks what `memreason eval` asks.

The questions are written out, so that choices, their order and the split are ours; the answer is read by our own rule,
which is written beside them and needs no memreason.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memreason.core.errors import TaskError
from memreason.core.files import write_jsonl, write_text, writing
from memreason.core.trace import Question
from memreason.encode.codec import Codec
from memreason.measure import reading
from memreason.measure.score import question_kind

__all__ = ["COMMON", "LM_EVAL_TASKS", "SHIPPED", "lm_eval_doc", "shipped", "task_name", "write_tasks"]

SHIPPED = Path(__file__).with_name("lm_eval")
COMMON = "_memreason_yaml"
LM_EVAL_TASKS = tuple(sorted(path.stem.removeprefix("memreason_") for path in SHIPPED.glob("memreason_*.yaml")))


def task_name(task: str) -> str:
    """What lm-eval calls a task of ours."""
    return f"memreason_{task}"


def shipped(task: str) -> str:
    """The same. Raises TaskError for a task that there is no file for."""
    if task not in LM_EVAL_TASKS:
        raise TaskError(f"there is no lm-eval task for {task}, only for {', '.join(LM_EVAL_TASKS)}")
    return task_name(task)


def lm_eval_doc(codec: Codec, question: Question) -> dict[str, Any]:
    """A question as a line of the task's file; `prompt` is the user's message, as the model was shown its choices."""
    return {
        "id": question.id,
        "question": question.text,
        "choices": None if question.choices is None else list(question.choices),
        "prompt": codec.scheme.message(question),
        "kind": question_kind(question),
        "answer": question.answer,
    }


def write_tasks(out: Path, codec: Codec, asked: Mapping[str, Sequence[Question]], max_new_tokens: int) -> list[str]:
    """Write the tasks with their questions; returns their names there. Raises TaskError as `shipped` does."""
    names = [shipped(task) for task in asked]
    common = (SHIPPED / COMMON).read_text(encoding="utf-8")
    write_text(out / COMMON, re.sub(r"(?m)^(\s+max_gen_toks:).*", rf"\1 {max_new_tokens}", common))
    copies = [SHIPPED / "answers.py", Path(reading.__file__), *(SHIPPED / f"{name}.yaml" for name in names)]
    for path in copies:
        with writing(out / path.name):
            shutil.copyfile(path, out / path.name)
    for task, questions in asked.items():
        write_jsonl(out / f"{task}.jsonl", [lm_eval_doc(codec, question) for question in questions])
    return names
