"""A trained and evaluated run as files, without a model: atlas questions, gold lines of which some are falsified."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from memreason.core.files import write_json, write_jsonl, write_text
from memreason.core.recipe import load_recipe
from memreason.core.trace import MEMORY, Step, Trace
from memreason.data.atlas import make_atlas
from memreason.data.atlas_rules import answer_from
from memreason.measure.attribute import attribute, can_check
from memreason.measure.confidence import confidence_table
from memreason.measure.score import score_trace
from memreason.measure.stats import summarise
from memreason.measure.ways import fault_lines, faults_of

FALSE = {"capital": "Springfield", "currency": "doubloon", "lies in": "Antarctica", "borders": "Atlantis"}


def falsified(step: Step) -> Step:
    """The memory line with another value, which is no fact of any country."""
    value = next(value for word, value in FALSE.items() if word in step.text)
    return replace(step, text=f"{step.text.rsplit(' ', 1)[0]} {value}.")


def answered(trace: Trace, draw: random.Random) -> Trace:
    """As a model might: one memory line in six is false, and the answer follows from the lines nine times in ten."""
    steps = tuple(falsified(step) if MEMORY in step.kinds and draw.random() < 1 / 6 else step for step in trace.steps)
    follows = answer_from(trace.question, [step.text for step in steps if MEMORY in step.kinds])
    options = ["A", "B", "C"] if trace.question.choices else ["True", "False"]
    slip = draw.random() < 0.1 or follows is None
    prediction = "" if draw.random() < 0.02 else draw.choice(options) if slip else str(follows)
    return replace(trace, steps=steps, prediction=prediction, faults=() if prediction else ("no answer line",))


def sample_of(trace: Trace, draw: random.Random) -> dict[str, Any]:
    """One line of samples.jsonl: two ids of a block and six of a text for each line, less likely where it is false."""
    spans = [[8 * place, 8 * place + 8] for place in range(len(trace.steps))]
    ids, sure = list(range(8 * len(spans))), []
    for step in trace.steps:
        doubt = 0.6 if any(value in step.text for value in FALSE.values()) else 0.12
        sure += [0.0, 0.0, *(-draw.expovariate(1 / doubt) * draw.random() for _ in range(6))]
    meta = {"sample": 0, "given": 0, "spans": spans, "bodies": [first + 2 for first, _ in spans]}
    line = trace.to_json()
    entropies, margins = [round(-2 * value, 4) for value in sure], [round(math.exp(value), 4) for value in sure]
    given = {"ids": ids, "logprobs": [round(value, 5) for value in sure], "entropies": entropies, "margins": margins}
    return {**line, **given, "meta": {**line["meta"], **meta}}


def save_evaluation(folder: Path, made: Sequence[Trace], seed: int = 0) -> Path:
    """results.json, samples.jsonl, confidence.json, faults.json and faults.jsonl of these traces."""
    draw = random.Random(seed)
    samples = [sample_of(trace, draw) for trace in made]
    write_jsonl(folder / "samples.jsonl", samples)
    results = {
        **summarise([(trace, score_trace(trace)) for trace in made]),
        "task": made[0].question.task,
        "split": made[0].question.split,
        "checkpoint": str(folder.parents[1]),
        "select_on": "validation",
        "tokens_per_trace": 42.5,
        "seconds": 73.1,
        "answered_before": 0,
        "peak_memory": 1_288_490_188,
        "settings": load_recipe(None, {"eval.n": len(made)}).eval.model_dump(mode="json"),
        "folder": str(folder),
    }
    write_json(folder / "results.json", results)
    if all(can_check(trace.question) for trace in made):
        ways = {"exact": [attribute(trace) for trace in made]}
        write_jsonl(folder / "faults.jsonl", fault_lines(ways))
        write_json(folder / "faults.json", {**faults_of(ways), "task": "atlas", "split": results["split"]})
        write_json(folder / "confidence.json", confidence_table(samples))
    return folder


def save_run(folder: Path, n: int, *, seed: int = 0, traces: Sequence[Trace] | None = None) -> Path:
    """A run of one checkpoint, evaluated on `n` atlas questions, or on these traces."""
    draw = random.Random(seed)
    made = traces or [answered(trace, draw) for trace in make_atlas("train", n)]
    recipe = load_recipe("demo", {"output_dir": str(folder), "eval.n": len(made)})
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    spent = {"train_runtime": 240.0, "train_loss": 0.41, "seconds": 301.4, "peak_memory": 2_469_606_195}
    manifest = {
        "versions": {"python": "3.11.7", "memreason": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "seed": 0,
        "base": "smollm2-135m",
        "revision": None,
        "dtype": "float32",
        "tokens": {"<prefix_0>": 49152, "<memory_0>": 49153, "<reason_0>": 49154},
        "rows": {"train": 900, "validation": 100, "leaked": 0},
        "dropped": 0,
        "train_tokens": 55_215,
        "data": {},
        "train_ids": "fc2963a3",
        "best": {"checkpoint": "checkpoint-113", "by": "eval_acc on validation"},
        "metrics": spent,
    }
    write_json(folder / "manifest.json", manifest)
    losses = [{"step": step, "epoch": step / 113, "loss": 0.1 + 3 * math.exp(-step / 12)} for step in range(5, 115, 5)]
    checked = [{"step": 57, "epoch": 0.5, "eval_acc": 0.55}, {"step": 113, "epoch": 1.0, "eval_acc": 0.8}]
    write_json(folder / "trainer_state.json", {"log_history": losses + checked})
    save_evaluation(folder / "checkpoint-113" / "eval" / "atlas-train-0a1b2c3d", made, seed)
    return folder


def save_retrieval(checkpoint: Path, evaluation: str = "") -> None:
    """calibration.json and curve.json as the commands `calibrate` and `retrieve` write them. `evaluation` names the
    folder of the point at which every line is retrieved."""
    found = {"threshold": -0.0645, "j": 0.75, "false_below": 0.92, "true_below": 0.17, "n": 179, "false": 25}
    calibration = {**found, "auroc": 0.902, "task": "atlas", "split": "validation"}
    write_json(checkpoint / "calibration.json", calibration)
    rows = [("recall", None, 0.0, 0.88), ("calibrated", -0.0645, 0.31, 0.94), ("retrieve", None, 1.0, 0.95)]
    points = [
        {
            "name": name,
            "unsure_below": below,
            "retrieved": share,
            "accuracy": accuracy,
            "interval": [accuracy - 0.07, min(1.0, accuracy + 0.04)],
            "correct": round(100 * accuracy),
            "n": 100,
            "folder": f"elsewhere/{evaluation or name}",
        }
        for name, below, share, accuracy in rows
    ]
    curve = {"task": "atlas", "split": "test", "corpus": "atlas", "calibration": calibration, "points": points}
    write_json(checkpoint / "retrieve" / "atlas-test-0a1b2c3d" / "curve.json", curve)


def save_findings(evaluation: Path) -> None:
    """attention.json and probe.json as the commands `attention` and `probe` write them."""
    names = ["first token", "question", "memory block", "memory", "reason block", "reason", "answer block", "answer"]
    flow = [[round(1 / (1 + row), 3) if column <= row else None for column in range(len(names))] for row in range(8)]
    write_json(
        evaluation / "attention.json",
        {
            "segments": names,
            "flow": {"all": flow, "correct": flow, "wrong": None},
            "n": {"all": 60, "correct": 60, "wrong": 0},
            "layers": 30,
            "heads": 9,
            "pairs": [
                {
                    "from": "answer",
                    "to": "memory",
                    "headline": True,
                    "mass": {
                        "correct": [0.051, 0.048, 0.054],
                        "wrong": None,
                        "difference": None,
                        "alike": [-0.0012, -0.01, 0.007],
                    },
                },
                {"from": "reason", "to": "reason", "headline": False},
            ],
        },
    )
    share = {"share": 0.82, "wilson": [0.77, 0.86], "n": 300}
    rows = [("swap", 0.74, -0.08), ("drop", 0.7, -0.12), ("random", 0.8, -0.02), ("gold", 0.97, 0.15)]
    interventions = [
        {
            "name": name,
            "n": 300,
            "accuracy": {"share": accuracy, "wilson": [accuracy - 0.05, min(1, accuracy + 0.03)]},
            "before": share,
            "p": 0.004,
            "difference": difference,
            "interval": [difference - 0.04, difference + 0.04],
            "changed": 0.2,
        }
        for name, accuracy, difference in rows
    ]
    write_json(
        evaluation / "probe.json",
        {
            "n": 300,
            "interventions": interventions,
            "memory_reliance": {**share, "share": 0.91},
            "tag_control": {"n": 0, "share": None, "wilson": None},
            "forced": [{"kind": "memory", "against": True, **share}],
        },
    )
