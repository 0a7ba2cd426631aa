"""Several processes at one run: what they must have in common, and the end of all when one is lost."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from memreason.core.errors import ProcessError, StorageError

__all__ = ["check_same_folder", "together"]

# gloo reports a lost process in a plain RuntimeError, NCCL in a class of its own.
LOST = re.compile(r"Connection (?:reset|closed|refused)[a-z ]*|Broken pipe|gloo|NCCL\w*", re.IGNORECASE)


@contextmanager
def together() -> Iterator[None]:
    """Raises ProcessError where this process cannot go on because another has ended."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        lost = LOST.findall(str(error))
        if PartialState().num_processes == 1 or not (lost or isinstance(error, torch.distributed.DistError)):
            raise
        raise ProcessError(
            f"process {PartialState().process_index}: another process of this run has ended or cannot be reached "
            f"({lost[-1] if lost else type(error).__name__}). If it gave a reason, that stands above. "
            "Run the same command again: it goes on from the last checkpoint."
        ) from error


def check_same_folder(run: Path, newest: Path | None) -> None:
    """Raises StorageError if processes see other checkpoints in the run folder: it must lie on a disk of all."""
    if PartialState().num_processes > 1 and len(set(gather_object([newest.name if newest else None]))) > 1:
        raise StorageError(
            f"{run}: the processes of this run see different checkpoints in it. Give an --output_dir on a disk that "
            "all machines share."
        )
