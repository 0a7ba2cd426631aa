"""The commands of a run: train, evaluate, ask, time. All that is heavy is imported late."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memreason.core.errors import RecipeError
from memreason.verbs.inside import BASE, RAY, RUN, opened

__all__ = ["RUNS"]

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
    from memreason.pages import write_report
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
        figures("", [("report", str(write_report(recipe.folder))), ("live", f"memreason serve {recipe.folder}")])


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
    if arguments.ray:
        fields["eval.ray"] = arguments.ray
    from memreason import pipeline
    from memreason.report.console import note
    from memreason.report.terminal import print_results, print_samples

    loaded, settings = opened(path, fields, base=base, **changes)
    for line in differences(values, loaded.recipe) if published else ():
        note(line)
    results = pipeline.evaluate(path, settings=settings, base=base, checkpoint=loaded, **changes)
    print_samples(results, arguments.show)
    print_results(results)


def _ask(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason import pipeline
    from memreason.report.console import print_trace

    print_trace(pipeline.ask(arguments.path, arguments.question, choices=arguments.choice, base=arguments.base))


def _bench(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.report.terminal import print_bench
    from memreason.timing.compare import Settings, bench

    given = {name: value for name, value in vars(arguments).items() if name in Settings.__dataclass_fields__}
    results = bench(Settings(**{name: value for name, value in given.items() if value is not None}))
    print_bench(results)


TRAIN = {
    "recipe": {"nargs": "?", "help": "recipe file, or a shipped recipe's name"},
    "--data": {"action": "append", "metavar": "FILE[:WEIGHT]", "help": "own trace files; may be repeated"},
    "--print-recipe": {"action": "store_true", "help": "print the resolved recipe and stop"},
    "--dry-run": {"action": "store_true", "help": "show examples and costs, train nothing"},
    "--fresh": {"action": "store_true", "help": "set an earlier run in that folder aside"},
}
RUNS: dict[str, tuple[Any, ...]] = {
    "run": (
        _train,
        "data, training and evaluation of a recipe",
        TRAIN,
        "--train.learning_rate 1e-3 --data.n_train 500",
    ),
    "train": (_train, "train a recipe", TRAIN, "--train.learning_rate 1e-3 --data.n_train 500"),
    "eval": (
        _eval,
        "evaluate a run or checkpoint, on its own task or another",
        {
            "path": {"nargs": "?", **RUN},
            "--task": {"help": "another task, or a .jsonl file of own questions"},
            "--show": {"type": int, "default": 0, "metavar": "N", "help": "print N coloured traces"},
            "--ray": RAY,
            "--base": BASE,
        },
        "--eval.n 100 --eval.batch_size 64",
    ),
    "ask": (
        _ask,
        "one coloured trace for one question",
        {
            "path": RUN,
            "question": {"help": "the question, in quotes"},
            "--choice": {"action": "append", "default": [], "help": "a choice; may be repeated"},
            "--base": BASE,
        },
    ),
    "bench": (
        _bench,
        "how fast this machine trains and evaluates, beside the public libraries",
        {
            "recipe": {"nargs": "?", "help": "recipe file or name (default: strategyqa-smollm2)"},
            "--run": {"type": Path, "help": "trained run or checkpoint, for the evaluations"},
            "--rounds": {"type": int, "help": "turns of our training and the plain loop's (default: 2)"},
            "--questions": {"type": int, "help": "questions to evaluate on (default: 300)"},
            "--traces": {"type": int, "help": "traces to encode (default: 100000)"},
            "--vllm-python": {"type": Path, "metavar": "PYTHON", "help": "of an environment that holds vLLM"},
            "--curves": {"action": "store_true", "help": "also time against traces and questions in flight, as plots"},
            "--out": {"type": Path, "help": "folder of the results (default: bench)"},
        },
    ),
}
