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

__all__ = ["ANSWER", "PLANS", "PREFIX", "SCHEME_FILE", "TokenScheme"]

SCHEME_FILE = "token_scheme.json"
PREFIX = "prefix"
ANSWER = "answer"
PLANS = ("plan_first", "plan_only")  # placements whose blocks all stand in front
NAMES = {"+": "addition", "-": "subtraction", "*": "multiplication", "/": "division"}  # as words


@dataclass(frozen=True)
class TokenScheme:
    """Which blocks exist, how many tokens each has, where they stand, and the texts around them.

    `n_prefix` tokens open every line, `n_special` tokens name each of its kinds. With both at zero
    no token is added and a line is parsed by its line break; `words`, such as "{kind}:", may then name its kinds in
    plain text, which every line begins with. `noise_seed` makes the first values of
    the new rows reproducible, so that a checkpoint need not carry rows that were never trained. `row_bias`, for each
    token what the head adds to its logit, is only there in imported checkpoints. With `sparse_attention` a line sees
    what stands before it through its block alone (sparse.py). `free` answers are those of a model that was not trained:
    they are read wherever they stand (free.py). With `chat_turn`, what a chat template writes between an
    answer and the next question, the texts of the question template hold control tokens. `demonstrations` names the
    traces shown before a question (demonstrations.py).
    """

    n_prefix: int = 1
    n_special: int = 2
    kinds: tuple[str, ...] = (REASON, MEMORY)
    placement: str = "each_step"
    question_template: str = "Question: {question}{choices}\n"
    choice_template: str = " {letter}. {choice}"
    block_separator: str = ""
    line_opening: str = " "
    line_ending: str = "\n"
    answer_template: str = " The answer is: {answer}"
    words: str = ""
    noise_seed: int = 0
    tokenizer: str = ""
    row_bias: tuple[float, ...] = ()
    sparse_attention: bool = False
    chat_turn: str = ""
    free: bool = False
    demonstrations: str = ""

    @property
    def blocks(self) -> dict[str, tuple[str, ...]]:
        """Block name -> its tokens, in the order of the published rows (prefix, answer, assignment, kinds)."""
        named = {PREFIX: self.n_prefix}
        if self.placement != "only_at_front":
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

    @property
    def around_question(self) -> tuple[str, str]:
        """What the question template puts before a question and behind it and its choices."""
        before, *_, behind = re.split(r"\{question\}|\{choices\}", self.question_template)
        return before, behind

    @property
    def question_lead(self) -> str:
        """What the line of a question begins with: "Question:"; empty where it begins with the question itself."""
        return "" if self.chat_turn else self.around_question[0].strip().split("\n")[-1].strip()

    def message(self, question: Question) -> str:
        """What a user of a chat writes to ask this question: its text, and its choices as the model was shown them."""
        before, behind = self.around_question
        return self.question_text(question).removeprefix(before).removesuffix(behind).strip()

    def shown_text(self, question: Question) -> str:
        """The question as a reader is shown it: with the texts around it, unless these are a chat's control tokens."""
        return self.message(question) if self.chat_turn else self.question_text(question).strip()

    @cached_property
    def _question_parts(self) -> list[str]:
        return re.split(r"(\{question\}|\{choices\})", self.question_template)

    def line_text(self, text: str) -> str:
        """A line as it stands behind its blocks."""
        return self.line_opening + text + self.line_ending

    def words_of(self, kinds: tuple[str, ...]) -> str:
        """What names a line's kinds in plain text: "Memory:"."""
        named = self.words.replace("{kind}", " and ".join(NAMES.get(kind, kind) for kind in kinds))
        return named[:1].upper() + named[1:]

    def without_words(self, line: str) -> tuple[tuple[str, ...], str]:
        """The kinds that a line's first words name, and its text behind them."""
        found = self._words.match(line) if self.words else None
        if not found:
            return (), line
        kinds = {NAMES.get(kind, kind): kind for kind in self.kinds}
        return tuple(kinds[name] for name in found[1].lower().split(" and ")), line[found.end() :].strip()

    @cached_property
    def _words(self) -> re.Pattern[str]:
        name = "(?:" + "|".join(re.escape(NAMES.get(kind, kind)) for kind in self.kinds) + ")"
        before, _, behind = self.words.partition("{kind}")
        return re.compile(f"{re.escape(before)}({name}(?: and {name})*){re.escape(behind)}", re.IGNORECASE)

    @property
    def answer_lead(self) -> str:
        """The phrase that an answer line begins with."""
        return self.answer_template.split("{answer}")[0].strip()

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
            lists = {name: tuple(values.get(name, ())) for name in ("kinds", "row_bias")}
            return cls(**{**values, **lists})
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"{path}: not a token scheme of this version ({error})") from error
