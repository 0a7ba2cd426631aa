"""Devices: a table of GPUs, and this machine's processor, measured on the spot."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from memreason.core.errors import RecipeError
from memreason.encode.base import pick_dtype
from memreason.timing.machine import measure

__all__ = ["Hardware", "hardware"]

Range = tuple[float, float]
TABLE = Path(__file__).with_name("hardware.yaml")
PRODUCTS: Range = (0.45, 0.75)  # share of a GPU's peak that large matrix products reach
LAUNCH: Range = (5e-6, 15e-6)  # seconds that an eager operation takes at least: Python and the launch of its kernel
READS: Range = (0.5, 0.85)  # share of a GPU's memory bandwidth
QUANTISED: dict[str | None, Range] = {None: (1.0, 1.0), "8bit": (1.2, 3.0), "4bit": (1.15, 2.0)}  # times as long
# What a training reaches of a processor's two measured rates: 0.70 on average, set on one training and checked on
# others (docs/performance.md).
CPU_REACH, CPU_LAUNCH = (0.6, 0.84), (8e-6, 15e-6)


@dataclass(frozen=True)
class Hardware:
    """Equal devices. Each: `flops` and `fp32` in FLOP/s (half and full precision), `memory` in bytes, `bandwidth` and
    `link` in bytes a second. `reach` is the share of FLOP/s that matrix products come to, `reads` that of the
    bandwidth, both [worst, best]; `launch` the seconds that an operation takes at least, [best, worst]; `dollars` an
    hour."""

    name: str
    count: int
    flops: float
    fp32: float
    memory: float
    bandwidth: float
    link: float
    reach: Range
    reads: Range
    launch: Range
    dollars: Range | None
    cpu: bool = False

    def __str__(self) -> str:
        return f"{self.count} x {self.name}" if self.count > 1 else self.name


def hardware(gpus: str | None, dtype: str, dollars: str | None = None) -> Hardware:
    """Devices from words such as `8xA100-80`, `h100` or `cpu`; None: those of this machine.

    `dtype` is the recipe's; `dollars` an hour of one device, `2` or `1.5-3`. Raises RecipeError for what is unknown.
    """
    table = _table()
    count, name = _read(gpus) if gpus else _here(table)
    known = {key.lower(): key for key in table}
    price = _price(dollars) if dollars else None
    if name == "cpu":
        rate, bandwidth = _processor(dtype)
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        return Hardware(
            "cpu", count, rate, rate, memory, bandwidth, bandwidth / 4, CPU_REACH, CPU_REACH, CPU_LAUNCH, price, True
        )
    if name not in known:
        raise RecipeError(f"--gpus {gpus}: unknown device. Known: {', '.join(table)}, cpu; e.g. 8xA100-80", "estimate")
    row = table[known[name]]
    low, high = row["dollars"]
    return Hardware(
        known[name],
        count,
        float(row["flops"]),
        float(row["fp32"]),
        row["memory"] * 2.0**20,
        row["bandwidth"] * 1e9,
        row["link"] * 1e9,
        PRODUCTS,
        READS,
        LAUNCH,
        price or (float(low), float(high)),
    )


@cache
def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return table


def _read(gpus: str) -> tuple[int, str]:
    found = re.fullmatch(r"(?:(\d+)\s*[x*]\s*)?([a-z][\w.-]*)", gpus.strip().lower())
    if not found or found[1] == "0":
        raise RecipeError(f"--gpus {gpus}: a count and a device are needed, e.g. 8xA100-80, h100, cpu", "estimate")
    return int(found[1] or 1), found[2].replace(" ", "")


def _here(table: dict[str, dict[str, Any]]) -> tuple[int, str]:
    if not torch.cuda.is_available():
        return 1, "cpu"
    name = torch.cuda.get_device_name()
    known = next((key for key, row in table.items() if re.search(row["name"], name)), None)
    if known is None:
        raise RecipeError(f"this machine's {name} is not in the table: name a like one with --gpus", "estimate")
    return torch.cuda.device_count(), known.lower()


def _price(dollars: str) -> Range:
    try:
        low, high = (float(part) for part in (dollars.split("-") * 2)[:2])
    except ValueError:
        low = math.nan
        high = low
    if not 0 <= low <= high:
        raise RecipeError(f"--dollars-per-hour {dollars}: a number or a range is needed, e.g. 2 or 1.5-3", "estimate")
    return low, high


@cache
def _processor(dtype: str) -> Range:
    """FLOP/s of matrix products in the dtype that would be trained in, and bytes a second."""
    found = measure({"gemm": ["bf16" if pick_dtype(dtype) == torch.bfloat16 else "fp32"]})
    (rate,) = (value for name, value in found.items() if name.startswith("gemm_"))
    return rate * 1e9, found["read_bandwidth"] * 1e9
