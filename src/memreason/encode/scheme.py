"""TokenScheme: which blocks exist, where they stand, and the texts around them.

Planning tokens: arXiv 2310.05707, section 3. Memory and reason tokens: arXiv 2411.13504, section 3.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from memreason.core.errors import CheckpointError
from memreason.core.files import read_json, write_json
from memreason.core.trace import ASSIGNMENT, LETTERS, MEMORY, REASON, Question

__all__ = ["ANSWER", "PREFIX", "SCHEME_FILE", "TokenScheme"]

SCHEME_FILE = "token_scheme.json"
PREFIX = "prefix"
ANSWER = "answer"


@dataclass(frozen=True)
class TokenScheme:
    """Which blocks exist, how many tokens each has, where they stand, and the texts around them.

    `n_prefix` tokens open every line, `n_special` tokens name each of its kinds. With both at zero
    no token is added and a line is parsed by its line break. `noise_seed` makes the first values of
    the new rows reproducible, so that a checkpoint need not carry rows that were never trained.
    """

    n_prefix: int = 1
    n_special: int = 2
    kinds: tuple[str, ...] = (REASON, MEMORY)
    placement: str = "each_step"
    question_template: str = "Question: {question}{choices}\n"
    choice_template: str = " {letter}. {choice}"
    block_separator: str = ""
    line_ending: str = "\n"
    answer_template: str = " The answer is: {answer}"
    noise_seed: int = 0
    tokenizer: str = ""

    @property
    def blocks(self) -> dict[str, tuple[str, ...]]:
        """Block name -> its tokens, in the order of the published rows (prefix, answer, assignment, kinds)."""
        named = {PREFIX: self.n_prefix}
        if self.placement == "each_step":
            named |= dict.fromkeys((ANSWER, ASSIGNMENT, *self.kinds), self.n_special)
        return {name: tuple(f"<{name}_{i}>" for i in range(count)) for name, count in named.items() if count}

    @property
    def tokens(self) -> list[str]:
        return [token for block in self.blocks.values() for token in block]

    def question_text(self, question: Question) -> str:
        choices = [
            self.choice_template.replace("{letter}", letter).replace("{choice}", choice)
            for letter, choice in zip(LETTERS, question.choices or (), strict=False)
        ]
        # One pass and no format(): braces in a question or a choice are ordinary characters.
        texts = {"{question}": question.text, "{choices}": "".join(choices)}
        return "".join([texts.get(part, part) for part in self._question_parts])

    @cached_property
    def _question_parts(self) -> list[str]:
        return re.split(r"(\{question\}|\{choices\})", self.question_template)

    def save(self, folder: Path) -> None:
        write_json(folder / SCHEME_FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> TokenScheme:
        """Raises CheckpointError if the folder has no scheme or one that this version cannot read."""
        path = folder / SCHEME_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{folder}: has no {SCHEME_FILE}, so its blocks are unknown. Name a memreason checkpoint or run."
            )
        try:
            values = read_json(path)
            return cls(**{**values, "kinds": tuple(values["kinds"])})
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"{path}: not a token scheme of this version ({error})") from error
