"""`memreason estimate`, and the figures of `--dry-run`: what a recipe takes on given hardware, before it is run.

Nothing here is a rule of thumb about a model: parameters are counted on the real one without its numbers (`skeleton`),
memory and operations on a pass of it that is rehearsed (`rehearsal`), tokens on the recipe's own data (`workload`).
What is assumed is how much of a device's peak is reached (`hardware`); that gives the ranges, from best to worst.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from memreason.core.recipe import Recipe
from memreason.finetune.prepare import Prepared
from memreason.timing.footprint import cache_bytes, footprint, remedies, usable
from memreason.timing.hardware import QUANTISED, Hardware, Range, hardware
from memreason.timing.job import Job
from memreason.timing.rehearsal import Pass
from memreason.timing.skeleton import Sizes, configuration, out_of_reach, sizes
from memreason.timing.workload import encoded, workload

__all__ = ["estimate"]

Figures = dict[str, Any]
TOUCHES = 10  # times that clipping and AdamW read or write a value of what is trained
DRAFTED: Range = (0.7, 1.0)  # passes for a generated token: most tokens of planning blocks are drafted


def estimate(
    recipe: Recipe,
    *,
    gpus: str | None = None,
    dollars: str | None = None,
    traces: int | None = None,
    tokens: int | None = None,
    ready: Prepared | None = None,
) -> Figures:
    """Tokens, steps, FLOPs, memory of a device, time and cost of a recipe's training and evaluation.

    `gpus` such as `8xA100-80`, `h100`, `cpu` (None: this machine's); `dollars` an hour of one device. `traces` and
    `tokens` (of one trace) stand in for data that is not at hand; `ready` is what `prepare` made of it. Ranges are
    [best, worst] in seconds and dollars, memory is in bytes. Raises RecipeError for a device that is unknown,
    ModelError for a model whose configuration cannot be read.
    """
    load = encoded(recipe, ready) if ready else workload(recipe, traces=traces, tokens=tokens)
    config = configuration(recipe)
    if not load.tokenizer:
        load = replace(load, tokenizer=int(config.vocab_size))
    job = Job(recipe, config, load, hardware(gpus, recipe.model.dtype, dollars))
    size, memory, (steps, each, epochs) = sizes(job.model(), recipe), footprint(job), job.steps
    flops, training = _training(job, size, steps, epochs)
    asked = recipe.eval.n_samples * load.questions
    answering = _answering(job, asked, recipe.eval.batch_size)
    choosing = [round(epochs) * seconds for seconds in _answering(job, load.chosen_on, recipe.eval.batch_size)]
    total = [sum(parts) for parts in zip(training, choosing, answering, strict=True)]
    machine, dtype = job.machine, recipe.model.quantize or str(job.dtype).removeprefix("torch.")
    seconds = {"training": training, "choosing": choosing, "evaluation": answering, "total": total}
    return {
        "recipe": recipe.name,
        "hardware": {"name": str(machine), "devices": machine.count, "memory": machine.memory, "flops": machine.flops},
        "model": {"base": recipe.model.base, "parameters": size.parameters, "trained": size.trained}
        | {
            "dtype": dtype,
            "config_shipped": out_of_reach(recipe),
        },
        "strategy": "FSDP2" if job.sharded else "DDP" if machine.count > 1 else "one device",
        "data": {"source": load.source, "examples": len(load.lengths), "tokens": load.tokens}
        | {"longest": int(load.lengths.max()), "dropped": load.dropped, "cut": load.cut, "validation": load.validation},
        "steps": steps,
        "step_examples": each,
        "epochs": epochs,
        "pass_tokens": job.passes.tokens,
        "flops": flops,
        "flops_per_token": flops / (load.tokens * epochs),
        "memory": memory,
        "fits": memory["total"] <= usable(job),
        "remedies": [] if memory["total"] <= usable(job) else remedies(job),
        "seconds": seconds,
        "peak_share": [flops / (machine.count * machine.flops * seconds) for seconds in training],
        "evaluation": _evaluation(job, size, asked, memory["libraries"]),
        "dollars": _cost(machine, seconds),
    }


def _training(job: Job, size: Sizes, steps: int, epochs: float) -> tuple[float, list[float]]:
    """FLOPs of all devices, and [best, worst] seconds of all steps."""
    usual, largest = job.rehearsed(job.passes.usual), job.rehearsed(job.passes.largest)
    few, many, mean = job.passes.usual.tokens, job.passes.largest.tokens, job.passes.tokens
    place = (mean - few) / (many - few) if many > few else 0.0  # of the average pass between the two
    count, machine = job.passes.an_epoch * epochs, job.machine
    seconds = []
    for end in (1, 0):
        one, two = (_pass_seconds(job, each, end) for each in (usual, largest))
        update = TOUCHES * size.trained_weights / (machine.bandwidth * machine.reads[end])
        busy = count * (one + place * (two - one)) + steps * update
        talk = _exchange(job, size, count, steps)
        seconds.append(max(busy, talk) if end else busy + talk)
    return machine.count * count * (usual.flops + place * (largest.flops - usual.flops)), seconds


def _pass_seconds(job: Job, one: Pass, end: int) -> float:
    """The best (end 1) or the worst (end 0) seconds of a pass."""
    machine, slower = job.machine, QUANTISED[job.recipe.model.quantize][1 - end]
    reach = machine.reach[end]
    return slower * one.seconds(
        machine.flops * reach, machine.fp32 * reach, machine.bandwidth * machine.reads[end], machine.launch[1 - end]
    )


def _exchange(job: Job, size: Sizes, passes: float, steps: int) -> float:
    """Seconds in which devices exchange: gradients once a step; if sharded, weights twice and gradients once a pass."""
    count = job.machine.count
    sent = size.gradients * 2 * steps
    if job.sharded:
        sent = int((2 * size.weights + size.gradients) * passes)
    return sent * (count - 1) / count / job.machine.link


def _answering(job: Job, questions: int, in_flight: int) -> list[float]:
    """[best, worst] seconds in which all devices answer questions, each a share of them."""
    if not questions:
        return [0.0, 0.0]
    machine, load = job.machine, job.load
    mine = -(-questions // machine.count)
    rows = min(in_flight, mine)
    one = job.decoding(rows)
    answer = min(load.answer, job.recipe.eval.max_new_tokens)
    read = cache_bytes(job, rows, load.prompt + answer / 2) / machine.bandwidth
    seconds = []
    for end in (1, 0):
        prompts = mine * load.prompt * one.flops / rows / (machine.flops * machine.reach[end])
        a_pass = _pass_seconds(job, one, end) + read / machine.reads[end]
        seconds.append(prompts + DRAFTED[1 - end] * mine * answer / rows * a_pass)
    return seconds


def _evaluation(job: Job, size: Sizes, asked: int, libraries: float) -> Figures:
    settings, load = job.recipe.eval, job.load
    rows = min(settings.batch_size, max(1, asked))
    longest = min(settings.max_length or 10**9, load.prompt + settings.max_new_tokens)
    cache = cache_bytes(job, rows, longest)
    return {
        "questions": asked,
        "tokens": round(asked * min(load.answer, settings.max_new_tokens)),
        "in_flight": rows,
        "cache": cache,
        "memory": size.weights + cache + libraries,
    }


def _cost(machine: Hardware, seconds: dict[str, list[float]]) -> dict[str, list[float]] | None:
    """From the best time at the lowest price to the worst at the highest."""
    if machine.dollars is None:
        return None
    hours = {name: [machine.count * end / 3600 for end in ends] for name, ends in seconds.items()}
    return {name: [h * price for h, price in zip(ends, machine.dollars, strict=True)] for name, ends in hours.items()}
