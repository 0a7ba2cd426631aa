"""Recipes: every shipped one is parsed; mistakes come all at once; the published lists translate."""

import pytest

from memreason.cli import main
from memreason.core.errors import RecipeError
from memreason.core.kinds import CLUSTERED
from memreason.core.recipe import load_recipe, shipped
from memreason.published import differences, translate

TRAIN = (
    "--model_name_or_path M --add_soft_prompts True --hf_hub_token TOKEN --num_general_prefix_tokens 2 "
    "--num_special_prefix_tokens 4 --parameter_efficient_mode lora+prompt-tuning --dataset "
    "stratgeqa_agent --load_in_16fp False --output_dir OUT --model_max_length 700 --num_train_epochs 10 "
    "--per_device_train_batch_size 1 --per_device_eval_batch_size 1 --evaluation_strategy epoch "
    "--save_strategy epoch --save_total_limit 200 --learning_rate 2e-4 --weight_decay 0. --warmup_steps "
    "700 --lr_scheduler_type cosine --logging_steps 1 --optim adamw_torch --gradient_accumulation_steps "
    "16 --embedding_model_name M --extract_step_type_tokens memory --num_plan_types 5 --num_test 200 "
    "--lora_module mlp --int8_training True"
)


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_parse(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert load_recipe(None, {f"train.{k}": v for k, v in recipe.train.model_dump().items()}).train == recipe.train


def test_published_train_list() -> None:
    words = ["your token" if word == "TOKEN" else word for word in TRAIN.split()]
    overrides, environment = translate(words, train=True)
    recipe = load_recipe(None, overrides)
    assert environment == {"HF_TOKEN": "your token"}
    assert "your token" not in recipe.to_yaml()
    assert (recipe.data.task, recipe.model.base, recipe.model.quantize) == ("strategyqa", "M", "8bit")
    assert (recipe.tokens.n_prefix, recipe.tokens.n_special, recipe.method.lora_module) == (2, 4, "mlp")
    assert recipe.train.model_extra is not None
    assert recipe.train.model_extra["warmup_steps"] == 700
    assert recipe.train.model_extra["eval_strategy"] == "epoch"
    assert (recipe.train.select_on, recipe.eval.n) == ("test", 200)


def test_every_mistake_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(
            None, {"train.learnig_rate": "1", "tokens.n_prefix": "-1", "data.tsk": "x", "train.warmup_steps": "x"}
        )
    text = str(caught.value)
    assert all(part in text for part in ("learnig_rate", "n_prefix", "data.tsk", "warmup_steps"))
    assert len(caught.value.problems) == 4


def test_every_wrong_flag_is_told() -> None:
    with pytest.raises(RecipeError) as caught:
        translate(
            ["--dataset", "x", "--extract_step_type_tokens", "mlp", "--num_types", "many", "--nonsense"],
            train=True,
        )
    assert len(caught.value.problems) == 4
    assert "does nothing in the published code" in str(caught.value)


def test_an_eval_list_that_contradicts_its_checkpoint_is_told() -> None:
    words = ["--dataset", "stratgeqa_agent", "--parameter_efficient_mode", "lora", "--add_soft_prompts", "True"]
    overrides, _ = translate(words, train=False)
    (line,) = differences(dict(overrides), load_recipe("demo"))
    assert line == "method.name 'lora' is not what the checkpoint was trained with; 'lora+prompt-tuning' counts"


@pytest.mark.parametrize(
    ("value", "kinds", "step_types"),
    [
        ("none", [], "labelled"),
        ("memory", ["reason", "memory"], "labelled"),
        ("+-*/", ["+", "-", "*", "/"], "arithmetic"),
        *((name, [f"type_{n}" for n in range(5)], name) for name in CLUSTERED),
    ],
)
def test_published_step_types(value: str, kinds: list[str], step_types: str) -> None:
    overrides, _ = translate(["--dataset", "gsm8k", "--extract_step_type_tokens", value], train=True)
    recipe = load_recipe(None, overrides)
    assert (recipe.tokens.kinds, recipe.data.step_types, recipe.data.task) == (kinds, step_types, "gsm8k")


def test_resume_names_a_checkpoint_as_its_model(tmp_path) -> None:
    words = ["--dataset", "gsm8k", "--resume", "True", "--model_name_or_path", str(tmp_path / "run" / "checkpoint-3")]
    with pytest.raises(RecipeError, match="is no checkpoint"):
        translate(words, train=True)
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-3" / "recipe.yaml").write_text("model: {base: some/model}\n")
    overrides = dict(translate(words, train=True)[0])
    assert (overrides["model.base"], overrides["output_dir"]) == ("some/model", str(tmp_path / "run"))


def test_flags_of_the_step_type_script() -> None:
    words = "--dataset gsm8k --selection_method vae --num_types 7 --train_epoch 3 --min_frequency 2 --max_frequency 0.5"
    data = load_recipe(None, translate(words.split(), train=True)[0]).data
    assert (data.step_types, data.n_types, data.type_epochs) == ("vae", 7, 3)
    assert (data.min_frequency, data.max_frequency) == (2, 0.5)


@pytest.mark.parametrize("value", ["mlp", "other"])
def test_step_types_that_do_nothing_are_refused(value: str) -> None:
    with pytest.raises(RecipeError, match=f"'{value}' does nothing in the published code; use one of none, memory"):
        translate(["--dataset", "gsm8k", "--extract_step_type_tokens", value], train=True)


def test_kinds_that_contradict_the_step_types_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"tokens.kinds: data.step_types k-means gives type_0, type_1; leave"):
        load_recipe(None, {"data.step_types": "k-means", "data.n_types": 2, "tokens.kinds": ["memory"]})


def test_overrides_and_print(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["train", "demo", "--train.learning_rate", "1e-3", "--train.save_strategy", "no", "--print-recipe"]) == 0
    )
    printed = capsys.readouterr().out
    assert "learning_rate: 0.001" in printed
    assert "save_strategy: 'no'" in printed


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "nowhere.yaml"], "no such file"),
        (["eval"], "a run or checkpoint is needed"),
        (["eval", "nowhere"], "no such run or checkpoint"),
        (["data", "import", "x.json", "--task", "nonsense"], "unknown task"),
        (["models", "pull", "nonsense"], "not a built-in model"),
        (["ask", "nowhere", "q?", "--odd"], "unrecognized arguments: --odd"),
    ],
)
def test_clear_errors(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
