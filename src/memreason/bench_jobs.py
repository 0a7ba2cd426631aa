"""The jobs that `memreason bench` compares, each in a process of its own: `python -m memreason.bench_jobs JOB SPEC`.

A job reads its settings from a JSON file and prints one JSON object as its last line. The baselines are what a careful
user gets from the public libraries with their documented options, on the same examples and the same questions.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from memreason import pipeline
from memreason.bench_encoding import measure_memory, measure_rates
from memreason.core.recipe import EvalRecipe, Recipe, load_recipe
from memreason.core.trace import Question
from memreason.data.tasks import load_eval
from memreason.encode.base import load_model, load_tokenizer
from memreason.encode.examples import collate
from memreason.encode.scheme import Codec, TokenScheme
from memreason.encode.vocab import add_rows, add_tokens
from memreason.fast.compiling import ENOUGH, pays
from memreason.fast.rows import row_layers
from memreason.finetune.checkpoint import load_checkpoint
from memreason.finetune.methods import lora_modules, network_of
from memreason.finetune.train import train
from memreason.generate.engine import generate
from memreason.publish.merge import merge

__all__ = ["JOBS", "main", "prompts"]

Spec = dict[str, Any]
Figures = dict[str, Any]


class _Clock(TrainerCallback):  # type: ignore[misc]
    """When each optimizer step ended: the first one warms up and is not counted."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        return self.ends[-1] - self.ends[0]


def _recipe(spec: Spec, folder: str, **changes: Any) -> Recipe:
    shared = {
        "output_dir": folder,
        "data.validation": 0.0,
        "train.max_steps": spec["steps"],
        "train.save_strategy": "no",
        "train.train_sampling_strategy": "sequential",
        "train.disable_tqdm": True,
        "train.logging_steps": 1,
        "train.per_device_train_batch_size": spec["batch"],
    }
    return load_recipe(spec["recipe"], {**shared, **dict(spec.get("overrides", [])), **changes})


def _trained(clock: _Clock, rows: list[Any], history: list[dict[str, Any]], spec: Spec) -> Figures:
    """Figures of a training job that took the rows in their order; its first step is left out."""
    counted = rows[spec["batch"] : spec["batch"] * spec["steps"]]
    tokens = sum(len(row["input_ids"]) for row in counted)
    return {
        "examples": len(counted),
        "tokens": tokens,
        "seconds": clock.seconds,
        "tokens_per_second": tokens / clock.seconds,
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "step_tokens": [
            sum(len(row["input_ids"]) for row in rows[n : n + spec["batch"]])
            for n in range(spec["batch"], len(rows), spec["batch"])
        ],
        "step_seconds": [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)],
        "peak_memory": pipeline.peak_memory(),
    }


def train_memreason(spec: Spec) -> Figures:
    """Ours, through the trainer that `memreason train` runs."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(spec, folder, **{"train.compile": pays(ENOUGH)})  # as in a run of usual length
        ready = pipeline.prepare(recipe)
        rows = _in_order(ready.examples.rows, spec)
        model = pipeline.trainable_model(recipe, ready.codec)
        done = train(recipe, model, ready.codec, rows, callbacks=[clock])
    parameters = sum(parameter.numel() for parameter in network_of(model).parameters())
    return {**_trained(clock, rows, done["history"], spec), "parameters": parameters}


def train_plain(spec: Spec) -> Figures:
    """A plain Trainer loop in the published shape: fp32, batch 1, accumulated, padded, logits of every position."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(spec, folder, **{"model.dtype": "fp32"})
        ready = pipeline.prepare(recipe)
        rows = _in_order(ready.examples.rows, spec)
        model = pipeline.trainable_model(recipe, ready.codec)
        for layer in row_layers(model):
            layer.__class__ = TrainableTokensLayer  # PEFT's own way of computing the rows
        trainer = Trainer(
            model=model,
            args=_arguments(folder, spec, batch=1, accumulation=spec["batch"]),
            train_dataset=rows,
            data_collator=lambda batch: {k: v for k, v in collate(batch, 0).items() if k != "shift_labels"},
            callbacks=[clock],
        )
        trainer.train()
    return _trained(clock, rows, trainer.state.log_history, spec)


def train_trl(spec: Spec) -> Figures:
    """TRL's SFTTrainer with LoRA alone (it cannot train rows on a tied head), in the precision and batch of `spec`."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(spec, folder)
        ready = pipeline.prepare(recipe)
        rows = _in_order(ready.examples.rows, spec)
        bf16 = spec["dtype"] == "bf16"
        model = load_model(recipe.model.base, dtype=spec["dtype"])
        add_rows(model, ready.codec)
        data = Dataset.from_list([{name: list(row[name]) for name in ("input_ids", "labels")} for row in rows])
        method = recipe.method
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                **_arguments(folder, spec, batch=spec["micro"], accumulation=spec["batch"] // spec["micro"]).to_dict()
                | {"bf16": bf16, "max_length": None, "gradient_checkpointing": False}
                | {"dataset_kwargs": {"skip_prepare_dataset": True}}
            ),
            train_dataset=data,
            processing_class=ready.codec.tokenizer,
            peft_config=LoraConfig(
                r=method.lora_r,
                lora_alpha=method.lora_alpha,
                lora_dropout=method.lora_dropout,
                target_modules=lora_modules(method),
                task_type="CAUSAL_LM",
            ),
            callbacks=[clock],
        )
        trainer.train()
    return _trained(clock, rows, trainer.state.log_history, spec)


def _in_order(rows: Any, spec: Spec) -> list[Any]:
    """The examples of all steps, repeated if there are too few."""
    wanted = spec["steps"] * spec["batch"]
    return [rows[n % len(rows)] for n in range(wanted)]


def _arguments(folder: str, spec: Spec, *, batch: int, accumulation: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=spec["steps"],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        remove_unused_columns=False,
    )


def _questions(spec: Spec, recipe: Recipe) -> list[Question]:
    gold = load_eval(recipe.data.task, "test", recipe.data, spec["questions"], seed=0)
    return [trace.question for trace in gold]


def prompts(codec: Codec, questions: list[Question]) -> list[list[int]]:
    """What the engine feeds for each question: its ids and the opening block."""
    return [codec.question_ids(question) + codec.opening() for question in questions]


def eval_memreason(spec: Spec) -> Figures:
    """Ours, with the checkpoint as it is."""
    loaded = load_checkpoint(spec["run"])
    questions = _questions(spec, loaded.recipe)
    settings = EvalRecipe(max_new_tokens=spec["max_new_tokens"], batch_size=spec["batch_size"])
    start = time.perf_counter()
    made = [one for batch in generate(loaded.model, loaded.codec, questions, settings) for one in batch]
    order = {question.id: n for n, question in enumerate(questions)}
    made.sort(key=lambda one: order[one.question.id])
    given = len(loaded.codec.opening())
    return _answered([one.ids[given:] for one in made], time.perf_counter() - start)


def eval_transformers(spec: Spec) -> Figures:
    """`generate` of Transformers on the merged model: batches of `batch_size` prompts of similar length."""
    loaded = load_checkpoint(spec["run"])
    asked = prompts(loaded.codec, _questions(spec, loaded.recipe))
    model = AutoModelForCausalLM.from_pretrained(
        spec["merged"], dtype=torch.bfloat16 if spec["dtype"] == "bf16" else torch.float32
    ).eval()
    eos = loaded.codec.eos_id
    answers: list[list[int]] = [[] for _ in asked]
    order = sorted(range(len(asked)), key=lambda n: -len(asked[n]))
    start = time.perf_counter()
    with torch.inference_mode():
        for first in range(0, len(order), spec["batch_size"]):
            batch = order[first : first + spec["batch_size"]]
            longest = max(len(asked[n]) for n in batch)
            ids = torch.tensor([[eos] * (longest - len(asked[n])) + asked[n] for n in batch])
            mask = torch.tensor([[0] * (longest - len(asked[n])) + [1] * len(asked[n]) for n in batch])
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=spec["max_new_tokens"],
                do_sample=False,
                eos_token_id=eos,
                pad_token_id=eos,
            )
            for n, row in zip(batch, out[:, longest:].tolist(), strict=True):
                answers[n] = row[: row.index(eos) + 1] if eos in row else row
    return _answered(answers, time.perf_counter() - start)


def _answered(ids: list[list[int]], seconds: float) -> Figures:
    tokens = sum(map(len, ids))
    return {
        "questions": len(ids),
        "tokens": tokens,
        "seconds": seconds,
        "questions_per_second": len(ids) / seconds,
        "tokens_per_second": tokens / seconds,
        "ids": ids,
        "peak_memory": pipeline.peak_memory(),
    }


def export(spec: Spec) -> Figures:
    """What the other engines need: the merged model in bf16, and the prompts as ids."""
    loaded = load_checkpoint(spec["run"])
    if not Path(spec["merged"]).exists():
        merge(spec["run"], spec["merged"], dtype="bf16")
    asked = prompts(loaded.codec, _questions(spec, loaded.recipe))
    Path(spec["prompts"]).write_text(json.dumps(asked), encoding="utf-8")
    return {"prompts": len(asked)}


def encoding(spec: Spec) -> Figures:
    """Traces to ids, streamed, against bare `encode_batch_fast` on the same texts."""
    recipe = load_recipe(spec["recipe"])
    codec = add_tokens(TokenScheme(), load_tokenizer(recipe.model.base))
    memory = measure_memory(codec, spec["traces"])
    return {**measure_rates(codec, spec["traces"]), "memory": memory}


def machine(spec: Spec) -> Figures:
    """Matrix products in GFLOP/s and memory reads in GB/s, each the best of several."""
    figures: Figures = {"threads": torch.get_num_threads()}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
        seconds = _best(lambda left=left, right=right: left @ right.T)  # type: ignore[misc]
        figures[f"gemm_{name}"] = 2 * 2048**3 / seconds / 1e9
    large = torch.randn(64 * 2**20)
    figures["read_bandwidth"] = large.nbytes / _best(large.sum) / 1e9
    return figures


def _best(work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


JOBS: dict[str, Callable[[Spec], Figures]] = {
    "train_memreason": train_memreason,
    "train_plain": train_plain,
    "train_trl": train_trl,
    "eval_memreason": eval_memreason,
    "eval_transformers": eval_transformers,
    "encoding": encoding,
    "export": export,
    "machine": machine,
}


def main() -> None:
    name, path = sys.argv[1:]
    start = time.perf_counter()
    figures = JOBS[name](json.loads(Path(path).read_text(encoding="utf-8")))
    print(json.dumps({**figures, "job_seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
