"""Run every `memreason` line of the README in its order, in a fresh folder beside the run that `make demo` made.

Fails unless each of them succeeds. The published file that the README imports is taken from --shared; without that
folder, the line that needs it is named as not run. The teacher that it names is a scripted one, on a port of its own.
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
from pathlib import Path

import httpx2

from memreason import ScriptedTeacher, serving

ROOT = Path(__file__).resolve().parent.parent


def commands() -> list[str]:
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("memreason ")]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, help="folder that holds data/labelled")
    shared = parser.parse_args().shared
    with tempfile.TemporaryDirectory() as scratch, serving(ScriptedTeacher()) as teacher:
        folder = Path(scratch)
        shutil.copytree(ROOT / "runs" / "demo", folder / "runs" / "demo")
        for line in commands():
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
                sys.exit(done.stdout[-2000:] + done.stderr[-4000:])


if __name__ == "__main__":
    main()
