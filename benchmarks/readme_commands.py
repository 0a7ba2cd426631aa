"""Run every `memreason` line of the README, in a fresh folder beside the run that `make demo` made.

The lines of a block in their order; the first block, whose files others use, before the rest, the rest two at a time.
Fails unless each line succeeds. The published file that the README imports is taken from --shared; without that folder,
the line that needs it is named as not run. The teacher that it names is a scripted one, on a port of its own.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx2

from memreason import ScriptedTeacher, serving

ROOT = Path(__file__).resolve().parent.parent


def blocks() -> list[list[str]]:
    found = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [[line for line in block.splitlines() if line.startswith("memreason ")] for block in found]
    return [block for block in lines if block]


def served(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Start a server, read its page, stop it as Ctrl-C would."""
    with subprocess.Popen(
        [*command, "--port", "0"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        told = ""
        while not (address := re.search(r"http://\S+", told)) and (line := process.stdout.readline()):
            told += line
        if address:
            assert "memory" in httpx2.get(address[0]).text
            process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode if address else 1, told + out, error)


def run(folder: Path, shared: Path | None, teacher: str, block: list[str]) -> None:
    for line in block:
        line = line.replace("http://127.0.0.1:8000/v1", teacher)
        words = shlex.split(line, comments=True)[1:]
        for name in re.findall(r"\S+_clean\.json", line) if shared else ():
            shutil.copy(shared / "data" / "labelled" / name, folder)
        if words[:2] == ["data", "import"] and not (folder / words[2]).is_file():
            print(f"not run, {words[2]} is not here: {line}")
            continue
        start = time.monotonic()
        command = [sys.executable, "-m", "memreason", *words]
        if words[0] == "serve":
            done = served(command, folder)
        else:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        print(f"{time.monotonic() - start:6.1f} s  exit {done.returncode}  {line}", flush=True)
        if done.returncode:
            raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, help="folder that holds data/labelled")
    shared = parser.parse_args().shared
    with tempfile.TemporaryDirectory() as scratch, serving(ScriptedTeacher()) as teacher:
        folder = Path(scratch)
        shutil.copytree(ROOT / "runs" / "demo", folder / "runs" / "demo")
        first, *others = blocks()
        do = partial(run, folder, shared, teacher)
        do(first)
        with ThreadPoolExecutor(2) as side_by_side:
            for done in [side_by_side.submit(do, block) for block in others]:
                done.result()


if __name__ == "__main__":
    main()
