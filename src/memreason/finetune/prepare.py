"""What stands before training: traces, tokenizer, examples and model of a recipe."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from memreason.core.errors import RecipeError
from memreason.core.recipe import Recipe
from memreason.data.tasks import TASKS, Splits, load_splits
from memreason.encode.base import identity, load_model, load_tokenizer
from memreason.encode.chat import in_chat
from memreason.encode.codec import Codec
from memreason.encode.demonstrations import Demonstrations, choose_demonstrations
from memreason.encode.examples import Examples, Rows, encode_traces, pack_stream
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_rows, add_tokens
from memreason.finetune.demonstrate import by_loss
from memreason.finetune.methods import trainable
from memreason.finetune.step_types import with_step_types

__all__ = ["Prepared", "pinned", "prepare", "scheme_of", "trainable_model"]

log = logging.getLogger("memreason")
ALPACA = (
    "Below is a question. Write a response that answers it.\n\n### Instruction:\n{question}{choices}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Prepared:
    """What stands before training: traces, the tokenizer with its planning tokens, and the examples of both."""

    splits: Splits
    codec: Codec
    examples: Examples


def prepare(
    recipe: Recipe,
    *,
    warn: Callable[[str], None] = log.warning,
    run: Path | None = None,
    demonstrations: Demonstrations | None = None,
) -> Prepared:
    """Data, tokenizer and examples of a recipe; `warn` is told what was left out. In a `run` folder fitted step types
    are kept.

    `demonstrations` are those of a run that is gone on with: they were chosen when it began.
    """
    trained, settings, scheme = recipe.method.name != "prompting", recipe.model, scheme_of(recipe)
    splits = load_splits(recipe.data, warn=warn) if trained or recipe.data.k_shot else Splits([], [], [])
    if trained:
        splits = with_step_types(recipe, splits, scheme, run, warn)
    tokenizer = load_tokenizer(settings.base, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    if recipe.tokens.template == "chat":
        scheme = in_chat(scheme, tokenizer, settings.base)
        scheme = replace(scheme, question_template=_instructed(scheme.question_template, recipe))
    ranking = partial(by_loss, recipe, scheme, tokenizer)
    shown = demonstrations or choose_demonstrations(splits.train, recipe.data, recipe.seed, ranking)
    codec = add_tokens(scheme, tokenizer, shown)
    if not trained:
        return Prepared(splits, codec, Examples(Rows.none()))
    examples = _examples(recipe, codec, splits)
    if examples.dropped or examples.cut:
        warn(f"{examples.dropped} traces dropped, {examples.cut} cut: over {recipe.train.model_max_length} tokens")
    return Prepared(splits, codec, examples)


def _examples(recipe: Recipe, codec: Codec, splits: Splits) -> Examples:
    length = recipe.train.model_max_length
    if recipe.train.mode == "constant_len":  # the stream is cut, whatever its examples' lengths
        return Examples(pack_stream(encode_traces(codec, splits.train, sys.maxsize).rows, length, codec.parting))
    return encode_traces(codec, splits.train, length, cut=recipe.train.cut)


def pinned(recipe: Recipe, known: dict[str, Any]) -> Recipe:
    """The recipe with the commit or the fingerprint of its base model, as its checkpoints keep it.

    `known` is the manifest of a run that is gone on with, whose base must stay what it was. A fingerprint that the
    recipe names already is the one that is wanted.
    """
    model = recipe.model
    found = known if known.get("base") == model.base else identity(model.base, model.revision)
    update = {"revision": found["revision"], "fingerprint": model.fingerprint or found.get("fingerprint")}
    return recipe.model_copy(update={"model": model.model_copy(update=update)})


def scheme_of(recipe: Recipe) -> TokenScheme:
    """The token scheme that a recipe asks for, with its task's way of printing questions."""
    tokens, task = recipe.tokens, TASKS.get(recipe.data.task, TASKS["atlas"])
    blocks = tokens.add and not tokens.words
    return TokenScheme(
        n_prefix=tokens.n_prefix if blocks else 0,
        n_special=tokens.n_special if blocks and tokens.kinds else 0,
        kinds=tuple(tokens.kinds),
        placement=tokens.placement,
        question_template=_instructed(ALPACA if tokens.template == "alpaca" else task.question_template, recipe),
        choice_template=task.choice_template,
        words=tokens.words,
        noise_seed=recipe.seed,
        free=recipe.method.name == "prompting",
        sparse_attention=tokens.sparse_attention,
    )


def _instructed(template: str, recipe: Recipe) -> str:
    """The instruction stands on a line of its own behind the question and its choices."""
    told = recipe.tokens.instruction
    if "{" in told:
        raise RecipeError(f"tokens.instruction: braces are the template's, got {told!r}", "recipe")
    return template.replace("{choices}", "{choices}\n" + told) if told else template


def trainable_model(recipe: Recipe, codec: Codec) -> Any:
    """The base model with its new rows, ready to be trained by the recipe's method."""
    model = load_model(**recipe.model.model_dump(), seed=recipe.seed)
    add_rows(model, codec)
    checkpointing = bool((recipe.train.model_extra or {}).get("gradient_checkpointing"))
    return trainable(model, codec, recipe.method, checkpointing=checkpointing)
