"""The blocks and texts of a published checkpoint: its prompt_text.json becomes a token scheme."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from memreason.core.errors import CheckpointError
from memreason.core.files import read_json
from memreason.core.trace import ASSIGNMENT, MEMORY, Question, Step, Trace
from memreason.data.tasks import TASKS
from memreason.encode.codec import Codec
from memreason.encode.scheme import ANSWER, PREFIX, TokenScheme
from memreason.encode.vocab import add_tokens

__all__ = ["PROMPT_TEXT", "Blocks", "bind", "read_blocks"]

PROMPT_TEXT = "prompt_text.json"
RENAMED = {"rag": MEMORY}
QUESTION = "Question: {question}{choices}\n "
QUESTIONS = {"commonsenseqa": "Question: {question} Options:{choices} \n "}


@dataclass(frozen=True)
class Blocks:
    """Kind -> its text, in the order of the rows, and the text before each planning token: a space, or nothing."""

    texts: Mapping[str, str]
    space: str

    @property
    def tokens(self) -> list[str]:
        return [f"<{kind}_{i}>" for kind, count in self.counts.items() for i in range(count)]

    @property
    def counts(self) -> dict[str, int]:
        return {kind: text.count(">") for kind, text in self.texts.items()}

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(RENAMED.get(kind, kind) for kind in self.texts if kind not in (PREFIX, ANSWER, ASSIGNMENT))

    def order(self, scheme: TokenScheme) -> list[int]:
        """For each token of our scheme, its row."""
        ours = {RENAMED.get(kind, kind): kind for kind in self.texts}
        names = [f"<{ours[name]}_{i}>" for name, block in scheme.blocks.items() for i in range(len(block))]
        return [self.tokens.index(name) for name in names]

    def write(self, trace: Trace, question: str) -> str:
        """A trace as the published code writes it, before a tokenizer reads it."""
        lines = [(*(step.kinds or (ASSIGNMENT,)), step.text) for step in trace.steps]
        lines.append((ANSWER, f"The answer is: {trace.answer}"))
        named = {RENAMED.get(kind, kind): text for kind, text in self.texts.items()}
        return question + "".join(
            named[PREFIX] + "".join(named[kind] for kind in kinds) + f" {text}\n" for *kinds, text in lines
        )


def read_blocks(folder: Path) -> Blocks:
    """Read prompt_text.json, which lies beside the checkpoints of a run (or in the folder itself).

    Raises CheckpointError if it is missing or does not name planning tokens block by block.
    """
    places = (folder.resolve().parent / PROMPT_TEXT, folder / PROMPT_TEXT)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise CheckpointError(
            f"{places[0]}: no such file; it tells which planning tokens {folder.name} was trained with"
        )
    texts = read_json(path)
    if not isinstance(texts, dict) or not texts or not all(isinstance(text, str) for text in texts.values()):
        raise CheckpointError(f"{path}: an object is needed: kind -> its planning tokens")
    space = " " if any(text.startswith(" ") for text in texts.values()) else ""
    blocks = Blocks(texts, space)
    for kind, count in blocks.counts.items():
        if texts[kind] != "".join(f"{space}<{kind}_{i}>" for i in range(count)):
            raise CheckpointError(f"{path}: {kind} must be a row of <{kind}_0> <{kind}_1> …, got {texts[kind]!r}")
    special = {count for kind, count in blocks.counts.items() if kind != PREFIX}
    lacking = {PREFIX, *((ANSWER, ASSIGNMENT) if special else ())} - set(texts)
    if lacking or len(special) > 1 or 0 in special or len(set(blocks.kinds)) < len(blocks.kinds) or not blocks.tokens:
        raise CheckpointError(
            f"{path}: prefix, answer, assignment and kinds of equal length are needed, got "
            + ", ".join(f"{kind} ({count})" for kind, count in blocks.counts.items())
        )
    return blocks


def bind(
    blocks: Blocks, tokenizer: PreTrainedTokenizerBase, task: str, *, warn: Callable[[str], None]
) -> tuple[Codec, list[int]]:
    """The codec of a published checkpoint (the tokenizer gets its tokens), and for each of its tokens the row.

    Of the ways to splice ids, that one counts which gives what the tokenizer itself makes of the published text.
    """
    published = copy.deepcopy(tokenizer)
    published.add_tokens(blocks.tokens)
    candidates = [add_tokens(scheme, copy.deepcopy(tokenizer)) for scheme in _schemes(blocks, task)]
    codec = next((one for one in candidates if _reads_alike(one, blocks, published)), None)
    if codec is None:
        warn("this tokenizer joins planning tokens and text in a way of its own: ids differ from those of training")
    codec = codec or candidates[0]
    return codec, blocks.order(codec.scheme)


def _schemes(blocks: Blocks, task: str) -> Iterator[TokenScheme]:
    """Spaces between planning tokens as ids of their own; and, where the tokenizer swallows them, none."""
    question, space = QUESTIONS.get(task, QUESTION), blocks.space
    front = set(blocks.texts) == {PREFIX}
    spaced = TokenScheme(
        n_prefix=blocks.counts[PREFIX],
        n_special=blocks.counts.get(ANSWER, 0),
        kinds=blocks.kinds,
        placement="only_at_front" if front else "each_step",
        question_template=question + space,
        choice_template=TASKS[task].choice_template,
        block_separator=space,
        line_ending="\n" if front else f"\n{space}",
        answer_template=" The answer is: {answer}\n",
    )
    yield spaced
    yield replace(
        spaced,
        question_template=question,
        block_separator="",
        line_opening="",
        line_ending="\n",
        answer_template=spaced.answer_template.lstrip(),
    )


def _reads_alike(codec: Codec, blocks: Blocks, published: Any) -> bool:
    """Tried on a trace of all kinds; where blocks stand only in front, on what they stand behind."""
    scheme, asked = codec.scheme, Question("Is Lima in Asia?", "False")
    question = scheme.question_text(asked)
    bare = question[: len(question) - len(scheme.block_separator)]  # the space belongs to the first token
    kinds = [*((kind,) for kind in scheme.kinds), ()]
    trace = Trace(asked, tuple(Step(kind, "Lima lies in Peru.") for kind in kinds))
    front = scheme.placement == "only_at_front"
    text = bare + blocks.texts[PREFIX] if front else blocks.write(trace, bare)
    made = codec.encode(question) + (list(codec.opening()) if front else codec.render(trace)[:-1])
    # Their names are no way to the ids: some tokenizers make them "▁<memory_0>".
    first = len(published) - len(blocks.tokens)
    same = dict(zip(codec.describe().values(), [first + row for row in blocks.order(scheme)], strict=True))
    return [same.get(i, i) for i in made] == list(published(text, add_special_tokens=False)["input_ids"])
