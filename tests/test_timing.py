"""The bench: its jobs compute the same, and its table says which way is better."""

from pathlib import Path

import pytest

from conftest import save_base, tiny_recipe
from memreason import pipeline
from memreason.report.terminal import print_bench
from memreason.timing import evaluation, training
from memreason.timing.table import table


def test_the_bench_times_the_same_training(tmp_path: Path) -> None:
    """In fp32 the plain Trainer loop and ours see the same examples and have the same losses."""
    recipe = tiny_recipe(tmp_path, save_base(tmp_path / "base"))
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    spec = {"recipe": str(path), "batch": 4, "steps": 3, "dtype": "fp32", "micro": 2, "compile": False}
    overrides = [("train.lr_scheduler_type", "linear"), ("train.learning_rate", 1e-3)]
    ours = training.train_memreason({**spec, "overrides": overrides})
    plain = training.train_plain(spec)
    assert ours["losses"] == pytest.approx(plain["losses"], abs=2e-4)
    trl = training.train_trl(spec)
    assert ours["step_tokens"] == plain["step_tokens"] == trl["step_tokens"]
    assert [one["examples"] for one in (ours, plain, trl)] == [12 - 4, 12 - 1, 12 - 2]  # the first pass warms up
    run = pipeline.train(recipe)
    asked = {"run": str(run), "merged": str(tmp_path / "merged"), "prompts": str(tmp_path / "p.json"), "questions": 5}
    asked |= {"max_new_tokens": 12, "dtype": "fp32", "batch_size": 2}
    assert evaluation.export(asked) == {"prompts": 5}
    mine, theirs = evaluation.eval_memreason(asked), evaluation.eval_transformers(asked)
    assert mine["tokens"] == theirs["tokens"]


def _rounds(**figures: float) -> list[dict[str, float]]:
    return [figures, figures]


def test_the_table_tells_better_from_worse(capsys: pytest.CaptureFixture[str]) -> None:
    fast = {"tokens_per_second": 800.0, "peak_memory": 2.0 * 2**30, "parameters": 1e8}
    slow = {"tokens_per_second": 200.0, "peak_memory": 4.0 * 2**30}
    found = {
        "machine": {"gemm_bf16": 640.0, "gemm_fp32": 200.0, "read_bandwidth": 50.0, "threads": 2, "processor": "toy"},
        "start": {"help_seconds": 0.04},
        "training": {"memreason": _rounds(**fast), "plain loop": _rounds(**slow), "TRL, bf16, batch 1": [slow]},
        "evaluation": {
            "memreason": [{"tokens_per_second": 500.0, "wall_seconds": wall} for wall in (5.0, 10.0)],
            "generate sorted, bf16, batch 64": _rounds(tokens_per_second=250.0),
            "vLLM": _rounds(tokens_per_second=1000.0, wall_seconds=20.0),
        },
        "encoding": {"ratio": 0.9, "streamed": 9.0, "bare": 10.0},
    }
    rows = {(row["job"], row["against"]): row for row in table(found)}
    ratios = {against: [] for _, against in rows}
    for (_, against), row in rows.items():
        ratios[against].append(row.get("ratio"))
    assert ratios == {
        "plain loop": [4.0, 2.0],
        "TRL, bf16, batch 1": [4.0],
        "generate sorted, bf16, batch 64": [2.0],
        "vLLM": [3.0, 0.5],
        "4 x parameters x tokens": [0.5],
        "encode_batch_fast": [0.9],
        "": [None],
    }
    wall = rows["evaluation, wall clock, s", "vLLM"]
    assert (wall["from"], wall["to"], wall["ours"], wall["theirs"]) == (2.0, 4.0, 7.5, 20.0)
    print_bench({**found, "table": list(rows.values())})
    assert "2.00 to 4.00" in capsys.readouterr().out
