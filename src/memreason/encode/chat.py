"""A base's own chat template as the texts around a question, made once: what the template writes, less what is said.

The texts hold control tokens (<|im_start|> ...), a user's never become any: Codec puts ids of both side by side. They
meet at control tokens, as what stands between two of these is tokenized in one: "user\n" with the question behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from memreason.core.errors import ModelError
from memreason.encode.scheme import TokenScheme

__all__ = ["head_and_rest", "in_chat", "start_and_tail"]

ASKED, ANSWERED = "MEMREASONQUESTION", "MEMREASONANSWER"
# Some templates write the day into their system prompt (Llama 3): a prompt that changed daily would be another one than
# was trained. This is Llama's own default.
DAY = datetime(2024, 7, 26, tzinfo=UTC)
FORMS = {"%-d": "26", **{f"%{letter}": DAY.strftime(f"%{letter}") for letter in "dmbByYaAjHMSpIZ"}}
# Transformers makes texts of all arguments of a template, so that a function must be written in it.
FIXED = f"""\
{{%- macro strftime_now(form) -%}}
{{{{ form {" ".join(f"| replace('{form}', '{text}')" for form, text in FORMS.items())} }}}}
{{%- endmacro -%}}"""


def in_chat(scheme: TokenScheme, tokenizer: PreTrainedTokenizerBase, base: str) -> TokenScheme:
    """The scheme with the texts that the template of a base writes around what a user and the model say.

    A system prompt that the template has by default stands before the first question; its day is always 26 Jul 2024.
    Raises ModelError if there is no template, or one that does not write questions and answers as they are.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"{base}: has no chat template, which tokens.template: chat needs. Name an instruction-tuned model, or "
            "take tokens.template: plain or alpaca"
        )
    turns = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
    settings: Any = {"add_generation_prompt": True, "tokenize": False, "date_string": DAY.strftime("%d %b %Y")}
    settings["enable_thinking"] = False  # the lines of a trace are the thoughts: Qwen3 would write its own before them
    try:
        template: str = tokenizer.get_chat_template()
        texts = [
            str(tokenizer.apply_chat_template(some, chat_template=FIXED + template, **settings))
            for some in (turns[:1], [*turns, turns[0]])
        ]
    except (TemplateError, ValueError, TypeError) as error:
        raise ModelError(f"{base}: its chat template cannot be used ({error})") from error
    before, found, behind = texts[0].partition(ASKED)
    turn = texts[1].partition(ANSWERED)[2].partition(ASKED)[0]
    if not found or texts[1].count(ANSWERED) != 1 or texts[1].count(ASKED) != 2:
        raise ModelError(f"{base}: its chat template does not write question and answer as they are")
    return replace(scheme, question_template=f"{before}{{question}}{{choices}}{behind}", chat_turn=turn)


def start_and_tail(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, str]:
    """A text up to its last control token, and what of it stands before a user's text."""
    found = list(_control_tokens(tokenizer, text))
    if not found:
        return "", text
    end, token = found[-1]
    return text[: end.end()], text[end.end() :].lstrip() if token.rstrip else text[end.end() :]


def head_and_rest(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, str]:
    """What of a text stands behind a user's, and the rest, from its first control token."""
    for begin, token in _control_tokens(tokenizer, text):
        return text[: begin.start()].rstrip() if token.lstrip else text[: begin.start()], text[begin.start() :]
    return text, ""


def _control_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[tuple[re.Match[str], AddedToken]]:
    """Where they stand in a text. Some swallow the spaces beside them (rstrip, lstrip)."""
    control = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(control, key=len, reverse=True)
    for found in re.finditer("|".join(map(re.escape, longest_first)), text) if control else ():
        yield found, control[found[0]]
