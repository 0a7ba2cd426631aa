"""The local engine: questions in cohorts, exact to the token, with nothing computed that is not needed.

A *cohort* is a group of questions that started together. Each keeps the keys and values of its rows in memory of its
own; a row that ends leaves, the last row takes its place, and when enough places are free the next cohort joins. One
forward pass feeds what every row of every cohort has pending, end to end and without padding: a prompt, the token
chosen last, or that token and a *draft*. Only attention looks at a cohort alone, so that its rows, which are about
equally long, wait for none of another.

Drafts are the tokens that a planning block leaves no doubt about: after the first token of a block the rest of it,
after the answer block its phrase, after a line break the next prefix. Where few rows leave room in a pass they are also
what a row read behind its last two tokens when it read those before (`Row.echo`). They go in with the token that they
follow and are kept as far as the model itself would have chosen them, position by position (arXiv 2211.17192, section
2.3): the answer is that of plain decoding, in fewer passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from memreason.core.errors import ModelError
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question
from memreason.encode.codec import Codec
from memreason.fast.attention import attending
from memreason.fast.matrices import laid_out
from memreason.fast.memory import keep_freed_memory
from memreason.fast.sparse import UNMASKED
from memreason.finetune.methods import is_adapted, merged, network_of
from memreason.generate.calculator import calculator
from memreason.generate.choose import Choose, chooser, drafts_of, take
from memreason.generate.cohort import COHORTS, Cohort
from memreason.generate.plain import generate_plainly
from memreason.generate.rows import Given, Row

__all__ = ["decode", "refuse_unfed"]

ECHOED, LONGEST = 32, 8  # tokens that a pass, and a row, drafts of what was read: hardly more work than for one
CHOSEN = 64  # rows of logits looked at together: their fp32 copy stays in the cache


def decode(
    model: Any,
    codec: Codec,
    waiting: deque[Row],
    settings: EvalRecipe,
    more: Callable[[], bool] = lambda: False,
) -> Generator[list[Row], None, None]:
    """Take rows from the queue until it is empty and all have ended; yield those that ended, after each pass.

    Between two passes rows may be put into the queue, and those in flight be read. When nothing is left, `more` is
    asked whether there will be: it may wait for it.
    """
    keep_freed_memory()
    if not _feeds(network_of(model)):
        if settings.calculator:
            raise ModelError("eval.calculator: Transformers itself decodes this model, and cannot be given results")
        refuse_unfed(model, codec, fed=False)
        yield from generate_plainly(model, waiting, settings, codec.eos_id, more)
        return
    drafts, choose = drafts_of(codec), chooser(model, settings)
    calculate = calculator(codec) if settings.calculator else None
    with merged(model), laid_out(model), torch.inference_mode(), attending(model, COHORTS):
        network = _Network(model, codec.parting)
        cohorts: list[Cohort] = []
        while waiting or cohorts or more():
            _admit(cohorts, waiting, settings.batch_size, network)
            ended: list[Row] = []
            rows = sum(len(cohort.rows) for cohort in cohorts)
            follow = partial(_follow, drafts, min(LONGEST, ECHOED // max(1, rows)))  # `more` may have brought none
            for cohort, scores in zip(cohorts, network.scores(cohorts), strict=True):
                ended += _advance(cohort, scores, choose, follow, calculate, codec.eos_id)
            cohorts = [cohort for cohort in cohorts if cohort.rows]
            yield ended


def refuse_unfed(model: Any, codec: Codec, *, fed: bool | None = None) -> None:
    """Raises ModelError for sparse attention on a model that the engine cannot feed (None: which is tried)."""
    if codec.parting and not (_feeds(network_of(model)) if fed is None else fed):
        raise ModelError(f"tokens.sparse_attention: {network_of(model).config.model_type} {UNMASKED}")


def _feeds(network: Any) -> bool:
    """Whether the engine can feed this model, tried on six tokens: four, then two more, against all at once.

    Not so where more than keys and values is carried on (state-space layers), or attention has parts of its own.
    """
    if not getattr(network, "_supports_attention_backend", False):
        return False
    size = network.get_input_embeddings().weight.shape[0]
    ids = torch.arange(size // 4, size // 2, max(1, size // 24)).tolist()[:6]
    row = Row(Question("", ""), 0, 9, ids[:4], torch.Generator())
    with torch.inference_mode(), attending(network, COHORTS):
        fed = _Network(network)
        cohort = fed.cohort([row])
        fed.scores([cohort])
        row.fed, row.pending, row.drafted = 4, ids[4:], 1
        cohort.plan()
        (found,) = fed.scores([cohort])
    # "eager" rounds as the cohorts' attention does, so that in bf16 too little noise is left
    with torch.inference_mode(), attending(network, "eager"):
        expected = network(input_ids=torch.tensor([ids], device=fed.device), use_cache=False).logits[0, -2:]
    return bool((found - expected).float().norm() < 0.05 * expected.float().norm())


def _admit(cohorts: list[Cohort], waiting: deque[Row], size: int, network: _Network) -> None:
    """The next cohort joins as soon as a quarter of the places is free."""
    free = size - sum(len(cohort.rows) for cohort in cohorts)
    if waiting and free * 4 >= size:
        cohorts.append(network.cohort([waiting.popleft() for _ in range(min(free, len(waiting)))]))


def _advance(
    cohort: Cohort,
    logits: Tensor,
    choose: Choose,
    follow: Callable[[Row], list[int]],
    calculate: Given | None,
    eos: int,
) -> list[Row]:
    """Take each row's next tokens from its logits (those after its last sure token and its drafted ones), and behind
    them what the calculator gives.

    Returns the rows that ended, which have left the cohort.
    """
    points = [row.draw(len(row.ids) + k) for row in cohort.rows for k in range(row.drafted + 1)]
    found = chain.from_iterable(
        take(logits[n : n + CHOSEN], points[n : n + CHOSEN], choose) for n in range(0, len(points), CHOSEN)
    )
    ended: dict[int, Row] = {}
    for number, row in enumerate(cohort.rows):
        sure = len(row.pending) - row.drafted
        draft, row.fed = row.pending[sure:], row.fed + sure
        right, given = True, 0  # everything drafted so far is what the model chose
        for k, one in enumerate([next(found) for _ in range(row.drafted + 1)]):
            if not right:
                break
            row.take(one)
            given = row.take_given(calculate, eos) if calculate else 0
            if row.ended(eos):
                ended[number] = row
            right = number not in ended and not given and draft[k : k + 1] == [one.token]
            row.fed += right
        draft = [] if number in ended else follow(row)
        row.pending, row.drafted = [*row.ids[len(row.ids) - 1 - given :], *draft], len(draft)
    cohort.leave(set(ended))
    if cohort.rows:
        cohort.plan()
    return list(ended.values())


def _follow(drafts: dict[int, list[int]], echoed: int, row: Row) -> list[int]:
    """What is drafted behind a row's last token."""
    found = drafts.get(row.ids[-1]) or (row.echo(echoed) if echoed else [])
    return found[: row.limit - len(row.ids) - 1]


class _Network:
    """The model as the engine calls it. PEFT would put a learnt prompt in front of every call; here it goes in once."""

    def __init__(self, model: Any, parting: frozenset[int] = frozenset()) -> None:
        self.model, self.device, self.parting = model, next(model.parameters()).device, parting
        learnt = is_adapted(model) and model.active_peft_config.is_prompt_learning
        self.network = model.get_base_model() if learnt else model
        self.virtual: int = model.active_peft_config.num_virtual_tokens if learnt else 0
        self.prefix = learnt and model.active_peft_config.peft_type == "PREFIX_TUNING"

    def cohort(self, rows: list[Row]) -> Cohort:
        if self.prefix:
            cache = self.model.get_prompt(batch_size=len(rows))
            for row in rows:
                row.fed = self.virtual
        elif self.virtual:
            for row in rows:  # ids below zero stand for virtual tokens
                row.pending = [*range(-self.virtual, 0), *row.pending]
        cohort = Cohort(rows, self.device, self.parting)
        if self.prefix:
            cohort.memory = {n: (layer.keys, layer.values) for n, layer in enumerate(cache.layers)}
        return cohort

    def scores(self, cohorts: list[Cohort]) -> tuple[Tensor, ...]:
        """Logits of each cohort: for each row those after its last sure token and after each drafted one."""
        rows = [row for cohort in cohorts for row in cohort.rows]
        ids = torch.tensor([[token for row in rows for token in row.pending]], device=self.device)
        wanted = [n <= row.drafted for row in rows for n in range(len(row.pending) - 1, -1, -1)]
        output = self.network(
            **self._inputs(ids),
            position_ids=torch.cat([cohort.on(self.device).position for cohort in cohorts])[None],
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, device=self.device).nonzero().squeeze(1),
            cohorts=cohorts,
        )
        counts = [sum(row.drafted + 1 for row in cohort.rows) for cohort in cohorts]
        return torch.split(output.logits[0], counts)

    def _inputs(self, ids: Tensor) -> dict[str, Tensor]:
        if self.prefix or not self.virtual:
            return {"input_ids": ids}
        embedded = self.network.get_input_embeddings()(ids.clamp(min=0))
        prompt = self.model.get_prompt(batch_size=1)[0].to(embedded)
        return {"inputs_embeds": torch.where((ids < 0)[..., None], prompt[ids.clamp(max=-1)], embedded)}
