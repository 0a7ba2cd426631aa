"""Prompts: Jinja files with a block for each message, the shipped ones or the user's own of the same name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from memreason.core.errors import RecipeError
from memreason.core.labelling import ChecksRecipe
from memreason.core.trace import LETTERS, Question

__all__ = ["SHIPPED", "Messages", "Prompts"]

Messages = tuple[dict[str, str], ...]
SHIPPED = Path(__file__).with_name("prompts")
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "question": "user"}  # block -> role


class Prompts:
    """Renders the messages of a purpose. `folder` holds own files, which replace the shipped ones by name."""

    def __init__(self, purposes: Sequence[str], folder: Path | str | None = None, limits: ChecksRecipe | None = None):
        self.purposes, self.limits = tuple(purposes), limits or ChecksRecipe()
        folders = [Path(folder)] if folder else []
        for own in folders:
            if not own.is_dir():
                raise RecipeError(f"prompts: {own} is no folder", "label")
        self.environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader([*folders, SHIPPED]),
            undefined=jinja2.StrictUndefined,
            auto_reload=False,
        )

    def messages(self, purpose: str, question: Question, **given: Any) -> Messages:
        """One message for each block of the purpose's file. Raises RecipeError for what Jinja cannot render."""
        values = {"question": question, "letters": LETTERS, "limits": self.limits, **given}
        try:
            template = self.environment.get_template(f"{purpose}.j2")
            context = template.new_context(values)
            made = [
                {"role": role, "content": "".join(template.blocks[block](context)).strip()}
                for block, role in ROLES.items()
                if block in template.blocks
            ]
        except jinja2.TemplateError as error:
            raise RecipeError(f"prompts: {purpose}.j2: {error}", "label") from error
        if not made:
            raise RecipeError(f"prompts: {purpose}.j2 has none of the blocks {', '.join(ROLES)}", "label")
        return tuple(made)

    @cached_property
    def version(self) -> str:
        """Eight hex digits that name the texts of these purposes, shipped or own."""
        assert self.environment.loader is not None
        names = {"kinds.j2", "question.j2", *(f"{purpose}.j2" for purpose in self.purposes)}
        texts = [self.environment.loader.get_source(self.environment, name)[0] for name in sorted(names)]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:8]
