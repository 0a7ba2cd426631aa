"""Run the published argument lists of train.py and eval.py as they are, on the built-in model.

Changed are only the model, the token, the checkpoint's number, --num_test and the number of steps. The labelled files
come from `memreason data import` (StrategyQA) and from ./load_data/dataset_folder (TruthfulQA).
Fails unless every command succeeds and leaves the files that it should.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL, STEPS, QUESTIONS = "smollm2-135m", 1, 1

STRATEGYQA_FOLDER = (
    f"./checkpoints/{MODEL}/stratgeqa_agent/step_type=memory-2-4-efficient=lora+prompt-tuning-lr=2e-4-soft-prompt=True"
)
STRATEGYQA_TRAIN = f"""--model_name_or_path {MODEL} --add_soft_prompts True --hf_hub_token 'your token'
--num_general_prefix_tokens 2 --num_special_prefix_tokens 4 --parameter_efficient_mode lora+prompt-tuning
--dataset stratgeqa_agent --load_in_16fp False --output_dir {STRATEGYQA_FOLDER} --model_max_length 700
--max_steps {STEPS} --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --evaluation_strategy "epoch"
--save_strategy "epoch" --save_total_limit 200 --learning_rate 2e-4 --weight_decay 0. --warmup_steps 700
--lr_scheduler_type "cosine" --logging_steps 1 --optim "adamw_torch" --gradient_accumulation_steps 16
--embedding_model_name {MODEL} --extract_step_type_tokens memory --num_plan_types 5 --num_test {QUESTIONS}
--lora_module mlp
--int8_training True"""
STRATEGYQA_EVAL = f"""--base_model_name_or_path {MODEL} --hf_hub_token .......
--model_name_or_path {STRATEGYQA_FOLDER}/checkpoint-{STEPS} --add_soft_prompts True
--parameter_efficient_mode lora+prompt-tuning --dataset stratgeqa_agent --batch_size 1 --max_length 700 --seed 300
--extract_step_type_tokens memory --embedding_model_name {MODEL} --num_plan_types 5 --num_test {QUESTIONS}
--load_in_8bit True"""
TRUTHFULQA_FOLDER = (
    f"./checkpoints/{MODEL}/truthfulqa_agent/step_type=memory-3-4-efficient=lora+prompt-tuning-lr=2e-4-soft-prompt=True"
)
TRUTHFULQA_TRAIN = f"""--model_name_or_path {MODEL} --add_soft_prompts True --num_general_prefix_tokens 3
--num_special_prefix_tokens 4 --parameter_efficient_mode lora+prompt-tuning --dataset truthfulqa_agent --fp16 True
--output_dir {TRUTHFULQA_FOLDER} --model_max_length 850 --max_steps {STEPS} --per_device_train_batch_size 1
--per_device_eval_batch_size 1 --evaluation_strategy "epoch" --save_strategy "epoch" --save_total_limit 200
--learning_rate 2e-4 --weight_decay 0. --warmup_steps 1000 --lr_scheduler_type "cosine" --logging_steps 1
--optim "adamw_torch" --gradient_accumulation_steps 16 --embedding_model_name {MODEL}
--extract_step_type_tokens memory --num_plan_types 5 --num_test {QUESTIONS} --lora_module mlp --int8_training True"""


def memreason(words: list[str], folder: Path, environment: dict[str, str]) -> None:
    start = time.monotonic()
    command = [sys.executable, "-m", "memreason", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    print(f"{time.monotonic() - start:6.1f} s  exit {done.returncode}  memreason {' '.join(words)[:90]}", flush=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])


def place_files(shared: Path, folder: Path, environment: dict[str, str]) -> None:
    """Labelled files where a user would have put them."""
    labelled = shared / "data" / "labelled"
    for split in ("train", "test"):
        source = labelled / f"StrategyQA_{split}_clean.json"
        memreason(["data", "import", str(source), "--task", "strategyqa", "--split", split], folder, environment)
    published = folder / "load_data" / "dataset_folder"
    published.mkdir(parents=True)
    for path in labelled.glob("truthful_qa_*_clean_CC.json"):
        shutil.copy(path, published)


def check(folder: Path, n_prefix: int, evaluations: int) -> None:
    """What a reader of the run folder expects after these commands."""
    checkpoint = folder / f"checkpoint-{STEPS}"
    recipe = (checkpoint / "recipe.yaml").read_text(encoding="utf-8")
    scheme = json.loads((checkpoint / "token_scheme.json").read_text(encoding="utf-8"))
    state = json.loads((checkpoint.parent / "trainer_state.json").read_text(encoding="utf-8"))
    assert "quantize: 8bit" in recipe, recipe
    assert "your token" not in recipe
    assert (scheme["n_prefix"], scheme["n_special"]) == (n_prefix, 4), scheme
    assert any("eval_acc" in entry for entry in state["log_history"]), state
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == STEPS, losses
    assert all(0 < loss < 10 for loss in losses), losses
    weights = (checkpoint / "adapter_model.safetensors").stat().st_size
    assert weights < 50_000_000, f"{weights} bytes: more than the trained matrices were saved"
    found = [json.loads(path.read_text(encoding="utf-8")) for path in checkpoint.glob("eval/*/results.json")]
    assert [results["n"] for results in found] == [QUESTIONS] * evaluations, found
    print(f"{folder.parent.name}: losses {losses}, adapter {weights / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="folder that holds data/labelled")
    shared = parser.parse_args().shared.resolve()
    from memreason.core.files import cache_dir
    from memreason.encode.base import pull

    pull(MODEL)
    with tempfile.TemporaryDirectory() as scratch:
        folder, home = Path(scratch), Path(scratch) / "home"
        home.mkdir()
        (home / "models").symlink_to(cache_dir() / "models")
        environment = {**os.environ, "MEMREASON_HOME": str(home)}
        environment.pop("HF_TOKEN", None)
        place_files(shared, folder, environment)
        memreason(["train", *shlex.split(STRATEGYQA_TRAIN)], folder, environment)
        memreason(["eval", *shlex.split(STRATEGYQA_EVAL)], folder, environment)
        memreason(["train", *shlex.split(TRUTHFULQA_TRAIN)], folder, environment)
        check(folder / STRATEGYQA_FOLDER, 2, evaluations=1)
        check(folder / TRUTHFULQA_FOLDER, 3, evaluations=0)


if __name__ == "__main__":
    main()
