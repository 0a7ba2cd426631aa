"""Where blocks stand, and words in their place: rendering, parsing, training, looking inside."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import byte_level, save_base, tiny_recipe
from memreason import pipeline
from memreason.core.errors import RecipeError
from memreason.core.recipe import load_recipe
from memreason.core.trace import Question, Step, Trace
from memreason.encode.codec import Codec
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_tokens
from memreason.finetune.checkpoint import load_checkpoint
from memreason.generate.choose import drafts_of
from memreason.generate.onward import begun_ids
from memreason.measure.segments import segments
from memreason.published import translate

TRACE = Trace(
    Question("Is Lima in Europe?", "False"),
    (
        Step(("memory",), "Lima lies in South America."),
        Step((), "a line of no kind"),
        Step(("memory", "reason"), "South America is not Europe."),
    ),
)
PLANS = {
    placement: TokenScheme(n_prefix=2, n_special=3, placement=placement) for placement in ("plan_first", "plan_only")
}


def bound(scheme: TokenScheme) -> Codec:
    return add_tokens(scheme, byte_level())


@pytest.mark.parametrize("separator", ["", " "])
def test_a_plan_stands_before_its_lines_and_is_read_back(separator: str) -> None:
    codec = bound(replace(PLANS["plan_first"], block_separator=separator))
    ids = codec.render(TRACE)
    planning = [i in codec.places for i in ids]
    last = max(n for n, is_block in enumerate(planning) if is_block)
    assert all(is_block or i in codec.separator for i, is_block in zip(ids[:last], planning[:last], strict=True))
    names = [codec.places[i][0] for i in ids[: last + 1] if i in codec.places and codec.places[i][1] == 0]
    assert names == ["prefix", "memory", "prefix", "assignment", "prefix", "memory", "reason", "prefix", "answer"]
    made = codec.parse(TRACE.question, ids)
    assert (made.steps, made.prediction, made.faults) == (TRACE.steps, "False", ())
    for step, (start, end) in zip(made.steps, made.meta["spans"], strict=True):
        assert codec.decode(ids[start:end]).strip() == step.text


def test_a_plan_alone_keeps_kinds_and_the_answer() -> None:
    codec = bound(PLANS["plan_only"])
    ids = codec.render(TRACE)
    assert codec.decode([i for i in ids if i not in codec.places]) == " The answer is: False"
    made = codec.parse(TRACE.question, ids)
    assert [step.kinds for step in made.steps] == [step.kinds for step in TRACE.steps]
    assert ([step.text for step in made.steps], made.prediction, made.faults) == (["", "", ""], "False", ())
    assert [len(ids[start:end]) for start, end in made.meta["spans"]] == [5, 5, 8]


def test_what_does_not_follow_the_plan_is_named() -> None:
    codec = bound(PLANS["plan_first"])
    ids = codec.render(TRACE)
    question, shorter = TRACE.question, codec.render(replace(TRACE, steps=TRACE.steps[:2]))
    plan, lines = ids[:23], ids[23:]  # 3 x (2 + 3) + 3 for the second kind + 5 for the answer
    assert codec.parse(question, [*plan, *lines]).faults == ()
    assert codec.parse(question, [*plan, *shorter[15:]]).faults == ("plan of another length",)
    assert "broken block" in codec.parse(question, [*plan[:4], *plan[5:], *lines]).faults
    assert "plan without an end" in codec.parse(question, [*plan[:18], *lines]).faults
    assert "block behind the plan" in codec.parse(question, [*plan, *lines[:10], plan[0], *lines[10:]]).faults
    assert "plan without an end" in codec.parse(question, lines).faults


@pytest.mark.parametrize("placement", PLANS)
def test_parsing_a_plan_never_raises(placement: str) -> None:
    codec = bound(PLANS[placement])
    generator, whole = torch.Generator().manual_seed(0), codec.render(TRACE)
    planning = torch.tensor(sorted(codec.places))
    for n in range(400):
        ids = list(whole)
        for _ in range(1 + n % 5):
            position = int(torch.randint(len(ids), (), generator=generator))
            drawn = torch.randint(len(planning), (n % 3,), generator=generator)
            ids[position : position + 1] = planning[drawn].tolist()
        made = codec.parse(TRACE.question, ids)
        assert len(made.meta["spans"]) == len(made.steps)
        segments(codec, TRACE.question, ids)


def test_words_name_the_kinds_of_lines() -> None:
    codec = bound(TokenScheme(n_prefix=0, n_special=0, words="{kind}:"))
    ids = codec.render(TRACE)
    assert codec.decode(ids[:-1]) == (
        "Memory: Lima lies in South America.\n a line of no kind\n"
        "Memory and reason: South America is not Europe.\n The answer is: False"
    )
    made = codec.parse(TRACE.question, ids)
    assert (made.steps, made.prediction, made.faults) == (TRACE.steps, "False", ())
    sums = bound(TokenScheme(n_prefix=0, n_special=0, kinds=("+", "*"), words="Plan: {kind}."))
    added = Trace(Question("2 * 3 + 4?", "10"), (Step(("*", "+"), "2*3+4=10"),))
    assert sums.decode(sums.render(added)).startswith("Plan: multiplication and addition. 2*3+4=10\n")
    assert sums.parse(added.question, sums.render(added)).steps == added.steps


def test_drafts_are_what_follows() -> None:
    phrase = bound(TokenScheme()).encode(" The answer is:")
    follows = {name: drafts_of(bound(scheme)) for name, scheme in (("each_step", TokenScheme()), *PLANS.items())}
    for name, drafts in follows.items():
        assert any(draft[-len(phrase) :] == phrase for draft in drafts.values()) == (name != "plan_first")


def test_a_recipe_says_what_goes_together() -> None:
    with pytest.raises(RecipeError, match=r"plan_only needs tokens of both sorts"):
        load_recipe(None, [("tokens.placement", "plan_only"), ("tokens.n_prefix", 0)])
    with pytest.raises(RecipeError, match=r"\{kind\} must stand in it"):
        load_recipe(None, [("tokens.words", "Memory:")])
    hard, _ = translate(["--dataset", "gsm8k", "--add_hard_prompts", "True"], train=True)
    assert ("tokens.words", "Plan: {kind}.") in hard
    first, _ = translate(["--dataset", "gsm8k", "--plan_first", "True"], train=True)
    assert ("tokens.placement", "plan_first") in first


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens.placement": "plan_first"},
        {"tokens.placement": "plan_only"},
        {"tokens.words": "{kind}:", "method.name": "lora"},
    ],
    ids=["plan_first", "plan_only", "words"],
)
def test_each_trains_evaluates_and_is_read_again(tmp_path: Path, changes: dict[str, str]) -> None:
    recipe = tiny_recipe(tmp_path, save_base(tmp_path / "base"), **changes, **{"train.max_steps": 60})
    run = pipeline.train(recipe)
    loaded = load_checkpoint(run)
    asked = recipe.eval.model_copy(update={"task": recipe.data.paths[0], "n": 6, "max_new_tokens": 150})
    found = pipeline.evaluate(run, settings=asked, checkpoint=loaded)
    assert found["well_formed"] == 1.0
    assert loaded.codec.scheme.words == changes.get("tokens.words", "")
    if "tokens.placement" in changes:
        with pytest.raises(Exception, match="lines can be given only"):
            begun_ids(loaded.codec, TRACE)
