"""The comparison of arms: each is a recipe, trained and evaluated in a process of its own, then all in one table."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from memreason.core.comparison import Comparison, Fields, Job, jobs_of
from memreason.core.errors import EngineError, MemreasonError, RecipeError
from memreason.core.files import read_json, read_traces, settings_hash, write_json, write_text
from memreason.core.recipe import Recipe, load_recipe
from memreason.core.trace import Trace
from memreason.measure.arms import arm_table
from memreason.measure.score import Score, score_trace
from memreason.report.console import duration, figures, note

__all__ = ["Work", "compare", "here", "on_ray", "plan", "print_plan", "run_arm"]

Work = Callable[[Sequence[Recipe]], Iterator[tuple[Recipe, str]]]  # recipes -> each, done, and what went wrong
MEANS = ("train_seconds", "seconds_per_question", "tokens_per_trace", "peak_memory")
FIRST = ("trainable_parameters", "train_tokens", "steps")  # the same on every seed, but for rounding


def plan(comparison: Comparison) -> list[Job]:
    """The jobs of a comparison, seed by seed. With `same: tokens` every trained arm is given the steps in which it sees
    as many tokens as the arm that it is compared with. Raises RecipeError with every mistake of every arm."""
    jobs = jobs_of(comparison)
    return jobs if comparison.same == "steps" else jobs_of(comparison, _as_many_tokens(comparison, jobs))


def _as_many_tokens(comparison: Comparison, jobs: Sequence[Job]) -> dict[str, Fields]:
    """Arm -> the steps that it takes to see the tokens that `against` sees in its epochs."""
    from memreason.finetune.prepare import prepare
    from memreason.finetune.train import training_arguments

    def epoch(recipe: Recipe) -> tuple[int, float, float]:
        """(tokens, steps, epochs)"""
        arguments = training_arguments(recipe)
        examples = prepare(recipe, warn=lambda _: None).examples
        each = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        return examples.tokens, -(-len(examples.rows) // each), arguments.num_train_epochs

    first = {job.arm: job.recipe for job in reversed(jobs) if job.recipe.method.name != "prompting"}
    if comparison.against not in first:
        raise RecipeError(f"same: tokens needs an arm that is trained; {comparison.against} is not", comparison.name)
    tokens, _, epochs = epoch(first[comparison.against])
    found: dict[str, Fields] = {}
    for arm, recipe in first.items():
        own, steps, _ = epoch(recipe)
        found[arm] = {"train": {"max_steps": max(1, round(tokens * epochs * steps / own))}}
    return found


def compare(comparison: Comparison, *, work: Work | None = None) -> dict[str, Any]:
    """Train and evaluate every arm on every seed that is not done yet, then compare: `arm_table`, with costs.

    Writes comparison.yaml, comparison.json and, through its caller, a page into the folder. `work` runs recipes (None:
    here, one after another). An arm that fails does not stop the others; at the end MemreasonError names those.
    """
    jobs = plan(comparison)
    write_text(comparison.folder / "comparison.yaml", comparison.to_yaml())
    left = _left(jobs)
    names = {job.recipe.output_dir: f"{job.arm}, seed {job.seed}" for job in reversed(jobs)}
    failed: dict[str, str] = {}
    for number, (recipe, problem) in enumerate((work or here)(list(left.values())), 1):
        name = names[recipe.output_dir]
        if problem:
            failed[name] = problem
        note(f"{number} of {len(left)}: {name}: {problem or _said(read_json(_record(recipe)))}")
    if failed:
        listed = "\n".join(f"  - {name}: {problem}" for name, problem in failed.items())
        raise MemreasonError(f"{len(failed)} of {len(left)} failed; what is done is kept\n{listed}")
    found = table_of(comparison, jobs)
    write_json(comparison.folder / "comparison.json", found)
    return found


def _said(record: dict[str, Any]) -> str:
    trained = f"trained in {record['train_seconds']:.0f} s, " if record["steps"] else ""
    return f"accuracy {record['accuracy']:.3f}, {trained}{record['seconds_per_question']:.2f} s a question"


def _record(recipe: Recipe) -> Path:
    """What is kept of an arm that is done, by how it was evaluated."""
    return recipe.folder / f"arm-{settings_hash(recipe.eval.model_dump(mode='json', exclude_defaults=True))}.json"


def _left(jobs: Sequence[Job]) -> dict[str | None, Recipe]:
    """Runs that are not done, by their folders: two jobs of one folder are one run."""
    return {job.recipe.output_dir: job.recipe for job in jobs if not _record(job.recipe).is_file()}


def table_of(comparison: Comparison, jobs: Sequence[Job]) -> dict[str, Any]:
    """The comparison of arms that are all done."""
    records: dict[str, dict[str, dict[str, Any]]] = {arm: {} for arm in comparison.arms}
    for job in jobs:  # seeds on which nothing of an arm depends share a folder, and count once
        records[job.arm].setdefault(str(job.recipe.output_dir), read_json(_record(job.recipe)))
    answers = {arm: [_answers(record) for record in found.values()] for arm, found in records.items()}
    table = arm_table(answers, comparison.against)
    for row in table["arms"]:
        found = list(records[row["arm"]].values())
        row["cost"] = {name: fmean(one[name] for one in found) for name in MEANS}
        row["cost"] |= {name: found[0][name] for name in FIRST}
        row["runs"] = list(records[row["arm"]])
    task, split = found[0]["task"], found[0]["split"]
    shown = {"name": comparison.name, "about": comparison.about, "same": comparison.same, "seeds": comparison.seeds}
    base = jobs[0].recipe.model.base
    return {**shown, "recipe": comparison.recipe, "base": base, "task": task, "split": split, **table}


def _answers(record: dict[str, Any]) -> list[tuple[Trace, Score]]:
    traces = read_traces(Path(record["folder"]) / "samples.jsonl")
    return [(trace, score_trace(trace)) for trace in traces]


def here(recipes: Sequence[Recipe]) -> Iterator[tuple[Recipe, str]]:
    """One after another, each in a process of its own: its peak memory is its own, and it takes none of ours with it
    when it is killed. It ends when this process does."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EngineError("compare shares out its arms itself: start one process, without accelerate or torchrun")
    for recipe in recipes:
        path = recipe.folder / "arm.yaml"
        write_text(path, recipe.to_yaml())
        child = subprocess.Popen([sys.executable, "-m", "memreason.comparing", str(path)], stdin=subprocess.PIPE)
        try:
            code = child.wait()
        except KeyboardInterrupt:  # the terminal sent it one too: it saves, and ends
            child.wait()
            raise
        if code == 130:
            raise KeyboardInterrupt
        problem = path.with_suffix(".txt")
        said = problem.read_text(encoding="utf-8") if code == 2 else f"its process ended with {code}"
        yield recipe, said if code else ""


def on_ray(workers: int) -> Work:
    """So many at a time on Ray's machines, which see the same folders. A task whose worker is lost is done again."""

    def work(recipes: Sequence[Recipe]) -> Iterator[tuple[Recipe, str]]:
        from memreason.generate.cluster import connected, reason, share_of

        if not recipes:
            return
        ray = connected(workers)
        share, _ = share_of(ray.nodes(), workers)
        # max_calls: a process each, so that its peak memory is its own.
        task = ray.remote(max_calls=1, max_retries=3, **share)(_there)
        waiting = {task.remote(str(Path.cwd()), recipe.to_yaml()): recipe for recipe in recipes}
        try:
            while waiting:
                (done,), _ = ray.wait(list(waiting), num_returns=1)
                yield waiting.pop(done), ray.get(done)
        except ray.exceptions.RayError as error:
            raise EngineError(f"--ray: {reason(error)}. Run the same command again to go on") from error

    return work


def _there(stand: str, recipe: str) -> str:
    """One arm on some machine: what went wrong, or nothing."""
    if not Path(stand).is_dir():
        return f"{stand} is not on {socket.gethostname()}: every machine must see it, as on a shared file system"
    os.chdir(stand)  # paths of a recipe may be relative
    try:
        run_arm(Recipe.model_validate(yaml.safe_load(recipe)))
    except MemreasonError as error:
        return f"on {socket.gethostname()}: {error}"
    return ""


def print_plan(comparison: Comparison) -> None:
    """Every arm and seed: whether it is done, and where it lies; and how long one takes that is not."""
    jobs = plan(comparison)
    left = _left(jobs)
    rows, seen = list[tuple[str, str]](), dict[str | None, str]()
    for job in jobs:
        name = f"{job.arm}, seed {job.seed}"
        first = seen.setdefault(job.recipe.output_dir, name)
        state = "to do" if job.recipe.output_dir in left else "done"
        rows.append((name, f"the same as {first}" if first != name else f"{state}, {job.recipe.output_dir}"))
    figures(f"{comparison.name}: {len(seen)} runs, {len(left)} to do", rows)
    trained = {job.arm: job.recipe for job in reversed(jobs) if job.recipe.method.name != "prompting"}
    if left and trained:
        arm = comparison.against if comparison.against in trained else next(iter(trained))
        _print_time(arm, trained[arm], len(left))


def _print_time(arm: str, recipe: Recipe, left: int) -> None:
    from memreason.timing.estimate import estimate

    try:
        low, high = estimate(recipe)["seconds"]["total"]
    except MemreasonError as error:
        note(f"how long it takes is unknown: {error}")
        return
    total = f"{duration(left * low)} to {duration(left * high)}"
    figures("time, estimated", [(arm, f"{duration(low)} to {duration(high)} here"), ("as long for each", total)])


def run_arm(recipe: Recipe) -> None:
    """Train and evaluate one arm, and keep what it took. Goes on where it was stopped."""
    from memreason.pipeline import evaluate, train

    folder = train(recipe)
    results = evaluate(folder, settings=recipe.eval)
    manifest = read_json(folder / "manifest.json")
    spent = manifest.get("metrics") or {}
    asked = results["n"] * recipe.eval.n_samples - results["answered_before"]
    write_json(
        _record(recipe),
        {
            **{name: results[name] for name in ("accuracy", "n", "task", "split", "folder", "tokens_per_trace")},
            "seconds_per_question": results["seconds"] / asked if asked else 0.0,
            "train_seconds": spent.get("seconds", 0.0),
            "peak_memory": max(spent.get("peak_memory", 0), results["peak_memory"]),
            "trainable_parameters": spent.get("trainable_parameters", 0),
            "train_tokens": manifest.get("train_tokens", 0),
            "steps": read_json(folder / "trainer_state.json").get("global_step", 0),
        },
    )


def _main() -> int:
    """`python -m memreason.comparing ARM.yaml`: one arm. What a user can mend is left in ARM.txt."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    path = Path(sys.argv[1])
    try:
        run_arm(load_recipe(path))
    except MemreasonError as error:
        write_text(path.with_suffix(".txt"), str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _end_with_parent() -> None:
    """The parent's end of this pipe closes when it ends, however it does."""
    os.read(sys.stdin.fileno(), 1)  # not sys.stdin's own: its lock would be held when the interpreter ends
    os._exit(1)


if __name__ == "__main__":
    sys.exit(_main())
