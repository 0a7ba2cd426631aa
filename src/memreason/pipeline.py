"""The verbs as functions: each opens the doors of the rooms in their order."""

from __future__ import annotations

import json
import platform
import random
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from tqdm import tqdm

from memreason.core.errors import RecipeError
from memreason.core.files import append_jsonl, file_hash, read_json, read_jsonl, settings_hash, write_json, write_text
from memreason.core.recipe import EvalRecipe, Recipe
from memreason.core.trace import Question, Trace
from memreason.data.tasks import TASKS, Splits, load_eval, load_splits, task_named
from memreason.encode.base import load_model, load_tokenizer
from memreason.encode.examples import coloured_mask, encode_trace, encode_traces, pack_stream
from memreason.encode.scheme import Codec, TokenScheme
from memreason.encode.vocab import add_rows, add_tokens
from memreason.finetune.checkpoint import Checkpoint, load_checkpoint
from memreason.finetune.methods import trainable
from memreason.finetune.train import train as run_trainer
from memreason.finetune.train import training_arguments
from memreason.generate.engine import generate
from memreason.measure.score import score_trace
from memreason.measure.stats import summarise

__all__ = [
    "answer_questions",
    "ask",
    "dry_run",
    "evaluate",
    "make_codec",
    "print_trace",
    "results_table",
    "run",
    "train",
]

console = Console()
COLOURS = {"memory": "cyan", "reason": "yellow"}
ALPACA = (
    "Below is a question. Write a response that answers it.\n\n### Instruction:\n{question}{choices}\n\n### Response:\n"
)


def scheme_of(recipe: Recipe) -> TokenScheme:
    """The token scheme that a recipe asks for, with its task's way of printing questions."""
    tokens, task = recipe.tokens, TASKS.get(recipe.data.task, TASKS["atlas"])
    return TokenScheme(
        n_prefix=tokens.n_prefix if tokens.add else 0,
        n_special=tokens.n_special if tokens.add else 0,
        kinds=tuple(tokens.kinds),
        placement=tokens.placement,
        question_template=ALPACA if tokens.template == "alpaca" else task.question_template,
        choice_template=task.choice_template,
        noise_seed=recipe.seed,
    )


def make_codec(recipe: Recipe) -> Codec:
    """The base tokenizer with the recipe's planning tokens."""
    tokenizer = load_tokenizer(
        recipe.model.base, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code
    )
    return add_tokens(scheme_of(recipe), tokenizer)


def _base(recipe: Recipe, codec: Codec) -> Any:
    settings = recipe.model
    model = load_model(
        settings.base,
        dtype=settings.dtype,
        quantize=settings.quantize,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        random_initialize=settings.random_initialize,
        offload=settings.offload,
    )
    add_rows(model, codec)
    return model


def train(recipe: Recipe, *, fresh: bool = False) -> Path:
    """Train a recipe into its run folder and return that. Running it again resumes, or says that it is done.

    Raises RecipeError if the folder holds a run of another recipe.
    """
    folder, state = recipe.folder, PartialState()
    _claim(recipe, fresh)
    training_arguments(recipe)  # a wrong argument must show before anything is loaded
    manifest = folder / "manifest.json"
    if manifest.is_file() and read_json(manifest).get("best"):
        console.print(f"{folder}: already trained; nothing to do")
        return folder
    splits = load_splits(recipe.data, warn=_say)
    codec = make_codec(recipe)
    examples = encode_traces(codec, splits.train, recipe.train.model_max_length, cut=recipe.train.cut)
    if examples.dropped or examples.cut:
        _say(f"{examples.dropped} traces dropped, {examples.cut} cut: over {recipe.train.model_max_length} tokens")
    rows = examples.rows
    if recipe.train.mode == "constant_len":
        rows = pack_stream(rows, recipe.train.model_max_length)
    model = trainable(
        _base(recipe, codec), codec, recipe.method, checkpointing=bool(_extra(recipe, "gradient_checkpointing"))
    )
    if state.is_main_process:
        _write_manifest(recipe, codec, splits, examples.tokens)
    judge = _selector(recipe, codec, splits)
    done = run_trainer(recipe, model, codec, rows, judge)
    if state.is_main_process:
        scored = [entry for entry in done["history"] if "eval_acc" in entry]
        best = {"checkpoint": done["best"], "by": f"eval_acc on {recipe.train.select_on}" if scored else "last"}
        write_json(manifest, {**read_json(manifest), "best": best, "metrics": done["metrics"]})
    state.wait_for_everyone()
    return folder


def _extra(recipe: Recipe, name: str) -> Any:
    return (recipe.train.model_extra or {}).get(name)


def _say(text: str) -> None:
    if PartialState().is_main_process:
        console.print(f"[dim]note:[/dim] {text}", highlight=False)


def _claim(recipe: Recipe, fresh: bool) -> None:
    """Write recipe.yaml, or check that the folder's run is of this recipe (evaluation settings aside)."""
    path = recipe.folder / "recipe.yaml"
    if not path.is_file() or fresh:
        if PartialState().is_main_process:
            if fresh:
                for old in [*recipe.folder.glob("checkpoint-*"), recipe.folder / "manifest.json"]:
                    old.rename(old.with_name(f"old-{int(time.time())}-{old.name}")) if old.exists() else None
            write_text(path, recipe.to_yaml())
        PartialState().wait_for_everyone()
        return
    from memreason.core.recipe import load_recipe

    mine, theirs = recipe.model_dump(mode="json"), load_recipe(path).model_dump(mode="json")
    differing = [key for key in mine if key not in ("eval", "output_dir") and mine[key] != theirs[key]]
    if differing:
        raise RecipeError(
            f"{recipe.folder} holds a run of another recipe (differs in {', '.join(differing)}). "
            "Give another --output_dir, or --fresh to set that run's checkpoints aside.",
            "train",
        )


def _write_manifest(recipe: Recipe, codec: Codec, splits: Splits, tokens: int) -> None:
    packages = ("memreason", "torch", "transformers", "peft", "tokenizers")
    write_json(
        recipe.folder / "manifest.json",
        {
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "seed": recipe.seed,
            "base": recipe.model.base,
            "revision": recipe.model.revision,
            "tokens": codec.describe(),
            "rows": {"train": len(splits.train), "validation": len(splits.validation), "leaked": len(splits.leaked)},
            "train_tokens": tokens,
            "data": {str(path): file_hash(path) for path in splits.files},
            "train_ids": settings_hash({"ids": [trace.question.id for trace in splits.train]}),
            "best": None,
        },
    )


def _selector(recipe: Recipe, codec: Codec, splits: Splits) -> Callable[[nn.Module], dict[str, float]] | None:
    """The function that chooses the epoch: accuracy on held-out questions."""
    if recipe.train.select_on == "test":
        held = load_eval(recipe.data.task, "test", recipe.data, recipe.train.n_select, seed=recipe.seed)
        _say("epochs are chosen on the test split, as published; the accuracy of the best one is optimistic")
    else:
        held = splits.validation[: recipe.train.n_select]
    if not held:
        return None
    settings = recipe.eval.model_copy(update={"n_samples": 1})

    def judge(model: nn.Module) -> dict[str, float]:
        traces = answer_questions(model, codec, [trace.question for trace in held], settings, label="selecting")
        found = summarise([(trace, score_trace(trace)) for trace in traces])
        return {
            "eval_acc": found["accuracy"],
            "eval_no_answer": found["no_answer"],
            "eval_well_formed": found["well_formed"],
        }

    return judge


def answer_questions(
    model: nn.Module,
    codec: Codec,
    questions: Sequence[Question],
    settings: EvalRecipe,
    *,
    label: str = "answering",
    folder: Path | None = None,
) -> list[Trace]:
    """Generate a trace for each question, split over processes, each question answered once.

    With a folder, every batch is appended to its samples and a second call goes on where the first stopped.
    """
    state = PartialState()
    done: list[dict[str, Any]] = []
    own = None
    if folder is not None:
        for path in sorted(folder.glob("samples*.jsonl")):
            done += [line for _, line in read_jsonl(path, torn_tail=True)]
        own = folder / ("samples.jsonl" if state.is_main_process else f"samples-{state.process_index}.jsonl")
    state.wait_for_everyone()
    skip = frozenset((line["id"], line["meta"]["sample"]) for line in done)
    mine = list(questions)[state.process_index :: state.num_processes]
    fresh: list[dict[str, Any]] = []
    was_training = model.training
    model.eval()
    with tqdm(total=len(mine) * settings.n_samples, desc=label, unit="q", disable=not state.is_main_process) as bar:
        for batch in generate(model, codec, mine, settings, skip=skip):
            lines = [_sample(codec, generation) for generation in batch]
            if own is not None:
                append_jsonl(own, lines)
            fresh += lines
            bar.update(len(lines))
    model.train(was_training)
    lines = done + (gather_object(fresh) if state.num_processes > 1 else fresh)
    once = {(line["id"], line["meta"]["sample"]): line for line in lines}
    order = {question.id: number for number, question in enumerate(questions)}
    kept = sorted(
        (line for line in once.values() if line["id"] in order),
        key=lambda line: (order[line["id"]], line["meta"]["sample"]),
    )
    return [Trace.from_json(line) for line in kept]


def _sample(codec: Codec, generation: Any) -> dict[str, Any]:
    """One line of samples.jsonl: trace, ids, and the log-probability of each generated id."""
    trace = codec.parse(generation.question, generation.ids)
    given = len(generation.ids) - len(generation.logprobs)
    return {
        **trace.to_json(),
        "ids": generation.ids,
        "logprobs": [round(value, 5) for value in generation.logprobs],
        "meta": {**generation.question.meta, "sample": generation.sample, "given": given},
    }


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
    recipe = loaded.recipe
    settings = settings or recipe.eval
    task = settings.task or recipe.data.task
    task_named(task)
    gold = load_eval(task, settings.split, recipe.data, settings.n, seed=settings.seed)
    spec = {**settings.model_dump(mode="json", exclude={"batch_size"}), "base": base, **model_changes}
    spec["questions"] = [trace.question.id for trace in gold]
    folder = loaded.folder / "eval" / f"{task}-{settings.split}-{settings_hash(spec)}"
    if torch.cuda.is_available() and not getattr(loaded.model, "is_quantized", False):
        loaded.model.to(PartialState().device)
    start = time.monotonic()
    traces = answer_questions(
        loaded.model,
        loaded.codec,
        [trace.question for trace in gold],
        settings,
        label=f"{task}/{settings.split}",
        folder=folder,
    )
    scored = [(trace, score_trace(trace)) for trace in traces]
    lengths = [len(line["ids"]) for _, line in _samples(folder)] if PartialState().is_main_process else []
    results = {
        **summarise(scored),
        "task": task,
        "split": settings.split,
        "checkpoint": str(loaded.folder),
        "select_on": recipe.train.select_on,
        "tokens_per_trace": sum(lengths) / max(1, len(lengths)),
        "seconds": round(time.monotonic() - start, 1),
        "settings": settings.model_dump(mode="json"),
        "folder": str(folder),
    }
    if PartialState().is_main_process:
        write_json(folder / "results.json", results)
        write_text(folder / "generations.txt", "".join(_generation(loaded.codec, trace) for trace in traces))
    return results


def _samples(folder: Path) -> list[tuple[int, Any]]:
    return [line for path in sorted(folder.glob("samples*.jsonl")) for line in read_jsonl(path, torn_tail=True)]


def _generation(codec: Codec, trace: Trace) -> str:
    """The published layout: question, blank line, generated solution, blank line, ground truth."""
    lines = [f"[{'+'.join(step.kinds) or '-'}] {step.text}" for step in trace.steps]
    solution = "\n".join([*lines, f"The answer is: {trace.answer}"])
    return f"{codec.scheme.question_text(trace.question).strip()}\n\n{solution}\n\n{trace.question.answer}\n\n"


def ask(path: Path | str, text: str, *, base: str | None = None) -> Trace:
    """One trace for one question of the user's own."""
    loaded = load_checkpoint(path, base=base)
    settings = loaded.recipe.eval.model_copy(update={"n_samples": 1})
    question = Question(text=text, answer="?", task=loaded.recipe.data.task)
    return answer_questions(loaded.model, loaded.codec, [question], settings)[0]


def run(recipe: Recipe, *, fresh: bool = False) -> dict[str, Any]:
    """Data, training, evaluation: the whole of a recipe."""
    folder = train(recipe, fresh=fresh)
    return evaluate(folder, settings=recipe.eval)


def dry_run(recipe: Recipe) -> None:
    """Render three examples with the mask in colour and print what training would take; train nothing."""
    splits, codec = load_splits(recipe.data, warn=_say), make_codec(recipe)
    examples = encode_traces(codec, splits.train, recipe.train.model_max_length, cut=recipe.train.cut)
    for trace in splits.train[:3]:
        console.print(coloured_mask(codec, encode_trace(codec, trace)), "")
    arguments = training_arguments(recipe)
    per_step = (
        arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * PartialState().num_processes
    )
    steps = (
        arguments.max_steps
        if arguments.max_steps > 0
        else int(-(-len(examples.rows) // per_step) * arguments.num_train_epochs)
    )
    model = trainable(_base(recipe, codec), codec, recipe.method)
    sizes = [(p.numel(), p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = sum(count for count, _, grad in sizes if grad)
    longest = sorted(len(row["input_ids"]) for row in examples.rows)[-1]
    batch = arguments.per_device_train_batch_size * longest
    config: Any = model.config
    # Weights, AdamW's two fp32 moments and gradients, kept activations (about 34 bytes a token, layer and
    # channel with recomputation off), and fp32 logits with their gradient.
    memory = sum(c * b for c, b, _ in sizes) + 12 * trained
    memory += batch * (34 * config.num_hidden_layers * config.hidden_size + 8 * config.vocab_size)
    table = Table(show_header=False, box=None)
    for name, value in (
        ("examples", f"{len(examples.rows):,} ({examples.dropped} dropped, {examples.cut} cut)"),
        ("validation", f"{len(splits.validation):,}"),
        ("tokens", f"{examples.tokens:,} (longest {longest})"),
        ("steps", f"{steps:,} of {per_step} examples"),
        ("trainable parameters", f"{trained:,} of {sum(c for c, _, _ in sizes):,}"),
        ("memory, estimated", f"{memory / 2**30:.1f} GiB at most"),
    ):
        table.add_row(name, value)
    console.print(table)


def print_trace(trace: Trace, verdict: str = "") -> None:
    """One trace, each kind in its colour."""
    text = Text(trace.question.text + "\n", style="bold")
    for letter, choice in zip("ABCDEFGHIJ", trace.question.choices or (), strict=False):
        text.append(f"  {letter}. {choice}\n")
    for step in trace.steps:
        kind = "+".join(step.kinds) or "line"
        text.append(f"  {kind:>7} ", style=f"bold {COLOURS.get(kind, 'white')}")
        text.append(step.text + "\n", style=COLOURS.get(kind, "white"))
    text.append(f"  {'answer':>7} {trace.answer or '(none)'}", style="bold green")
    if verdict:
        text.append(f"  {verdict}", style="green" if verdict == "correct" else "red")
    if trace.faults:
        text.append(f"\n  faults: {', '.join(trace.faults)}", style="red")
    console.print(text, "")


def results_table(results: dict[str, Any]) -> None:
    """The figures of one evaluation as a table."""
    table = Table(title=f"{results['task']} / {results['split']}", show_header=False, title_style="bold")
    low, high = results["interval"]
    rows = [
        ("questions", f"{results['n']}"),
        ("accuracy", f"{results['accuracy']:.3f}  (95 % Wilson {low:.3f} to {high:.3f})"),
        ("no answer", f"{results['no_answer']:.3f}"),
        ("chance / majority", f"{results['chance']:.3f} / {results['majority']:.3f}"),
        ("well-formed traces", f"{results['well_formed']:.3f}"),
        ("lines per trace", ", ".join(f"{kind} {count:.2f}" for kind, count in results["blocks"].items())),
        ("tokens per trace", f"{results['tokens_per_trace']:.1f}"),
        ("time", f"{results['seconds']:.0f} s"),
        ("files", results["folder"]),
    ]
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


def show_samples(results: dict[str, Any], count: int = 4, seed: int = 0) -> None:
    """A few coloured traces of an evaluation, a wrong one among them if there is one."""
    traces = [Trace.from_json(json.loads(json.dumps(line))) for _, line in _samples(Path(results["folder"]))]
    scored = [(trace, score_trace(trace).verdict) for trace in traces]
    random.Random(seed).shuffle(scored)
    wrong = [pair for pair in scored if pair[1] != "correct"][:1]
    right = [pair for pair in scored if pair[1] == "correct"]
    for trace, verdict in (right[: count - len(wrong)] + wrong)[:count]:
        print_trace(trace, verdict)
