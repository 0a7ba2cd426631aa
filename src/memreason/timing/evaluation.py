"""Evaluation, timed: ours and `generate` of Transformers, on the same questions; and what other engines need."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from memreason.core.recipe import Recipe
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question
from memreason.data.tasks import load_eval
from memreason.encode.codec import Codec
from memreason.fast.memory import peak_memory
from memreason.finetune.checkpoint import load_checkpoint
from memreason.generate.engines import generate
from memreason.publish.export import write_model
from memreason.publish.merge import merge

__all__ = ["eval_memreason", "eval_transformers", "export"]

Spec = dict[str, Any]
Figures = dict[str, Any]


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
    """`generate` of Transformers on the merged model: batches of `batch_size` prompts of similar length.

    `lookup`, of one at a time: tokens drafted by prompt lookup.
    """
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
                prompt_lookup_num_tokens=spec.get("lookup"),
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
        "tokens_per_second": tokens / seconds,
        "ids": ids,
        "peak_memory": peak_memory(),
    }


def export(spec: Spec) -> Figures:
    """What the other engines need: the merged model in bf16, and the prompts as ids."""
    loaded = load_checkpoint(spec["run"])
    if not Path(spec["merged"]).exists():
        folder, whole = Path(spec["merged"]), load_checkpoint(spec["run"], dtype="fp32", quantize=None)
        write_model(folder, folder, merge(whole), whole, "bf16")
    asked = prompts(loaded.codec, _questions(spec, loaded.recipe))
    Path(spec["prompts"]).write_text(json.dumps(asked), encoding="utf-8")
    return {"prompts": len(asked)}
