"""The published argument lists of train.py and eval.py, flag by flag: one table to recipe fields."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memreason.core.errors import RecipeError
from memreason.core.kinds import CLUSTERED
from memreason.core.recipe import Recipe, load_recipe
from memreason.core.stages import training_argument_types

__all__ = ["apply_environment", "differences", "is_published", "of_evaluation", "pairs", "translate"]

DATASETS = {
    **{name: name for name in ("gsm8k", "math", "aqua", "svamp", "qa")},
    "stratgeqa_agent": "strategyqa",
    "strategyqa_agent": "strategyqa",
    "commonsenseqa_agent": "commonsenseqa",
    "truthfulqa_agent": "truthfulqa",
    "truthfulqa_agent_crossdomain": "truthfulqa",
}
STEP_TYPES: dict[str, list[str]] = {"none": [], "memory": ["reason", "memory"]}
STEP_TYPES_TOLD = {"+-*/": "arithmetic", **{name: name for name in CLUSTERED}}
METHODS = {"none": "full", **{name: name for name in ("lora", "prompt-tuning", "lora+prompt-tuning", "prefix-tuning")}}


def _bool(value: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if value.lower() not in known:
        raise ValueError(f"True or False is needed, got {value!r}")
    return known[value.lower()]


def _choice(table: dict[str, Any]) -> Callable[[str], Any]:
    def read(value: str) -> Any:
        if value not in table:
            raise ValueError(f"one of {', '.join(table)} is needed, got {value!r}")
        return table[value]

    return read


def _step_type(value: str) -> str:
    if value not in STEP_TYPES | STEP_TYPES_TOLD:
        known = ", ".join(STEP_TYPES | STEP_TYPES_TOLD)
        raise ValueError(f"{value!r} does nothing in the published code; use one of {known}")
    return value


def _told(overrides: dict[str, Any]) -> None:
    """Where the kinds come from: the traces, and then which they are, or a rule or clusters, which name their own."""
    named = overrides.pop("data.step_types", None)
    if named in STEP_TYPES:
        overrides["tokens.kinds"] = STEP_TYPES[named]
    elif named:
        overrides.pop("tokens.kinds", None)
        larger = named == "+-*/" and overrides.get("data.task") in ("math", "aqua")
        overrides["data.step_types"] = "arithmetic-14" if larger else STEP_TYPES_TOLD[named]


def _if(result: Any) -> Callable[[str], Any]:
    return lambda value: result if _bool(value) else None


# flag -> (recipe field, how its value is read). None as a value leaves the recipe's default; "" as a
# field is a flag without an effect here (its reason stands behind it).
FLAGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "dataset": ("data.task", _choice(DATASETS)),
    "model_name_or_path": ("model.base", str),
    "hf_hub_token": ("env.HF_TOKEN", str),
    "add_soft_prompts": ("tokens.add", _bool),
    "add_hard_prompts": ("tokens.words", _if("Plan: {kind}.")),
    "parameter_efficient_mode": ("method.name", _choice(METHODS)),
    "num_general_prefix_tokens": ("tokens.n_prefix", int),
    "num_special_prefix_tokens": ("tokens.n_special", int),
    "extract_step_type_tokens": ("data.step_types", _step_type),
    "num_plan_types": ("data.n_types", int),
    "embedding_model_name": ("data.embedding_model", str),
    "only_at_front": ("tokens.placement", _if("only_at_front")),
    "plan_first": ("tokens.placement", _if("plan_first")),
    "plan_only": ("tokens.placement", _if("plan_only")),
    "use_sparse_attention": ("tokens.sparse_attention", _bool),
    "use_calculator": ("eval.calculator", _bool),
    "use_demonstrations": ("", _bool),  # without it those of SHOWN do not count
    "k_shot": ("data.k_shot", int),
    "demo_selection": ("data.demo_selection", _choice({name: name for name in ("uniform", "similar", "prompt")})),
    "candidate_size": ("data.candidate_size", int),
    "decoding_scheme": ("eval.decoding", _choice({"greedy": "greedy", "model-default": "model-default"})),
    "prompt_template": ("tokens.template", _choice({"none": "plain", "alpaca": "alpaca"})),
    "mode": ("train.mode", _choice({"supervised": "supervised", "constant_len": "constant_len"})),
    "lora_module": ("method.lora_module", _choice({"mlp": "mlp", "atten": "atten"})),
    "int8_training": ("model.quantize", _if("8bit")),
    "load_in_8bit": ("model.quantize", _if("8bit")),
    "load_in_16fp": ("model.dtype", _if("fp16")),
    "load_in_32fp": ("model.dtype", _if("fp32")),
    "enable_cpu_offload": ("model.offload", _bool),
    "random_initialize": ("model.random_initialize", _bool),
    "model_max_length": ("train.model_max_length", int),
    "num_test": ("eval.n", int),
    "batch_size": ("eval.batch_size", int),
    "max_length": ("eval.max_length", int),
    "output_dir": ("output_dir", str),
    "seed": ("seed", int),
    "save_result": ("", _bool),  # results are always saved
    "cache_dir": ("env.HF_HUB_CACHE", str),
    "resume": ("", _bool),  # a run always resumes; of a checkpoint named as model see _resumed
    "selection_method": ("data.step_types", _step_type),  # this and the next four are of the step-type script
    "num_types": ("data.n_types", int),
    "train_epoch": ("data.type_epochs", int),
    "min_frequency": ("data.min_frequency", str),
    "max_frequency": ("data.max_frequency", str),
    "evaluation_strategy": ("train.eval_strategy", str),
}
# What the published defaults are where ours differ (REFERENCE.md's "values, default").
PUBLISHED_DEFAULTS = {
    "tokens.n_prefix": 3,
    "tokens.n_special": 3,
    "tokens.add": False,
    "tokens.kinds": [],
    "method.name": "full",
    "method.lora_module": "mlp",
    "train.select_on": "test",
    "train.lr_scheduler_type": "linear",
    "train.learning_rate": 5e-5,
    "train.num_train_epochs": 3,
    "train.per_device_train_batch_size": 8,
    "train.warmup_steps": 0,
    "data.validation": 0.0,
}
SHOWN = {"data.k_shot": 4, "data.demo_selection": "uniform", "data.candidate_size": 100}  # and their defaults
MARKS = ("dataset", "model_name_or_path")


def is_published(arguments: Sequence[str]) -> bool:
    """Whether an argument list is of the published kind: it names its model or data set by their flags."""
    return any(argument.split("=")[0] == f"--{mark}" for argument in arguments for mark in MARKS)


def pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """[--a, 1, --b=2, --c] -> [(a, 1), (b, 2), (c, True)]. Raises RecipeError for a bare word."""
    found: list[tuple[str, str]] = []
    rest = [argument for argument in arguments if argument.strip()]
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise RecipeError(f"{flag!r}: a flag such as --train.learning_rate is needed here", "command line")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "True"
        found.append((name, value))
    return found


def translate(arguments: Sequence[str], *, train: bool) -> tuple[list[tuple[str, Any]], dict[str, str]]:
    """Published flags to (recipe overrides, environment variables); every mistake at once.

    Raises RecipeError with a sentence for each flag that is unknown, wrong, or comes later.
    """
    overrides: dict[str, Any] = dict(PUBLISHED_DEFAULTS) if train else {}
    environment: dict[str, str] = {}
    problems: list[str] = []
    for name, value in pairs(arguments):
        if name == "base_model_name_or_path" and not train:
            continue
        if name not in FLAGS and name not in training_argument_types():
            problems.append(f"--{name}: no such flag, neither a published one nor of TrainingArguments")
            continue
        field, read = FLAGS.get(name, (f"train.{name}", str))
        try:
            result = read(value)
        except ValueError as error:
            problems.append(f"--{name}: {error}")
            continue
        if field.startswith("env."):
            environment[field[4:]] = str(result)
        elif field and result is not None:
            overrides[field] = result
    _told(overrides)
    overrides = _shown(dict(pairs(arguments)).get("use_demonstrations", "false"), overrides)
    if train and "eval.n" in overrides:
        overrides["train.n_select"] = overrides["eval.n"]
    if problems:
        raise RecipeError(problems, "command line")
    if train and dict(pairs(arguments)).get("resume", "false").lower() in ("true", "1", "yes"):
        overrides |= _resumed(Path(str(overrides["model.base"])))
    return list(overrides.items()), environment


def _shown(used: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Demonstrations count with `--use_demonstrations` alone, and then have defaults of their own."""
    if used.lower() in ("true", "1", "yes"):
        return SHOWN | overrides
    return {key: value for key, value in overrides.items() if key not in SHOWN}


def _resumed(checkpoint: Path) -> dict[str, Any]:
    """`--resume` names a checkpoint as its model: its run goes on, over that run's base model."""
    path = checkpoint / "recipe.yaml"
    if not path.is_file():
        raise RecipeError(f"--resume: {checkpoint} is no checkpoint; name one as --model_name_or_path", "command line")
    return {"model.base": load_recipe(path).model.base, "output_dir": str(checkpoint.parent)}


def apply_environment(environment: dict[str, str]) -> None:
    """Tokens go to the environment of this process only; never to a file."""
    os.environ.update(
        {name: str(Path(v).resolve()) if name == "HF_HUB_CACHE" else v for name, v in environment.items()}
    )


# What a published eval list repeats of the training is read from the checkpoint; these are the evaluation's own.
EVAL_FIELDS = {"data.task": "eval.task", "seed": "eval.seed"}
MODEL_FIELDS = ("quantize", "dtype", "offload")


def of_evaluation(values: Mapping[str, Any], *, published: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Overrides parted into (eval.* fields, changes of how the model is loaded).

    Raises RecipeError for another field, except in a published list, which repeats those of the training.
    """
    named = {EVAL_FIELDS.get(key, key) if published else key: value for key, value in values.items()}
    changes = {name: named.pop(f"model.{name}") for name in MODEL_FIELDS if f"model.{name}" in named}
    fields = {key: value for key, value in named.items() if key.startswith("eval.")}
    outside = [] if published else [key for key in named if key not in fields]
    if outside:
        allowed = "eval.* and " + ", ".join(f"model.{name}" for name in MODEL_FIELDS)
        raise RecipeError([f"--{key}: only {allowed} can be changed here" for key in outside], "eval")
    return fields, changes


def differences(overrides: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """What an eval list says of the training otherwise than the checkpoint's recipe, which is what counts."""
    trained = {
        f"{stage}.{field}": value
        for stage, fields in recipe.model_dump().items()
        if stage in ("tokens", "method")
        for field, value in fields.items()
    }
    trained |= {key: getattr(recipe.data, key.removeprefix("data.")) for key in SHOWN}
    return [
        f"{key} {value!r} is not what the checkpoint was trained with; {trained[key]!r} counts"
        for key, value in overrides.items()
        if key in trained and trained[key] != value
    ]
