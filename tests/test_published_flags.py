"""Every flag of the published argument lists, with every value that does something there, gives a recipe here."""

from __future__ import annotations

import pytest

from memreason.core.errors import RecipeError
from memreason.core.recipe import load_recipe
from memreason.published import FLAGS, translate

SWITCH = ("True", "False")
VALUES: dict[str, tuple[str, ...]] = {
    "dataset": (
        "gsm8k", "math", "aqua", "svamp", "qa", "stratgeqa_agent", "strategyqa_agent", "commonsenseqa_agent",
        "truthfulqa_agent", "truthfulqa_agent_crossdomain",
    ),
    "model_name_or_path": ("some/model",),
    "hf_hub_token": ("hf_x",),
    "add_soft_prompts": SWITCH,
    "add_hard_prompts": SWITCH,
    "parameter_efficient_mode": ("none", "lora", "prompt-tuning", "lora+prompt-tuning", "prefix-tuning"),
    "num_general_prefix_tokens": ("3",),
    "num_special_prefix_tokens": ("3",),
    "extract_step_type_tokens": (
        "none", "+-*/", "vae", "vae-next-step", "vae-contrastive", "tf-idf", "k-means", "balanced-k-means", "memory",
    ),
    "selection_method": ("+-*/", "vae", "tf-idf", "k-means"),
    "num_plan_types": ("5",),
    "num_types": ("5",),
    "train_epoch": ("10",),
    "min_frequency": ("2", "0.01"),
    "max_frequency": ("0.9",),
    "embedding_model_name": ("some/model",),
    "only_at_front": SWITCH,
    "plan_first": SWITCH,
    "plan_only": SWITCH,
    "use_sparse_attention": SWITCH,
    "use_calculator": SWITCH,
    "use_demonstrations": SWITCH,
    "k_shot": ("4",),
    "demo_selection": ("uniform", "similar", "prompt"),
    "candidate_size": ("100",),
    "decoding_scheme": ("greedy", "model-default"),
    "prompt_template": ("none", "alpaca"),
    "mode": ("supervised", "constant_len"),
    "lora_module": ("mlp", "atten"),
    "int8_training": SWITCH,
    "load_in_8bit": SWITCH,
    "load_in_16fp": SWITCH,
    "load_in_32fp": SWITCH,
    "enable_cpu_offload": SWITCH,
    "random_initialize": SWITCH,
    "model_max_length": ("700",),
    "num_test": ("100",),
    "batch_size": ("16",),
    "max_length": ("850",),
    "output_dir": ("somewhere",),
    "seed": ("300",),
    "save_result": SWITCH,
    "cache_dir": ("cache",),
    "resume": ("False",),  # with True it names a checkpoint: tests/test_recipe.py
    "evaluation_strategy": ("epoch",),
}  # fmt: skip
# What a flag needs beside it to make sense.
WITH = {
    "plan_first": ["--extract_step_type_tokens", "memory"],
    "plan_only": ["--extract_step_type_tokens", "memory"],
    "use_sparse_attention": ["--extract_step_type_tokens", "memory"],
}
SOFT = [
    "--model_name_or_path",
    "m",
    "--dataset",
    "gsm8k",
    "--add_soft_prompts",
    "True",
    "--parameter_efficient_mode",
    "lora",
]


def test_the_table_is_whole() -> None:
    assert set(VALUES) == set(FLAGS)


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in VALUES.items() for value in values])
def test_every_flag_gives_a_recipe(flag: str, value: str) -> None:
    arguments = [*SOFT, *WITH.get(flag, ()), f"--{flag}", value]
    overrides, environment = translate(arguments, train=True)
    recipe = load_recipe(None, overrides)
    assert recipe.model_dump() and set(environment) <= {"HF_TOKEN", "HF_HUB_CACHE"}
    assert load_recipe(None, [pair for pair in translate(arguments, train=False)[0] if pair[0].startswith("eval.")])


@pytest.mark.parametrize(
    ("flag", "value", "field", "expected"),
    [
        ("use_sparse_attention", "True", "tokens.sparse_attention", True),
        ("extract_step_type_tokens", "vae", "data.step_types", "vae"),
        ("num_plan_types", "7", "data.n_types", 7),
        ("mode", "constant_len", "train.mode", "constant_len"),
        ("use_calculator", "True", "eval.calculator", True),
        ("prompt_template", "alpaca", "tokens.template", "alpaca"),
    ],
)
def test_flags_of_the_family_reach_their_field(flag: str, value: str, field: str, expected: object) -> None:
    recipe = load_recipe(None, translate([*SOFT, *WITH.get(flag, ()), f"--{flag}", value], train=True)[0])
    stage, name = field.split(".")
    assert getattr(getattr(recipe, stage), name) == expected


def test_demonstrations_are_on_only_if_they_are_asked_for() -> None:
    shots = ["--k_shot", "3", "--demo_selection", "similar", "--candidate_size", "50"]
    on = load_recipe(None, translate([*SOFT, "--use_demonstrations", "True", *shots], train=True)[0]).data
    assert (on.k_shot, on.demo_selection, on.candidate_size) == (3, "similar", 50)
    assert load_recipe(None, translate([*SOFT, *shots], train=True)[0]).data.k_shot == 0
    assert load_recipe(None, translate([*SOFT, "--use_demonstrations", "True"], train=True)[0]).data.k_shot == 4


@pytest.mark.parametrize("value", ["mlp", "other"])
def test_what_does_nothing_there_is_refused(value: str) -> None:
    with pytest.raises(RecipeError, match="does nothing in the published code"):
        translate([*SOFT, "--extract_step_type_tokens", value], train=True)
