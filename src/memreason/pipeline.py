"""The verbs as functions: each opens the doors of the rooms in their order."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from memreason.core.errors import RecipeError
from memreason.core.files import (
    file_hash,
    read_json,
    settings_hash,
    write_json,
    write_text,
)
from memreason.core.recipe import Recipe, load_recipe
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question, Trace
from memreason.data.tasks import Splits, load_eval
from memreason.encode.base import pick_dtype
from memreason.encode.codec import Codec
from memreason.encode.demonstrations import read_demonstrations
from memreason.encode.examples import coloured_mask
from memreason.fast.memory import peak_memory
from memreason.finetune.checkpoint import Checkpoint, checkpoint_for, open_checkpoint, save_untrained
from memreason.finetune.prepare import Prepared, pinned, prepare, trainable_model
from memreason.finetune.processes import together
from memreason.finetune.spread import is_spread
from memreason.finetune.train import train as run_trainer
from memreason.finetune.train import training_arguments
from memreason.generate.answer import answer_questions, read_samples
from memreason.generate.decode import refuse_unfed
from memreason.measure.confidence import confidence_table
from memreason.measure.score import score_trace
from memreason.measure.stats import summarise
from memreason.measure.unsure import retrieved_share
from memreason.report.console import console, note
from memreason.report.estimate import print_estimate
from memreason.retrieve.outside import FIELDS, outside
from memreason.timing.estimate import estimate

__all__ = ["ask", "dry_run", "evaluate", "run", "train"]


def train(recipe: Recipe, *, fresh: bool = False) -> Path:
    """Train a recipe into its run folder and return that. Running it again resumes, or says that it is done.

    `fresh` sets an earlier run in that folder aside. Raises RecipeError if it holds a run of another recipe.
    """
    folder, main = recipe.folder, PartialState().is_main_process
    _claim(recipe, fresh)
    arguments = training_arguments(recipe)  # a wrong argument must show before anything is loaded
    manifest = folder / "manifest.json"
    known = read_json(manifest) if manifest.is_file() else {}
    if known.get("best"):
        note(f"{folder} is trained already; --fresh trains it anew")
        return folder
    step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * PartialState().num_processes
    _check_step(manifest, step)
    start = time.monotonic()
    recipe = pinned(recipe, known)
    shown = read_demonstrations(folder, recipe.data, known.get("demonstrations") or "")
    ready = prepare(recipe, warn=note, run=folder, demonstrations=shown)
    if recipe.method.name == "prompting":
        return _untrained(recipe, ready)
    model = trainable_model(recipe, ready.codec)
    refuse_unfed(model, ready.codec)  # before it is trained, not behind the first epoch
    if main:
        if ready.codec.demonstrations:
            ready.codec.demonstrations.save(folder)
        write_json(manifest, _manifest(recipe, ready) | {"examples_a_step": step})
    done = run_trainer(recipe, model, ready.codec, ready.examples.rows, _selector(recipe, ready.codec, ready.splits))
    if main:
        scored = any("eval_acc" in entry for entry in done["history"])
        best = {"checkpoint": done["best"], "by": f"eval_acc on {recipe.train.select_on}" if scored else "last"}
        spent = {"seconds": round(time.monotonic() - start, 1), "peak_memory": peak_memory()}
        spent["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        write_json(manifest, {**read_json(manifest), "best": best, "metrics": done["metrics"] | spent})
    PartialState().wait_for_everyone()
    return folder


def _untrained(recipe: Recipe, ready: Prepared) -> Path:
    """A run in which nothing is trained: its one checkpoint is the base model and how it is asked."""
    if PartialState().is_main_process:
        best = {"checkpoint": save_untrained(recipe.folder, ready.codec, recipe), "by": "nothing was trained"}
        write_json(recipe.folder / "manifest.json", {**_manifest(recipe, ready), "best": best, "metrics": {}})
    PartialState().wait_for_everyone()
    return recipe.folder


def _claim(recipe: Recipe, fresh: bool) -> None:
    """Write recipe.yaml, or check that the folder's run is of this recipe (evaluation settings aside)."""
    path, state = recipe.folder / "recipe.yaml", PartialState()
    if path.is_file() and not fresh:
        mine, theirs = recipe.model_dump(mode="json"), load_recipe(path).model_dump(mode="json")
        for one in (mine, theirs):
            one["train"] = {name: value for name, value in one["train"].items() if name not in SHARING}
        differing = [key for key in mine if key not in ("eval", "output_dir") and mine[key] != theirs[key]]
        if differing:
            raise RecipeError(
                f"{recipe.folder} holds a run of another recipe (differs in {', '.join(differing)}). "
                "Give another --output_dir, or --fresh to set that run aside.",
                "train",
            )
    elif state.is_main_process:
        if path.is_file():
            recipe.folder.rename(recipe.folder.with_name(f"{recipe.folder.name}.old-{int(time.time())}"))
        write_text(path, recipe.to_yaml())
    state.wait_for_everyone()


def _check_step(manifest: Path, step: int) -> None:
    """A run may go on with another number of processes, but not with other steps."""
    before = read_json(manifest).get("examples_a_step", step) if manifest.is_file() else step
    if before != step:
        raise RecipeError(
            f"{manifest.parent}: its steps took {before} examples, these would take {step}. Let "
            "train.per_device_train_batch_size x train.gradient_accumulation_steps x processes be "
            f"{before}, or start anew with --fresh.",
            "train",
        )


def _manifest(recipe: Recipe, ready: Prepared) -> dict[str, Any]:
    packages = ("memreason", "torch", "transformers", "peft", "tokenizers")
    splits = ready.splits
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "seed": recipe.seed,
        "base": recipe.model.base,
        "revision": recipe.model.revision,
        "fingerprint": recipe.model.fingerprint,
        "dtype": str(pick_dtype(recipe.model.dtype)).removeprefix("torch."),
        "tokens": ready.codec.describe(),
        "rows": {"train": len(splits.train), "validation": len(splits.validation), "leaked": len(splits.leaked)},
        "dropped": ready.examples.dropped,
        "train_tokens": ready.examples.tokens,
        "data": {str(path): file_hash(path) for path in splits.files},
        "demonstrations": ready.codec.scheme.demonstrations or None,
        "train_ids": settings_hash({"ids": [trace.question.id for trace in splits.train]}),
        "best": None,
    }


def _selector(recipe: Recipe, codec: Codec, splits: Splits) -> Callable[[nn.Module], dict[str, float]] | None:
    """The function that chooses the epoch: accuracy on held-out questions."""
    if recipe.train.select_on == "test":
        held = load_eval(recipe.data.task, "test", recipe.data, recipe.train.n_select, seed=recipe.seed)
        note("epochs are chosen on the test split, as published; the accuracy of the best one is optimistic")
    else:
        held = splits.validation[: recipe.train.n_select]
    if not held:
        return None
    settings = recipe.eval.model_copy(update={"n_samples": 1, "engine": "local", "ray": None})

    def judge(model: nn.Module) -> dict[str, float]:
        traces = answer_questions(model, codec, [trace.question for trace in held], settings, label="selecting")
        found = summarise([(trace, score_trace(trace)) for trace in traces])
        return {f"eval_{short}": found[name] for short, name in SELECTED.items()}

    return judge


# How the work is shared out: a run may go on otherwise, on other machines.
SHARING = {
    "per_device_train_batch_size", "gradient_accumulation_steps", "pass_tokens", "compile", "fsdp", "fsdp_config",
}  # fmt: skip
SELECTED = {"acc": "accuracy", "no_answer": "no_answer", "well_formed": "well_formed"}


def evaluate(
    path: Path | str,
    *,
    settings: EvalRecipe | None = None,
    base: str | None = None,
    checkpoint: Checkpoint | None = None,
    **model_changes: Any,
) -> dict[str, Any]:
    """Evaluate a run (its best checkpoint) or a checkpoint on its task or another one; returns the results.

    Writes results.json, samples.jsonl and generations.txt beside the weights. Resumes if it was stopped.
    """
    loaded = checkpoint or checkpoint_for(settings, path, base=base, **model_changes)
    recipe, state = loaded.recipe, PartialState()
    settings = settings or recipe.eval
    if settings.ray:
        loaded = open_checkpoint(loaded.folder, base=base, **model_changes)  # the workers read its weights
    task = settings.task or recipe.data.task
    gold = load_eval(task, settings.split, recipe.data, settings.n, seed=settings.seed)
    engine, memory = outside(settings, loaded.folder)
    elsewhere = {"engine", "base_url", "served_model"} if settings.engine == "local" else set()
    asked = settings.model_dump(mode="json", exclude={"batch_size", "ray", *FIELDS, *elsewhere})
    spec = {**asked, "base": base, **model_changes, **memory}
    spec["questions"] = [trace.question.id for trace in gold]
    folder = loaded.folder / "eval" / f"{Path(task).stem}-{settings.split}-{settings_hash(spec)}"
    if torch.cuda.is_available() and not (getattr(loaded.model, "is_quantized", False) or is_spread(loaded.model)):
        loaded.model.to(state.device)
    start, before = time.monotonic(), len(read_samples(folder))
    questions = [trace.question for trace in gold]
    keep: dict[str, Any] = {"label": f"{task}/{settings.split}", "folder": folder, "engine": engine}
    with together():
        traces = answer_questions(loaded.model, loaded.codec, questions, settings, **keep)
    lengths = [len(line["ids"]) for line in read_samples(folder)]
    results = {
        **summarise([(trace, score_trace(trace)) for trace in traces]),
        **({**retrieved_share(traces), **memory} if engine else {}),
        "task": task,
        "split": settings.split,
        "checkpoint": str(loaded.folder),
        "select_on": recipe.train.select_on,
        "tokens_per_trace": sum(lengths) / max(1, len(lengths)),
        "seconds": round(time.monotonic() - start, 1),
        "answered_before": before,
        "peak_memory": peak_memory(),
        "settings": settings.model_dump(mode="json"),
        "folder": str(folder),
    }
    if state.is_main_process:
        write_json(folder / "results.json", results)
        write_text(folder / "generations.txt", "".join(_generation(loaded.codec, trace) for trace in traces))
        if table := confidence_table(read_samples(folder)):
            write_json(folder / "confidence.json", table)
    return results


def _generation(codec: Codec, trace: Trace) -> str:
    """The published layout: question, blank line, generated solution, blank line, ground truth."""
    lines = [f"[{'+'.join(step.kinds) or '-'}] {step.text}" for step in trace.steps]
    solution = "\n".join([*lines, f"The answer is: {trace.answer}"])
    return f"{codec.scheme.shown_text(trace.question)}\n\n{solution}\n\n{trace.question.answer}\n\n"


def ask(path: Path | str, text: str, *, choices: Sequence[str] = (), base: str | None = None) -> Trace:
    """One trace for one question of the user's own, with choices if there are some."""
    loaded = checkpoint_for(None, path, base=base)
    settings = loaded.recipe.eval.model_copy(update={"n_samples": 1})
    question = Question(text=text, answer="?", task=loaded.recipe.data.task, choices=tuple(choices) or None)
    engine = outside(settings, loaded.folder).engine
    return answer_questions(loaded.model, loaded.codec, [question], settings, engine=engine)[0]


def run(recipe: Recipe, *, fresh: bool = False) -> dict[str, Any]:
    """Data, training, evaluation: the whole of a recipe."""
    if recipe.eval.engine in ("vllm", "openai"):
        raise RecipeError(
            f"eval.engine: {recipe.eval.engine} runs exported models. Train first, then `memreason export` and "
            f"`memreason eval EXPORT --eval.engine {recipe.eval.engine}`",
            "run",
        )
    return evaluate(train(recipe, fresh=fresh), settings=recipe.eval)


def dry_run(recipe: Recipe) -> None:
    """Render three examples (or the first piece of a stream) with the mask in colour and print what training would take
    here; train nothing."""
    training_arguments(recipe)  # a wrong argument must show here too
    if recipe.method.name == "prompting":
        note("method prompting: nothing is trained, there is nothing to estimate")
        return
    ready = prepare(recipe, warn=note)
    for row in ready.examples.rows[: 1 if recipe.train.mode == "constant_len" else 3]:
        console.print(coloured_mask(ready.codec, row), "")
    print_estimate(estimate(recipe, ready=ready))
