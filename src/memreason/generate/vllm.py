"""The engine "vllm": an exported model in vLLM, inside this process. Ids go in, ids and log-probabilities come out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from memreason.core.errors import CheckpointError, EngineError
from memreason.core.stages import EvalRecipe
from memreason.encode.codec import Codec
from memreason.finetune.methods import is_adapted
from memreason.generate.rows import Row

__all__ = ["complete"]

LENGTHS = 512  # an engine's longest trace is a multiple of this many tokens, so that the next call finds it open
# vLLM reads these when it is imported; the user's own come first.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: it starts faster and ends with it
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def complete(model: Any, codec: Codec, waiting: deque[Row], settings: EvalRecipe) -> Iterator[list[Row]]:
    """Answer rows, `settings.batch_size` at a time; yield those that ended, after each pass.

    The weights are those of the folder that `model` was read from. Raises CheckpointError for an adapter, EngineError
    where vLLM is missing.
    """
    folder, config = model.name_or_path, model.config
    if is_adapted(model) or not (Path(folder) / "config.json").is_file():
        raise CheckpointError(f"{folder}: vLLM runs merged weights. First `memreason export` the run")
    if not waiting:
        return
    longest = max(len(row.pending) + row.limit for row in waiting)
    length = min(config.max_position_embeddings, -(-longest // LENGTHS) * LENGTHS)
    dtype = str(config.dtype).removeprefix("torch.")
    engine = _engine(folder, length, settings.batch_size, dtype, config.num_attention_heads)
    rows = {str(number): row for number, row in enumerate(waiting)}
    waiting.clear()
    for number, row in rows.items():
        engine.add_request(number, {"prompt_token_ids": row.pending}, _sampling(folder, codec, row, settings))
    try:
        while engine.has_unfinished_requests():
            ended = [one for one in engine.step() if one.finished]
            for one in ended:
                _fill(rows[one.request_id], one.outputs[0], codec.eos_id)
            yield [rows.pop(one.request_id) for one in ended]
    finally:
        engine.abort_request([*rows])  # whoever stops listening leaves the engine to the next


@lru_cache(maxsize=1)
def _engine(folder: str, length: int, in_flight: int, dtype: str, heads: int) -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        raise EngineError(
            f"eval.engine vllm: vLLM cannot be imported ({error}). It wants an environment of its own, with an older "
            "Transformers: docs/interop.md says how. Or ask a server that runs there: --eval.engine openai"
        ) from error
    gpus = max(1, torch.cuda.device_count())
    llm = vllm.LLM(
        model=folder,
        dtype=dtype,  # as exported: vLLM's own choice for fp32 is half of it
        skip_tokenizer_init=True,  # no text is made
        enforce_eager=not torch.cuda.is_available(),  # compiling takes minutes on a CPU
        max_model_len=length,
        max_num_seqs=in_flight,
        tensor_parallel_size=next(count for count in range(gpus, 0, -1) if heads % count == 0),
    )
    return llm.llm_engine


def _sampling(folder: str, codec: Codec, row: Row, settings: EvalRecipe) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    ways: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0},
        "sample": {"temperature": settings.temperature, "top_p": settings.top_p, "seed": row.random.initial_seed()},
        "model-default": _defaults(folder),
    }
    return SamplingParams(
        **ways[settings.decoding],
        max_tokens=row.limit,
        stop_token_ids=[codec.eos_id],  # and no other that a generation_config.json names
        ignore_eos=True,
        logprobs=2,  # the likeliest two, for the margin
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


@cache
def _defaults(folder: str) -> dict[str, Any]:
    """What the local engine takes of generation_config.json; vLLM itself samples also where that says not to."""
    own = GenerationConfig.from_pretrained(folder)
    sampled = {"temperature": own.temperature or 1.0, "top_p": own.top_p or 1.0, "top_k": own.top_k or 0}
    return sampled if own.do_sample else {"temperature": 0.0}


def _fill(row: Row, output: Any, eos: int) -> None:
    tables = [{token: one.logprob for token, one in step.items()} for step in output.logprobs]
    row.fill(list(output.token_ids), tables, eos)
