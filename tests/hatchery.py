"""Stands in for `subprocess` in the gate: processes as fresh as its own, but forked from one that has imported PEFT and
Transformers, and nothing of ours, once. Importing them is most of what a check of a toy model takes."""

from __future__ import annotations

import io
import multiprocessing
import runpy
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from subprocess import CompletedProcess

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["peft", "transformers.generation.utils", "transformers.models.llama.modeling_llama"])


def run(command: Sequence[str], *, input: str, **_: object) -> CompletedProcess[str]:
    ours, theirs = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_hatch, args=(command[-1], input, theirs))
    process.start()
    theirs.close()
    code, out, error = ours.recv()  # EOFError if it was killed
    process.join()
    return CompletedProcess(command, code, out, error)


def _hatch(script: str, given: str, pipe: Connection) -> None:
    assert "memreason" not in sys.modules
    sys.stdin, out, error, code = io.StringIO(given), io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(error):
        try:
            runpy.run_path(script, run_name="__main__")
        except BaseException:  # as a process of its own would end with it
            traceback.print_exc()
            code = 1
    pipe.send((code, out.getvalue(), error.getvalue()))
