"""Evaluations in the log format of lm-eval 0.4.13 (lm-evaluation-harness, `--log_samples`): what reads its logs reads
ours.

samples_<task>_<date>.jsonl holds what `EvaluationTracker.save_results_samples` writes, results_<date>.json what of
`save_results_aggregated` is known here. A hash is SHA-256 of the same text as there.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import stdev
from typing import Any

import yaml

from memreason.core.files import write_json, write_jsonl
from memreason.core.trace import Trace
from memreason.encode.codec import Codec
from memreason.measure.score import score_trace
from memreason.publish.chat import chat_template
from memreason.publish.lm_eval_tasks import COMMON, SHIPPED, lm_eval_doc, task_name

__all__ = ["Log", "log_samples", "write_log"]

NONE = "[invalid]"
Row = dict[str, Any]
Log = tuple[Row, list[Row]]  # results of an evaluation, its samples in this format


class _Functions(yaml.SafeLoader):
    """Reads a task file with its functions as their names."""


_Functions.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))  # type: ignore[arg-type]


def _config(max_new_tokens: int) -> Row:
    config: Row = yaml.load((SHIPPED / COMMON).read_text(encoding="utf-8"), _Functions)
    config["generation_kwargs"]["max_gen_toks"] = max_new_tokens
    return config


def log_samples(codec: Codec, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Log:
    """Lines of samples.jsonl as those of lm-eval's log: a question each, of whose texts the first one counts."""
    settings, template = results["settings"], chat_template(codec)
    asked: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        asked.setdefault(sample["id"], []).append(sample)
    arguments = _config(settings["max_new_tokens"])["generation_kwargs"]
    if settings["decoding"] != "greedy":
        arguments |= {"do_sample": True, "temperature": settings["temperature"], "top_p": settings["top_p"]}
    rows = [_row(codec, template, number, given, arguments) for number, given in enumerate(asked.values())]
    return dict(results), rows


def _row(codec: Codec, template: str, number: int, samples: Sequence[Mapping[str, Any]], arguments: Row) -> Row:
    traces = [Trace.from_json(sample) for sample in samples]
    doc = lm_eval_doc(codec, traces[0].question)
    user = [{"role": "user", "content": doc["prompt"]}]
    shown: dict[str, Any] = {"chat_template": template, "add_generation_prompt": True, "tokenize": False}
    prompt = str(codec.tokenizer.apply_chat_template(user, **shown))
    scores = [score_trace(trace) for trace in traces]
    metrics = {
        "exact_match": float(scores[0].verdict == "correct"),
        "no_answer": float(scores[0].verdict == "no_answer"),
    }
    return {
        "doc_id": number,
        "doc": doc,
        "target": doc["answer"],
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": arguments}},
        "resps": [[codec.decode(sample["ids"][sample["meta"]["given"] :]) for sample in samples]],
        "filtered_resps": [scores[0].extracted or NONE],
        "filter": "answer-line",
        "metrics": list(metrics),
        "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(prompt),
        "target_hash": _hash(doc["answer"]),
        **metrics,
    }


def write_log(out: Path, codec: Codec, logs: Sequence[Log], when: float) -> list[Path]:
    """Write evaluations of one checkpoint into a folder of its name in `out`; `when` (seconds of Unix) names the files.

    Returns the paths, results_<date>.json first.
    """
    model = str(logs[0][0]["checkpoint"])
    folder = out / _safe(model)
    date = datetime.fromtimestamp(when).isoformat(timespec="microseconds").replace(":", "-")
    named = {_named(results): (results, rows) for results, rows in logs}
    paths = [folder / f"results_{date}.json", *(folder / f"samples_{name}_{date}.jsonl" for name in named)]
    write_json(paths[0], {**_results(named), **_about(codec, model, logs, when)})
    for path, (_, rows) in zip(paths[1:], named.values(), strict=True):
        write_jsonl(path, rows)
    return paths


def _named(results: Mapping[str, Any]) -> str:
    name, split = task_name(Path(results["task"]).stem), results["split"]
    return name if split == "test" else f"{name}_{split}"


def _results(logs: Mapping[str, Log]) -> Row:
    configs = {name: _config(results["settings"]["max_new_tokens"]) for name, (results, _) in logs.items()}
    return {
        "results": {name: _figures(name, rows) for name, (_, rows) in logs.items()},
        "group_subtasks": {},
        "configs": {name: {"task": name, **config} for name, config in configs.items()},
        "versions": {name: config["metadata"]["version"] for name, config in configs.items()},
        "n-shot": dict.fromkeys(logs, 0),
        "higher_is_better": {
            name: {one["metric"]: one["higher_is_better"] for one in config["metric_list"]}
            for name, config in configs.items()
        },
        "n-samples": {name: {"original": len(rows), "effective": len(rows)} for name, (_, rows) in logs.items()},
        "task_hashes": {name: _hash("".join(map(_hashes, rows))) for name, (_, rows) in logs.items()},
    }


def _figures(name: str, rows: Sequence[Row]) -> Row:
    found: Row = {"name": name, "alias": name, "sample_len": len(rows)}
    for metric in rows[0]["metrics"]:
        values = [row[metric] for row in rows]
        found[f"{metric},answer-line"] = sum(values) / len(values)
        found[f"{metric}_stderr,answer-line"] = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else "N/A"
    return found


def _about(codec: Codec, model: str, logs: Sequence[Log], when: float) -> Row:
    tokenizer, template = codec.tokenizer, chat_template(codec)
    seconds = sum(results["seconds"] for results, _ in logs)
    return {
        "config": {
            "model": "memreason",
            "model_args": {"pretrained": model},
            "batch_size": logs[0][0]["settings"]["batch_size"],
            "limit": None,
            "gen_kwargs": None,
        },
        "date": when,
        "tokenizer_pad_token": [tokenizer.pad_token, str(tokenizer.pad_token_id)],
        "tokenizer_eos_token": [tokenizer.eos_token, str(tokenizer.eos_token_id)],
        "tokenizer_bos_token": [tokenizer.bos_token, str(tokenizer.bos_token_id)],
        "model_source": "memreason",
        "model_name": model,
        "model_name_sanitized": _safe(model),
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": True,
        "chat_template": template,
        "chat_template_sha": _hash(template),
        "total_evaluation_time_seconds": str(seconds),
    }


def _safe(model: str) -> str:
    return re.sub(r'["<>:/|\\?*\[\]]+', "__", model)


def _hashes(row: Row) -> str:
    return str(row["doc_hash"] + row["prompt_hash"] + row["target_hash"])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
