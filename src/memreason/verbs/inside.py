"""The commands that look inside a trained run, and the table of their arguments. All that is heavy is imported late."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from memreason.core.errors import RecipeError
from memreason.verbs.label import TEACHER, teacher_fields

__all__ = ["BASE", "INSIDE", "RAY", "RUN", "opened"]


def opened(
    path: str, fields: dict[str, Any], *, base: str | None = None, here: bool = False, **changes: Any
) -> tuple[Any, Any]:
    """A checkpoint, and how it is to be evaluated: as its run was to be, with what is given now.

    Its weights are read where the engine needs them, or if they are needed `here` in any case.
    """
    from memreason.core.recipe import load_recipe
    from memreason.finetune.checkpoint import open_checkpoint, with_weights

    found = open_checkpoint(path, base=base, **changes)
    trained = {f"eval.{key}": value for key, value in found.recipe.eval.model_dump().items()}
    settings = load_recipe(None, {**trained, **fields}).eval
    if here or (settings.engine == "local" and not settings.ray):
        return with_weights(found, base=base, **changes), settings
    if changes and settings.engine != "local":
        named = ", ".join(f"model.{name}" for name in changes)
        raise RecipeError(f"{named}: eval.engine {settings.engine} reads the weights as they were exported", "eval")
    return found, settings


def _faults(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason import inside
    from memreason.core.labelling import load_label_recipe
    from memreason.published import pairs
    from memreason.report.faults import print_faults

    teaching = [(name, value) for name, value in pairs(rest) if name.startswith("teacher.")]
    teaching += teacher_fields(arguments)
    if teaching and not arguments.teacher:
        raise RecipeError(f"{teaching[0][0]}: whom is that for? Give --judge MODEL", "faults")
    fields = {name: value for name, value in _fields(arguments, rest).items() if not name.startswith("teacher.")}
    loaded, settings = opened(arguments.path, fields, base=arguments.base)
    found = inside.faults(
        arguments.path,
        settings=settings,
        base=arguments.base,
        checkpoint=loaded,
        counterfactual=arguments.counterfactual or bool(arguments.gold),
        gold=arguments.gold,
        judge=load_label_recipe(None, teaching) if arguments.teacher else None,
    )
    print_faults(found)


def _probe(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason import inside
    from memreason.report.probe import print_probe

    print_probe(inside.probe(arguments.path, **_given(arguments, rest)))


def _attention(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from pathlib import Path

    from memreason import inside
    from memreason.report.attention import show_closeup, show_overview
    from memreason.report.drawing import needs_matplotlib

    one = {"question": arguments.question, "question_id": arguments.id, "choices": arguments.choice}
    maps = {"layers": arguments.layer, "heads": arguments.head}
    if not (arguments.question or arguments.id) and any((*maps.values(), arguments.choice)):
        raise RecipeError("--layer, --head and --choice are for one question: give --question or --id", "attention")
    if arguments.id and (arguments.question or arguments.choice):
        raise RecipeError(f"--id {arguments.id} is a question already: leave out --question and --choice", "attention")
    if arguments.question or arguments.id:
        needs_matplotlib()  # before anything is computed
    given, folder = _given(arguments, rest, here=True), Path(arguments.path) / "attention"
    if arguments.question or arguments.id:
        show_closeup(inside.closeup(arguments.path, **one, **maps, **given), folder)
    else:
        show_overview(*inside.attention(arguments.path, **given), folder)


def _calibrate(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.outside import calibrate
    from memreason.report.retrieval import print_calibration

    print_calibration(calibrate(arguments.path, **_given(arguments, rest)))


def _retrieve(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.outside import retrieval_curve
    from memreason.report.retrieval import print_curve

    print_curve(retrieval_curve(arguments.path, **_given(arguments, rest)))


def _given(arguments: argparse.Namespace, rest: Sequence[str], *, here: bool = False) -> dict[str, Any]:
    """The checkpoint, and how it is to be evaluated."""
    loaded, settings = opened(arguments.path, _fields(arguments, rest), base=arguments.base, here=here)
    return {"settings": settings, "base": arguments.base, "checkpoint": loaded}


def _fields(arguments: argparse.Namespace, rest: Sequence[str]) -> dict[str, Any]:
    from memreason.published import pairs

    return dict(pairs(rest)) | ({"eval.ray": arguments.ray} if arguments.ray else {})


def _serve(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason import pages
    from memreason.published import pairs

    pages.needs_server()  # before anything is loaded
    loaded, settings = opened(arguments.path, dict(pairs(rest)), base=arguments.base, here=True)
    at = {"host": arguments.host, "port": arguments.port, "limit": arguments.limit}
    pages.serve(arguments.path, settings=settings, checkpoint=loaded, **at)


def _report(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.pages import write_report
    from memreason.report.console import figures

    page = write_report(arguments.paths, out=arguments.out, csv=arguments.csv, json=arguments.json)
    beside = [("table", arguments.csv), ("data", arguments.json)]
    figures("where it lies", [("page", str(page)), *((name, path) for name, path in beside if path)])


RUN = {"help": "run (its best checkpoint) or checkpoint"}
BASE = {"metavar": "MODEL", "help": "base model, where it is not the recipe's"}
RAY = {"metavar": "WORKERS", "help": "share the questions among so many workers on Ray: here, or at RAY_ADDRESS"}
FIELDS = "--eval.n 100 --eval.batch_size 64"
NUMBER = {"type": int, "action": "append", "default": [], "metavar": "N"}
INSIDE: dict[str, tuple[Any, ...]] = {
    "faults": (
        _faults,
        "whose fault each wrong answer is: memory, reason or format; exactly on atlas, else by trying or a judge",
        {
            "path": RUN,
            "--counterfactual": {"action": "store_true", "help": "also answer anew with gold and placebo memory lines"},
            "--gold": {
                "choices": ["labelled", "facts", "retrieved"],
                "help": "the same, with gold lines from there (default: labelled traces, else the questions' facts)",
            },
            "--judge": {"dest": "teacher", "metavar": "MODEL", "help": "also let this model read every wrong trace"},
            **{flag: settings for flag, settings in TEACHER.items() if flag != "--teacher"},
            "--ray": RAY,
            "--base": BASE,
        },
        f"{FIELDS} --teacher.max_tokens 4096",
    ),
    "probe": (
        _probe,
        "whether blocks control what a line becomes, and whether answers follow the memory lines",
        {"path": RUN, "--ray": RAY, "--base": BASE},
        FIELDS,
    ),
    "attention": (
        _attention,
        "what looks at what: attention between question, memory, reason and answer, right against wrong",
        {
            "path": RUN,
            "--question": {"default": "", "help": "pictures, token by token, of the trace of this question"},
            "--choice": {"action": "append", "default": [], "help": "a choice of that question; may be repeated"},
            "--id": {"default": "", "help": "the same of a question that was evaluated, by its id"},
            "--layer": {**NUMBER, "help": "a picture of this layer (alone: mean over its heads); may be repeated"},
            "--head": {**NUMBER, "help": "a picture of this head (alone: of the last layer); may be repeated"},
            "--ray": RAY,
            "--base": BASE,
        },
        FIELDS,
    ),
    "calibrate": (
        _calibrate,
        "find the log-probability below which memory lines are worth looking up, on validation questions",
        {"path": RUN, "--ray": RAY, "--base": BASE},
        FIELDS,
    ),
    "retrieve": (
        _retrieve,
        "accuracy against the share of memory lines that are retrieved from a corpus, as a curve",
        {"path": RUN, "--ray": RAY, "--base": BASE},
        "--eval.corpus atlas --eval.n 100",
    ),
    "serve": (
        _serve,
        "the report of a run, live: ask, change a memory line, run from there, keep corrections",
        {
            "path": RUN,
            "--host": {"default": "127.0.0.1", "help": "address to listen at (default: this machine alone)"},
            "--port": {"type": int, "default": 8000, "help": "port (default: 8000; 0: any free one)"},
            "--limit": {"type": int, "default": 64, "help": "requests open at once (default: 64)"},
            "--base": BASE,
        },
        "--eval.max_new_tokens 200 --eval.corpus atlas",
    ),
    "report": (
        _report,
        "one page of what was found: figures and every trace; of two runs what differs",
        {
            "paths": {"nargs": "+", "metavar": "RUN", "help": "run, checkpoint or folder of an evaluation"},
            "--out": {"metavar": "PAGE", "help": "page to write (default: report.html in the run)"},
            "--csv": {"metavar": "FILE", "help": "also write the traces as a table"},
            "--json": {"metavar": "FILE", "help": "also write all that the page shows"},
        },
    ),
}
