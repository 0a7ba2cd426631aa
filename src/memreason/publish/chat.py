"""The chat template of an exported model: a user's message becomes the trained prompt, so that any chat server gives
the traces that were trained.

What stands in the message is what stands between the texts of the scheme's question template: the question, and where
it has choices, these as the scheme prints them (`TokenScheme.message`).
"""

from __future__ import annotations

import json
import re
from typing import Any

from memreason.core.errors import CheckpointError, ExportError
from memreason.core.trace import Question
from memreason.encode.chat import start_and_tail
from memreason.encode.codec import Codec
from memreason.encode.scheme import PREFIX

__all__ = ["chat_ids", "chat_template", "prompt_ids", "refuse_demonstrations"]

TEMPLATE = """\
{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}
{%- if not users -%}{{ raise_exception('a user message is needed') }}{%- endif -%}
{%- set asked = users[-1].content -%}
{%- if asked is not string -%}
{%- set asked = asked | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
{%- endif -%}
{{- BEFORE -}}{{- asked | trim -}}{{- BEHIND -}}
{%- if messages[-1].role == 'assistant' -%}{{- OPENING -}}{{- messages[-1].content -}}
{%- elif add_generation_prompt -%}{{- OPENING -}}
{%- endif -%}"""
PROBE = (Question("Is Lima the capital of Peru?", ""), Question("2 + 3?", ""), Question("Ünïcode “?”", ""))


def prompt_ids(codec: Codec, question: Question) -> list[int]:
    """The prompt as it was trained: the question, and the block that opens the trace."""
    return codec.question_ids(question) + codec.opening()


def chat_template(codec: Codec) -> str:
    """Raises CheckpointError if no text gives the ids of the trained prompt with this tokenizer."""
    refuse_demonstrations(codec)
    before, behind = codec.scheme.around_question
    special = "".join(codec.tokenizer.convert_ids_to_tokens(codec.opening_special_ids))
    if codec.scheme.chat_turn:  # the base's template writes a BOS too, and more control tokens
        special, before = start_and_tail(codec.tokenizer, before)
    opening = codec.scheme.block_separator.join(codec.scheme.blocks.get(PREFIX, ()))
    for lead in ("", " "):  # some tokenizers put a space before a text only where it stands alone, not behind a BOS
        texts = {"BEFORE": special + lead + before, "BEHIND": behind, "OPENING": opening}
        made = re.sub("BEFORE|BEHIND|OPENING", lambda name, texts=texts: _quoted(texts[name[0]]), TEMPLATE)  # type: ignore[misc]
        if all(chat_ids(codec.tokenizer, codec.scheme.message(one), made) == prompt_ids(codec, one) for one in PROBE):
            return made
    raise CheckpointError("this tokenizer reads no text as the trained prompt, so that a chat template cannot be made")


def refuse_demonstrations(codec: Codec) -> None:
    """A chat template holds the texts around one message. Raises ExportError where more stands before a question."""
    if codec.demonstrations:
        raise ExportError(
            f"data.k_shot {codec.demonstrations.k}: it was trained behind demonstrations, which a chat template cannot "
            "hold. Use the checkpoint here (memreason eval, ask, serve), or train with data.k_shot: 0"
        )


def chat_ids(tokenizer: Any, text: str, template: str | None = None) -> list[int]:
    """Ids that a server makes of a message."""
    asked = [{"role": "user", "content": text}]
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    return list(tokenizer.apply_chat_template(asked, chat_template=template, **settings))


def _quoted(text: str) -> str:
    """As a string of Jinja: its literals are those of JSON with ASCII alone."""
    return json.dumps(text)
