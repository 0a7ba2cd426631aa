"""What an exported folder must show before it gets its name: each check returns what it found, or raises."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from memreason.core.errors import ExportError
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question
from memreason.encode.codec import Codec
from memreason.finetune.checkpoint import Checkpoint
from memreason.finetune.methods import merged, network_of
from memreason.generate.engines import generate
from memreason.publish.chat import prompt_ids

__all__ = [
    "LOGITS_WITHIN", "Before", "ask_adapter", "check_blocks", "check_logits", "check_new_rows", "check_rows",
    "check_traces",
    "check_weights",
]  # fmt: skip

# Largest difference of a logit in fp32. Merging adds B A to W in another order than the adapter does: 1e-5 of logits
# that reach 30 is what that leaves at most (measured: docs/interop.md).
LOGITS_WITHIN = 1e-3
LOOKED_AT = 4  # traces whose logits are compared


def check_rows(model: Any, codec: Codec) -> str:
    """Both matrices hold every token of the tokenizer, and as many rows as the configuration says."""
    rows = [layer.weight.shape[0] for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    tokens, said = len(codec.tokenizer), model.config.get_text_config().vocab_size
    if min(rows) < tokens or set(rows) != {said}:
        raise ExportError(f"the matrices have {rows} rows, the configuration says {said}, the tokenizer has {tokens}")
    return f"{said:,} for {tokens:,} tokens"


def check_new_rows(written: Any, codec: Codec, before: Before) -> str:
    """The rows of the blocks are the adapter's, rounded to the stored dtype."""
    for name, row, expected in zip(("input", "head"), _new_rows(written, codec), before.rows, strict=True):
        if not torch.equal(row, expected.to(written.dtype).float()):
            raise ExportError(f"the new rows of the {name} are not the adapter's")
    return f"{len(codec.describe())} of the input and of the head are the adapter's"


def check_weights(written: Any, model: Any) -> str:
    """Every weight that was written is read again as it was."""
    stored, expected = written.state_dict(), model.state_dict()
    other = [name for name, value in expected.items() if not torch.equal(stored[name], value)]
    if other:
        raise ExportError(f"{len(other)} stored weights are not the merged ones, {other[0]} first")
    return f"{len(expected)} equal, bit by bit"


def check_blocks(folder: Path, codec: Codec) -> str:
    """The written tokenizer reads every block as its ids, and writes them as they are spelt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    blocks = {name: (codec.scheme.blocks[name], ids) for name, ids in codec.blocks.items()}
    for name, (tokens, ids) in blocks.items():
        read = list(tokenizer("".join(tokens), add_special_tokens=False)["input_ids"])
        spelt = str(tokenizer.decode(ids, skip_special_tokens=True, spaces_between_special_tokens=False))
        if read != ids or spelt.replace(" ", "") != "".join(tokens):
            raise ExportError(f"block {name}: read as {read} instead of {ids}, written as {spelt!r}")
    return f"{sum(len(ids) for _, ids in blocks.values())} tokens, {len(blocks)} blocks"


@dataclass(frozen=True)
class Before:
    """The adapter before it was merged: its traces of the questions, its logits over the first of them (prompts
    included), and its new rows, those of the input and those of the head."""

    questions: Sequence[Question]
    traces: list[list[int]]
    asked: list[list[int]]
    logits: list[Tensor]
    rows: list[Tensor]


def ask_adapter(loaded: Checkpoint, questions: Sequence[Question], settings: EvalRecipe) -> Before:
    traces = _answers(loaded.model, loaded.codec, questions, settings)
    some = list(zip(questions, traces, strict=True))[:LOOKED_AT]
    asked = [loaded.codec.question_ids(question) + ids for question, ids in some]
    logits = [_logits(loaded.model, ids) for ids in asked]
    with merged(loaded.model):
        return Before(questions, traces, asked, logits, _new_rows(network_of(loaded.model), loaded.codec))


def _new_rows(network: Any, codec: Codec) -> list[Tensor]:
    """Of the input and of the head: (tokens of blocks, width) each, in fp32."""
    ids = list(codec.describe().values())
    layers = (network.get_input_embeddings(), network.get_output_embeddings())
    return [layer.weight[ids].detach().float().clone() for layer in layers]


def check_logits(model: Any, before: Before) -> str:
    """In fp32 the merged model's logits are the adapter's, over whole traces."""
    found = [_logits(model, ids) for ids in before.asked]
    worst = max(float((a - b).abs().max()) for a, b in zip(found, before.logits, strict=True))
    if not worst <= LOGITS_WITHIN:
        raise ExportError(f"a logit of the merged model is {worst:.2g} off the adapter's (at most {LOGITS_WITHIN})")
    return f"at most {worst:.1e} off in fp32"


def _logits(model: Any, ids: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits
    return found.float().cpu()


def check_traces(
    folder: Path, codec: Codec, before: Before, settings: EvalRecipe, *, written: Any = None, base: str | None = None
) -> str:
    """Plain Transformers in a fresh process, without this package, makes of messages the trained prompts, and of these
    the traces that the engine makes of the `written` weights, where it can (None: the traces that the adapter made).

    How many differ from the adapter's is counted: only rounding to the stored dtype may make them. `base`: the folder
    is an adapter of it.
    """
    questions, opening = before.questions, codec.opening()
    found = _fresh(folder, base, [codec.scheme.message(question) for question in questions], settings.max_new_tokens)
    if found["prompts"] != [prompt_ids(codec, question) for question in questions]:
        raise ExportError("the chat template does not give the trained prompt")
    theirs = [_trace(codec, opening + ids) for ids in found["ids"]]
    adapted = [_trace(codec, ids) for ids in before.traces]
    ours = adapted if written is None else [_trace(codec, ids) for ids in _answers(written, codec, questions, settings)]
    if wrong := sum(a != b for a, b in zip(theirs, ours, strict=True)):
        raise ExportError(f"{wrong} of {len(ours)} traces are not those that are generated here from the same weights")
    same = sum(a == b for a, b in zip(theirs, adapted, strict=True))
    return f"{len(theirs)} alike in plain Transformers" + (f", {same} of them the adapter's" if written else "")


def _answers(model: Any, codec: Codec, questions: Sequence[Question], settings: EvalRecipe) -> list[list[int]]:
    made = {one.question.id: one.ids for batch in generate(model, codec, questions, settings) for one in batch}
    return [made[question.id] for question in questions]


def _trace(codec: Codec, ids: Sequence[int]) -> list[int]:
    """Ids up to the end of the trace: what stands behind it is padding."""
    return list(ids[: ids.index(codec.eos_id)] if codec.eos_id in ids else ids)


def _fresh(folder: Path, base: str | None, messages: Sequence[str], longest: int) -> dict[str, Any]:
    script = Path(__file__).with_name("fresh.py")
    asked = {"folder": str(folder.resolve()), "base": base, "messages": list(messages), "max_new_tokens": longest}
    done = subprocess.run(
        [sys.executable, "-I", str(script)], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ExportError(f"plain Transformers cannot use it ({last})")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
