"""The one-screen way, behind `make soak`: export, tasks, lm-eval's own command; accuracy and every text are ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from memreason import exports, pipeline
from memreason.cli import main
from memreason.core.files import read_jsonl
from memreason.core.stages import EvalRecipe
from memreason.evaluators import lm_eval_log

pytestmark = pytest.mark.soak
COUNT = 100
FILES = {  # of the published labels: the tasks' own data lies on the hub
    "atlas": "",
    "strategyqa": "StrategyQA_test_clean.json",
    "commonsenseqa": "commonsense_qa_test_clean_CC.json",
    "truthfulqa": "truthful_qa_test_clean_CC.json",
}


@pytest.fixture(scope="module")
def export(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exports.export(demo_run, tmp_path_factory.mktemp("out") / "export", dtype="fp32")


@pytest.mark.parametrize(("task", "file"), FILES.items())
def test_lm_eval_gives_the_accuracy_that_we_report(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, file: str
) -> None:
    monkeypatch.setenv("MEMREASON_HOME", str(tmp_path / "home"))
    if file:
        shared = os.environ.get("MEMREASON_SHARED")
        assert shared, "set MEMREASON_SHARED to a folder that holds data/labelled"
        labels = Path(shared) / "data" / "labelled" / file
        assert main(["data", "import", str(labels), "--task", task, "--split", "test"]) == 0
    tasks = ["lm-eval", "tasks", str(export), "--task", task, "--out", str(tmp_path / "tasks"), "--eval.n", str(COUNT)]
    assert main([*tasks, "--eval.max_new_tokens", "160"]) == 0
    command = [
        *(str(Path(sys.executable).with_name("lm_eval")), "run", "--model", "hf", "--apply_chat_template"),
        *("--model_args", f"pretrained={export},dtype=float32", "--tasks", f"memreason_{task}"),
        *("--include_path", str(tmp_path / "tasks"), "--batch_size", "32", "--device", "cpu"),
        *("--output_path", str(tmp_path / "theirs"), "--log_samples"),
    ]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    ours = pipeline.evaluate(export, settings=EvalRecipe(task=task, n=COUNT, max_new_tokens=160))
    _, log = lm_eval_log(Path(ours["folder"]), tmp_path / "ours")
    (written,) = (tmp_path / "theirs").rglob("samples_*.jsonl")
    mine, theirs = ([row for _, row in read_jsonl(path)] for path in (log, written))
    same = sum(a == b for a, b in zip(mine, theirs, strict=True))
    accuracy = sum(row["exact_match"] for row in theirs) / COUNT
    told = f"accuracy {ours['accuracy']} here, {accuracy} in lm-eval; no answer {ours['no_answer']}"
    print(f"\n{task}: {same} of {COUNT} lines alike; {told}")
    assert accuracy == pytest.approx(ours["accuracy"], abs=1e-12)
    assert same >= COUNT - 1  # another order of batches may flip a near-tie
