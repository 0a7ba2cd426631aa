"""A base's own chat template as the texts around a question, made once: what the template writes, less what is said.

The texts hold control tokens (<|im_start|> ...), a user's never become any: Codec puts ids of both side by side.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from memreason.core.errors import ModelError
from memreason.encode.scheme import TokenScheme

__all__ = ["in_chat"]

ASKED, ANSWERED = "MEMREASONQUESTION", "MEMREASONANSWER"
# Some templates write the day into their system prompt (Llama 3): a prompt that changed daily would be another one than
# was trained. This is Llama's own default.
DAY = datetime(2024, 7, 26, tzinfo=UTC)
FIXED: dict[str, Any] = {"date_string": DAY.strftime("%d %b %Y"), "strftime_now": DAY.strftime}


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
    try:
        texts = [
            str(tokenizer.apply_chat_template(some, add_generation_prompt=True, tokenize=False, **FIXED))
            for some in (turns[:1], [*turns, turns[0]])
        ]
    except (TemplateError, ValueError, TypeError) as error:
        raise ModelError(f"{base}: its chat template cannot be used ({error})") from error
    before, found, behind = texts[0].partition(ASKED)
    turn = texts[1].partition(ANSWERED)[2].partition(ASKED)[0]
    if not found or texts[1].count(ANSWERED) != 1 or texts[1].count(ASKED) != 2:
        raise ModelError(f"{base}: its chat template does not write question and answer as they are")
    return replace(scheme, question_template=f"{before}{{question}}{{choices}}{behind}", chat_turn=turn)
