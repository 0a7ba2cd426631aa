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
from memreason.core.recipe import EvalRecipe, Recipe, load_recipe
from memreason.core.trace import Question, Trace
from memreason.data.tasks import Splits, load_eval
from memreason.encode.base import pick_dtype
from memreason.encode.codec import Codec
from memreason.encode.examples import Example, coloured_mask, encode_trace, pack_stream
from memreason.fast.memory import peak_memory
from memreason.finetune.checkpoint import Checkpoint, load_checkpoint
from memreason.finetune.prepare import Prepared, prepare, trainable_model
from memreason.finetune.train import train as run_trainer
from memreason.finetune.train import training_arguments
from memreason.generate.answer import answer_questions, read_samples
from memreason.measure.confidence import confidence_table
from memreason.measure.score import score_trace
from memreason.measure.stats import summarise
from memreason.measure.unsure import retrieved_share
from memreason.report.console import console, figures, note
from memreason.retrieve.outside import FIELDS, outside

__all__ = ["ask", "dry_run", "evaluate", "run", "train"]


def train(recipe: Recipe, *, fresh: bool = False) -> Path:
    """Train a recipe into its run folder and return that. Running it again resumes, or says that it is done.

    `fresh` sets an earlier run in that folder aside. Raises RecipeError if it holds a run of another recipe.
    """
    folder, main = recipe.folder, PartialState().is_main_process
    _claim(recipe, fresh)
    training_arguments(recipe)  # a wrong argument must show before anything is loaded
    manifest = folder / "manifest.json"
    if manifest.is_file() and read_json(manifest).get("best"):
        note(f"{folder} is trained already; --fresh trains it anew")
        return folder
    start = time.monotonic()
    ready = prepare(recipe, warn=note)
    rows: Sequence[Example] = ready.examples.rows
    if recipe.train.mode == "constant_len":
        rows = pack_stream(rows, recipe.train.model_max_length)
    model = trainable_model(recipe, ready.codec)
    if main:
        write_json(manifest, _manifest(recipe, ready))
    done = run_trainer(recipe, model, ready.codec, rows, _selector(recipe, ready.codec, ready.splits))
    if main:
        scored = any("eval_acc" in entry for entry in done["history"])
        best = {"checkpoint": done["best"], "by": f"eval_acc on {recipe.train.select_on}" if scored else "last"}
        spent = {"seconds": round(time.monotonic() - start, 1), "peak_memory": peak_memory()}
        write_json(manifest, {**read_json(manifest), "best": best, "metrics": done["metrics"] | spent})
    PartialState().wait_for_everyone()
    return folder


def _claim(recipe: Recipe, fresh: bool) -> None:
    """Write recipe.yaml, or check that the folder's run is of this recipe (evaluation settings aside)."""
    path, state = recipe.folder / "recipe.yaml", PartialState()
    if path.is_file() and not fresh:
        mine, theirs = recipe.model_dump(mode="json"), load_recipe(path).model_dump(mode="json")
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


def _manifest(recipe: Recipe, ready: Prepared) -> dict[str, Any]:
    packages = ("memreason", "torch", "transformers", "peft", "tokenizers")
    splits = ready.splits
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "seed": recipe.seed,
        "base": recipe.model.base,
        "revision": recipe.model.revision,
        "dtype": str(pick_dtype(recipe.model.dtype)).removeprefix("torch."),
        "tokens": ready.codec.describe(),
        "rows": {"train": len(splits.train), "validation": len(splits.validation), "leaked": len(splits.leaked)},
        "dropped": ready.examples.dropped,
        "train_tokens": ready.examples.tokens,
        "data": {str(path): file_hash(path) for path in splits.files},
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
    settings = recipe.eval.model_copy(update={"n_samples": 1})

    def judge(model: nn.Module) -> dict[str, float]:
        traces = answer_questions(model, codec, [trace.question for trace in held], settings, label="selecting")
        found = summarise([(trace, score_trace(trace)) for trace in traces])
        return {f"eval_{short}": found[name] for short, name in SELECTED.items()}

    return judge


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
    loaded = checkpoint or load_checkpoint(path, base=base, **model_changes)
    recipe, state = loaded.recipe, PartialState()
    settings = settings or recipe.eval
    task = settings.task or recipe.data.task
    gold = load_eval(task, settings.split, recipe.data, settings.n, seed=settings.seed)
    engine, memory = outside(settings, loaded.folder)
    asked = settings.model_dump(mode="json", exclude={"batch_size", *FIELDS})
    spec = {**asked, "base": base, **model_changes, **memory}
    spec["questions"] = [trace.question.id for trace in gold]
    folder = loaded.folder / "eval" / f"{Path(task).stem}-{settings.split}-{settings_hash(spec)}"
    if torch.cuda.is_available() and not getattr(loaded.model, "is_quantized", False):
        loaded.model.to(state.device)
    start, before = time.monotonic(), len(read_samples(folder))
    questions = [trace.question for trace in gold]
    keep: dict[str, Any] = {"label": f"{task}/{settings.split}", "folder": folder, "engine": engine}
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
    return f"{codec.scheme.question_text(trace.question).strip()}\n\n{solution}\n\n{trace.question.answer}\n\n"


def ask(path: Path | str, text: str, *, choices: Sequence[str] = (), base: str | None = None) -> Trace:
    """One trace for one question of the user's own, with choices if there are some."""
    loaded = load_checkpoint(path, base=base)
    settings = loaded.recipe.eval.model_copy(update={"n_samples": 1})
    question = Question(text=text, answer="?", task=loaded.recipe.data.task, choices=tuple(choices) or None)
    engine = outside(settings, loaded.folder).engine
    return answer_questions(loaded.model, loaded.codec, [question], settings, engine=engine)[0]


def run(recipe: Recipe, *, fresh: bool = False) -> dict[str, Any]:
    """Data, training, evaluation: the whole of a recipe."""
    return evaluate(train(recipe, fresh=fresh), settings=recipe.eval)


def dry_run(recipe: Recipe) -> None:
    """Render three examples with the mask in colour and print what training would take; train nothing."""
    ready, arguments = prepare(recipe, warn=note), training_arguments(recipe)
    for trace in ready.splits.train[:3]:
        console.print(coloured_mask(ready.codec, encode_trace(ready.codec, trace)), "")
    rows, examples = ready.examples.rows, ready.examples
    each = arguments.per_device_train_batch_size
    per_step = each * arguments.gradient_accumulation_steps * PartialState().num_processes
    epochs = -(-len(rows) // per_step) * arguments.num_train_epochs
    steps = arguments.max_steps if arguments.max_steps > 0 else int(epochs)
    model = trainable_model(recipe, ready.codec)
    sizes = [(p.numel(), p.element_size(), p.requires_grad) for p in model.parameters()]
    trained, longest = sum(count for count, _, grad in sizes if grad), int(rows.lengths.max())
    figures(
        recipe.name,
        [
            ("examples", f"{len(rows):,} ({examples.dropped} dropped, {examples.cut} cut)"),
            ("validation", f"{len(ready.splits.validation):,}"),
            ("tokens", f"{examples.tokens:,} (longest {longest})"),
            ("steps", f"{steps:,} of {per_step} examples"),
            ("trainable parameters", f"{trained:,} of {sum(count for count, _, _ in sizes):,}"),
            ("memory, estimated", f"{_memory(model.config, sizes, each * longest) / 2**30:.1f} GiB at most"),
        ],
    )


def _memory(config: Any, sizes: list[tuple[int, int, bool]], tokens: int) -> int:
    """Bytes: weights, fp32 gradients and AdamW's two moments, activations kept for the backward pass (about 34 a
    token, layer and channel), and fp32 logits with their gradient. `tokens` are those of the longest batch."""
    weights = sum(count * size for count, size, _ in sizes)
    optimiser = 12 * sum(count for count, _, grad in sizes if grad)
    layers = int(config.num_hidden_layers) * int(config.hidden_size)
    return weights + optimiser + tokens * (34 * layers + 8 * int(config.vocab_size))
