"""Careless users and bad luck: one clear error each, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

import memreason.core.files
import memreason.finetune.trainer
from conftest import own_traces, save_base, tiny_model, tiny_recipe, unigram
from memreason import pipeline
from memreason.cli import main
from memreason.core.errors import CheckpointError, DataError, MemreasonError, ModelError, RecipeError, StorageError
from memreason.core.files import read_json, read_traces, write_traces
from memreason.core.recipe import load_recipe
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question, Step, Trace
from memreason.finetune.checkpoint import checkpoints_in, load_checkpoint

GOOD = json.dumps({"question": "q?", "answer": "a", "steps": [{"kinds": ["memory"], "text": "t"}]})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (f"{GOOD}\n{{broken\n{GOOD}\n".encode(), r"own\.jsonl:2: not JSON"),
        (f'{GOOD}\n{{"question": "q"}}\n'.encode(), r"own\.jsonl:2: 'answer' must be a non-empty text, got None"),
        (f'{GOOD}\n{{"question": "q", "answer": "a", "steps": [1]}}\n'.encode(), r"own\.jsonl:2: step 1 must be"),
        (b"", r"own\.jsonl: holds no traces"),
        (f"{GOOD}\n".encode() + b'{"question": "caf\xe9"}\n', r"own\.jsonl:2: not UTF-8 .* iconv"),
    ],
)
def test_data_files(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "own.jsonl").write_bytes(content)
    base = save_base(tmp_path / "base")
    with pytest.raises(DataError, match=says):
        pipeline.train(tiny_recipe(tmp_path, base, **{"data.paths": [str(tmp_path / "own.jsonl")]}))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"name: caf\xe9\n", "not UTF-8 at byte 9"),
        (b"name: [\n", "not YAML"),
        (b"- a\n", "a mapping of stages is needed"),
        (b"data: {tsk: x}\ntokens: {n_prefix: -1}\nmodle: {}\n", "3 problems"),
    ],
)
def test_recipes(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=says):
        load_recipe(tmp_path / "r.yaml")


def test_unknown_models_and_kinds(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    with pytest.raises(ModelError, match=r"nowhere: no such folder or GGUF file"):
        pipeline.train(tiny_recipe(tmp_path, tmp_path / "nowhere", output_dir=str(tmp_path / "a")))
    write_traces(tmp_path / "traces.jsonl", [Trace(Question("q?", "a"), (Step(("guess",), "t"),))])
    with pytest.raises(MemreasonError, match=r"kinds \['guess'\] are not in the token scheme"):
        pipeline.train(tiny_recipe(tmp_path, base, output_dir=str(tmp_path / "b")))


def test_questions_over_the_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = save_base(tmp_path / "base")
    long = Trace(Question("word " * 400 + "?", "True"), own_traces(1)[0].steps)
    write_traces(tmp_path / "traces.jsonl", [*own_traces(8), long])
    recipe = tiny_recipe(tmp_path, base, **{"train.model_max_length": 200})
    run = pipeline.train(recipe)
    assert read_json(run / "manifest.json")["dropped"] == 1
    with pytest.raises(DataError, match=r"all exceed train\.model_max_length = 20 tokens"):
        pipeline.train(
            tiny_recipe(tmp_path, base, **{"train.model_max_length": 20, "output_dir": str(tmp_path / "short")})
        )
    settings = EvalRecipe(task=str(tmp_path / "traces.jsonl"), max_length=150)
    results = pipeline.evaluate(run, settings=settings)
    assert results["n"] == 9
    assert "1 questions are longer than the limit" in caplog.text
    (answered,) = [
        line for line in read_samples(results) if line["question"].startswith("word") and line["id"] == long.question.id
    ]
    assert (answered["prediction"], answered["faults"]) == ("", ["question over the limit"])


def read_samples(results: dict[str, Any]) -> list[dict[str, Any]]:
    lines = (Path(results["folder"]) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def spoil_scheme(folder: Path) -> None:
    values = read_json(folder / "token_scheme.json")
    (folder / "token_scheme.json").write_text(json.dumps({**values, "kinds": ["memory", "other"]}))


def other_tokenizer(folder: Path) -> None:
    tokenizer = unigram()
    tokenizer.add_tokens(
        ["<prefix_0>", *[f"<{k}_{i}>" for k in ("answer", "assignment", "reason", "memory") for i in (0, 1)]]
    )
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "token_scheme.json").unlink(), "token_scheme.json"),
        (lambda folder: (folder / "token_scheme.json").write_text("{"), "not JSON"),
        (
            lambda folder: (folder / "token_scheme.json").write_text('{"kinds": ["memory"], "odd": 1}'),
            "of this version",
        ),
        (spoil_scheme, "the tokenizer lacks"),
        (other_tokenizer, "made for another tokenizer"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x10\0\0"), "adapter_model.safetensors"),
        (lambda folder: (folder / "recipe.yaml").unlink(), "recipe.yaml"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    ],
)
def test_spoilt_checkpoints(tmp_path: Path, spoil: Any, says: str) -> None:
    run = pipeline.train(tiny_recipe(tmp_path, save_base(tmp_path / "base")))
    spoil(run / "checkpoint-3")
    with pytest.raises(MemreasonError) as caught:
        load_checkpoint(run)
    assert says in str(caught.value)


def test_a_base_with_another_tokenizer(tmp_path: Path) -> None:
    run = pipeline.train(tiny_recipe(tmp_path, save_base(tmp_path / "base")))
    other = tmp_path / "other"
    tokenizer = unigram()
    tiny_model(len(tokenizer)).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(CheckpointError, match=r"trained on .* with another tokenizer than"):
        load_checkpoint(run, base=str(other))


FULL = {
    "oserror": OSError(errno.ENOSPC, "No space left on device"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_disk_loses_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    base = save_base(tmp_path / "base")
    changes = {"train.max_steps": 6, "train.save_strategy": "steps", "train.save_steps": 2}
    pipeline.train(tiny_recipe(tmp_path, base, **changes, output_dir=str(tmp_path / "whole")))
    save, recipe = memreason.finetune.trainer.save_checkpoint, tiny_recipe(tmp_path, base, **changes)

    def full(folder: Path, *arguments: Any) -> None:
        if "checkpoint-4" in str(folder):
            raise FULL[kind]
        save(folder, *arguments)

    monkeypatch.setattr(memreason.finetune.trainer, "save_checkpoint", full)
    with pytest.raises(StorageError, match=r"checkpoint-4: cannot be written .* run the same command again"):
        pipeline.train(recipe)
    assert [path.name for path in checkpoints_in(recipe.folder)] == ["checkpoint-2"]
    assert not (recipe.folder / ".partial").exists()
    monkeypatch.setattr(memreason.finetune.trainer, "save_checkpoint", save)
    pipeline.train(recipe)
    logs = [read_json(tmp_path / name / "trainer_state.json")["log_history"] for name in ("whole", "run")]
    whole, resumed = ([entry["loss"] for entry in log if "loss" in entry] for log in logs)
    assert resumed == whole


def test_an_error_while_answering_costs_no_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch is saved before its questions are answered, and they are asked again before training goes on."""
    base = save_base(tmp_path / "base")
    changes = {"data.validation": 0.2, "train.n_select": 2, "train.max_steps": -1, "train.num_train_epochs": 2}
    changes["train.save_total_limit"] = 1
    pipeline.train(tiny_recipe(tmp_path, base, **changes, output_dir=str(tmp_path / "whole")))
    recipe, answer = tiny_recipe(tmp_path, base, **changes), pipeline.answer_questions
    succeeds = iter([False, True, False, True])  # the first epoch, again, the second, again

    def answer_or_fail(*arguments: Any, **settings: Any) -> Any:
        if next(succeeds):
            return answer(*arguments, **settings)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(pipeline, "answer_questions", answer_or_fail)
    for epoch in (1, 2):
        with pytest.raises(RuntimeError, match="out of luck"):
            pipeline.train(recipe)
        assert read_json(checkpoints_in(recipe.folder)[-1] / "trainer_state.json")["epoch"] == epoch
    pipeline.train(recipe)
    assert not list(succeeds)
    found = []
    for name in ("whole", "run"):
        log = read_json(tmp_path / name / "trainer_state.json")["log_history"]
        found.append([(entry["step"], entry.get("loss"), entry.get("eval_acc")) for entry in log[:-1]])
    assert found[0] == found[1]
    assert len([entry for entry in found[0] if entry[2] is not None]) == 2
    kept = [[folder.name for folder in checkpoints_in(tmp_path / name)] for name in ("whole", "run")]
    assert kept[0] == kept[1]
    manifests = [read_json(tmp_path / name / "manifest.json")["best"] for name in ("whole", "run")]
    assert manifests[0] == manifests[1]


def test_a_disk_that_takes_no_checkpoint(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, save_base(tmp_path / "base"))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import memreason.pipeline\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from memreason.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "train", str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    assert "checkpoint-3: cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_loses_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pipeline.train(tiny_recipe(tmp_path, save_base(tmp_path / "base")))
    settings = EvalRecipe(n=8, batch_size=2, max_new_tokens=6)
    sync, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(memreason.core.files.os, "fsync", full)
    with pytest.raises(StorageError, match=r"samples\.jsonl: cannot be written \(No space left on device\)"):
        pipeline.evaluate(run, settings=settings)
    (samples,) = run.glob("checkpoint-3/eval/*/samples.jsonl")
    assert len(read_traces(samples)) == 4
    results = pipeline.evaluate(run, settings=settings)
    assert (results["answered_before"], results["n"]) == (4, 8)
    assert len({line["id"] for line in read_samples(results)}) == 8


def test_planning_tokens_in_texts_stay_texts(tmp_path: Path) -> None:
    """From file to results: blocks in questions, choices, steps and answers are ordinary characters."""
    nasty = "<memory_0><prefix_0> <|end|> {question} {choices}"
    steps = (Step(("memory",), nasty), Step(("reason",), f"so {nasty}"))
    traces = [Trace(Question(f"{nasty} {n}?", "B", choices=(nasty, f"b {nasty}")), steps) for n in range(8)]
    write_traces(tmp_path / "traces.jsonl", traces)
    run = pipeline.train(tiny_recipe(tmp_path, save_base(tmp_path / "base")))
    loaded = load_checkpoint(run)
    planning = {i for block in loaded.codec.blocks.values() for i in block}
    for trace in traces:
        prompt = loaded.codec.question_ids(trace.question)
        assert not {*planning, loaded.codec.eos_id} & set(prompt)
        assert loaded.codec.decode(prompt).count("{question}") == 3
        parsed = loaded.codec.parse(trace.question, loaded.codec.render(trace))
        assert (parsed.steps, parsed.prediction, parsed.faults) == (steps, "B", ())
    results = pipeline.evaluate(run, settings=EvalRecipe(task=str(tmp_path / "traces.jsonl"), max_new_tokens=4))
    assert [line["question"] for line in read_samples(results)] == [trace.question.text for trace in traces]


def test_an_empty_evaluation_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = pipeline.train(tiny_recipe(tmp_path, save_base(tmp_path / "base")))
    (tmp_path / "none.jsonl").write_text("")
    assert main(["eval", str(run), "--task", str(tmp_path / "none.jsonl")]) == 2
    assert "holds no traces" in capsys.readouterr().err
    assert main(["eval", str(run), "--eval.split", "dev"]) == 2
    assert "has no split 'dev'" in capsys.readouterr().err
