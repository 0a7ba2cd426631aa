"""The command line from end to end on a model made in memory, and the commands that the README shows."""

import json
import re
import shlex
from pathlib import Path

import pytest

import memreason
from conftest import byte_level, tiny_model
from memreason.cli import _parser, _part, main
from memreason.core.files import read_json, read_traces
from memreason.core.recipe import load_recipe, shipped
from memreason.published import is_published, pairs
from memreason.verbs.table import VERBS

ROOT = Path(memreason.__file__).parents[2]
README = ROOT / "README.md"


def readme_commands() -> list[str]:
    blocks = re.findall(r"```\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"(make|memreason|python) ", line.replace(" # ", "  #"))]


def test_readme_opens_with_the_two_commands() -> None:
    commands = [command.split("#")[0].strip() for command in readme_commands()]
    assert commands[:2] == ["make demo", "make test"]
    assert len(commands) > 8


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_are_understood(command: str) -> None:
    program, *words = shlex.split(command, comments=True)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif program == "python":
        assert (ROOT / words[0]).is_file()
    else:
        own, fields = _part(words)
        known = _parser().parse_args(own)
        if known.verb in ("run", "train") and not is_published(fields):
            load_recipe(known.recipe, list(pairs(fields)))


def test_readme_file_map_is_true() -> None:
    text = README.read_text(encoding="utf-8").split("## File map")[1]
    named = set(re.findall(r"^  (\w+(?:\.py|/))", text, re.MULTILINE))
    package = Path(memreason.__file__).parent
    there = {path.name + "/" * path.is_dir() for path in package.iterdir() if not path.name.startswith("_")}
    assert named == there - {"py.typed"}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMREASON_HOME", str(tmp_path / "home"))
    folder = tmp_path / "base"
    tokenizer = byte_level()
    tiny_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SMALL = [
    "--data.n_train", "24", "--train.n_select", "2", "--train.logging_steps", "1", "--eval.n", "6",
    "--eval.max_new_tokens", "12", "--model.dtype", "fp32", "--train.disable_tqdm", "true", "--output_dir", "out",
]  # fmt: skip


def test_run_eval_ask(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "--model.base", str(base), *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    assert "results.json" in printed
    run = Path("out")
    assert "out/report.html" in printed and "Traces" in (run / "report.html").read_text(encoding="utf-8")
    assert read_json(run / "manifest.json")["best"]["by"] == "eval_acc on validation"
    assert read_json(run / "manifest.json")["metrics"]["peak_memory"] > 0
    assert any("eval_acc" in entry for entry in read_json(run / "trainer_state.json")["log_history"])
    (folder,) = run.glob("checkpoint-3/eval/atlas-test-*")
    samples = read_traces(folder / "samples.jsonl")
    assert len({trace.question.id for trace in samples}) == read_json(folder / "results.json")["n"] == 6
    assert (folder / "generations.txt").read_text(encoding="utf-8").startswith("Question: ")

    assert main(["train", "demo", "--model.base", str(base), *SMALL]) == 0  # nothing to do a second time
    assert "trained already" in capsys.readouterr().out
    assert main(["train", "demo", "--model.base", str(base), *SMALL, "--seed", "5"]) == 2
    assert "another recipe (differs in seed" in capsys.readouterr().err

    assert main(["ask", "out", "Is Lima in Asia?", "--choice", "yes", "--choice", "no"]) == 0
    assert "Is Lima in Asia?" in capsys.readouterr().out


def test_any_run_on_any_task(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "demo", "--model.base", str(base), *SMALL]) == 0
    rows = [{"question": f"Is {n} even?", "answer": n % 2 == 0, "cot_steps": ["[rag]: a fact"]} for n in range(5)]
    Path("labelled.json").write_text(json.dumps(rows), encoding="utf-8")
    assert main(["data", "import", "labelled.json", "--task", "strategyqa", "--split", "test"]) == 0
    assert main(["eval", "out", "--task", "strategyqa", "--eval.n", "4", "--show", "1"]) == 0
    (folder,) = Path("out").glob("checkpoint-3/eval/strategyqa-test-*")
    assert read_json(folder / "results.json")["n"] == 4
    assert main(["data", "atlas", "own.jsonl", "-n", "5", "--split", "validation"]) == 0
    assert main(["eval", "out", "--task", "own.jsonl", "--eval.n", "3"]) == 0
    (folder,) = Path("out").glob("checkpoint-3/eval/own-test-*")
    assert read_json(folder / "results.json")["n"] == 3
    capsys.readouterr()
    assert main(["eval", "out", "--task", "nonsense"]) == 2
    assert "unknown task 'nonsense'" in capsys.readouterr().err
    assert main(["eval", "out", "--train.learning_rate", "1"]) == 2
    assert "--train.learning_rate: only eval.* and model.quantize" in capsys.readouterr().err


def test_own_files_with_weights(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "atlas", "a.jsonl", "-n", "20", "--hops", "1"]) == 0
    assert re.search(r"capital_is +1 +4 +0\.50 +0\.50", capsys.readouterr().out)  # form, hops, n, chance, majority
    assert main(["data", "atlas", "b.jsonl", "-n", "10", "--hops", "2", "--seed", "3"]) == 0
    words = ["train", "--model.base", str(base), "--data", "a.jsonl", "--data", "b.jsonl:2", *SMALL]
    words[words.index("24")] = "40"
    assert main([*words, "--data.validation", "0"]) == 0
    manifest = read_json("out/manifest.json")
    assert manifest["rows"]["train"] == 20 + 2 * 10
    assert set(manifest["data"]) == {"a.jsonl", "b.jsonl"}
    assert manifest["best"]["by"] == "last"


def test_dry_run_trains_nothing(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "demo", "--model.base", str(base), *SMALL, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for figure in ("examples", "tokens", "steps", "3 of 8 examples", "trainable parameters", "memory, estimated"):
        assert figure in printed
    assert printed.count("<memory_0>") >= 3
    assert not Path("out").exists()


def test_data_and_models(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    assert main(["data", "show", "atlas", "-n", "2", "--split", "test"]) == 0
    assert main(["models", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("strategyqa", "truthfulqa", "memory", "answer", "smollm2-135m"))


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name, verb in VERBS.items():
        with pytest.raises(SystemExit) as stopped:
            main([*name.split(), "--help"])
        assert stopped.value.code == 0
        assert verb.text in capsys.readouterr().out
        assert all("help" in settings or settings.get("metavar") for settings in verb.arguments.values())
    assert "demo" in shipped()


def test_python_page_runs(base: Path) -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    small = f'"model.base": {str(base)!r}, "eval.max_new_tokens": 12, "train.disable_tqdm": True, "output_dir":'
    assert code.count('"output_dir":') == 1
    exec(compile(code.replace('"output_dir":', small), "python.md", "exec"), {"BASE": str(base)})
