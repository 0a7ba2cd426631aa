"""Other people's evaluators: the real lm-eval asks what we ask, reads what we read, and its log and ours are one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import own_traces, save_base, tiny_recipe
from memreason import pipeline
from memreason.cli import main
from memreason.core.files import read_json, read_jsonl, write_traces
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question, Step, Trace
from memreason.data.tasks import load_eval
from memreason.encode.codec import Codec
from memreason.evaluators import lm_eval_log, lm_eval_tasks
from memreason.finetune.checkpoint import load_checkpoint, open_checkpoint
from memreason.measure.score import score, score_trace
from memreason.publish.chat import chat_ids, chat_template, prompt_ids
from memreason.publish.export import write_model
from memreason.publish.lm_eval_tasks import LM_EVAL_TASKS, lm_eval_doc, write_tasks
from memreason.publish.merge import merge

CASES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("answer_cases.json").read_text(encoding="utf-8"))
ALONE = """
import json, sys
sys.modules["memreason"] = None  # whoever imports it fails
sys.path.insert(0, sys.argv[1])
import answers
print(json.dumps([answers.read_answers([[text]], [doc])[0][0] for text, doc in json.load(sys.stdin)]))
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy that has learnt its traces nearly by heart, exported."""
    folder = tmp_path_factory.mktemp("lm-eval")
    learnt = {"train.max_steps": 60, "eval.max_new_tokens": 90, "method.name": "full", "train.learning_rate": 3e-3}
    run = pipeline.train(tiny_recipe(folder, save_base(folder / "base"), **learnt))
    loaded = load_checkpoint(run)
    write_model(folder / "export", folder / "export", merge(loaded), loaded, "fp32")
    return folder / "export"


def read_beside(folder: Path, asked: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What the written folder reads in these texts, in a process without memreason."""
    command = [sys.executable, "-I", "-c", ALONE, str(folder)]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def test_a_task_asks_what_eval_asks(export: Path, tmp_path: Path) -> None:
    assert lm_eval_tasks(export, tmp_path, ["atlas"], {"eval.n": 40}) == ["memreason_atlas"]
    opened = open_checkpoint(export)
    docs = [doc for _, doc in read_jsonl(tmp_path / "atlas.jsonl")]
    wanted = [trace.question for trace in load_eval("atlas", "test", opened.recipe.data, 40, seed=0)]
    assert [(doc["id"], doc["answer"]) for doc in docs] == [(one.id, one.answer) for one in wanted]
    template = chat_template(opened.codec)
    for doc, question in zip(docs, wanted, strict=True):
        assert chat_ids(opened.codec.tokenizer, doc["prompt"], template) == prompt_ids(opened.codec, question)
    assert "max_gen_toks: 90" in (tmp_path / "_memreason_yaml").read_text()


def test_a_file_for_each_promised_task() -> None:
    assert {"atlas", "strategyqa", "commonsenseqa", "truthfulqa"} == set(LM_EVAL_TASKS)


def test_a_task_without_a_file_is_named(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lm-eval", "tasks", str(export), "--task", "gsm8k", "--out", str(tmp_path)]) == 2
    assert "there is no lm-eval task for gsm8k, only for atlas" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_rule_beside_the_tasks_is_ours(byte_codec: Codec, tmp_path: Path) -> None:
    """Of texts without blocks, and of rendered traces, whole and broken."""
    write_tasks(tmp_path, byte_codec, {"atlas": [Question("Is Lima the capital of Peru?", "True")]}, 90)
    asked: list[tuple[str, dict[str, Any]]] = []
    wanted: list[str | None] = []
    for case in CASES:
        if case.get("kind"):
            continue
        choices = [f"choice {n}" for n in range(case["choices"] or 0)] or None
        question = Question("Which?", case["gold"], choices=tuple(choices) if choices else None)
        asked.append((case["text"], lm_eval_doc(byte_codec, question)))
        wanted.append(score(case["text"], case["gold"], choices=case["choices"]).extracted)
    steps = (Step(("memory",), "The answer is: B"), Step(("reason",), "Lima is a city."))
    letters = Question("Which is a city?", "B", choices=("Peru", "Lima", "Inca"))
    for prediction in ("B", "A or B", "D", "", "Lima", "The answer is: C"):
        ids = byte_codec.render(Trace(letters, steps, prediction))[len(byte_codec.opening()) :]
        cuts = [len(ids), ids.index(byte_codec.blocks["answer"][0]), *range(8, len(ids), 7)]
        for cut in cuts:
            asked.append((byte_codec.decode(ids[:cut]), lm_eval_doc(byte_codec, letters)))
            wanted.append(score_trace(byte_codec.parse(letters, byte_codec.opening() + ids[:cut])).extracted)
    found = read_beside(tmp_path, asked)
    assert len(found) > 100
    assert found == [one or "[invalid]" for one in wanted]


def test_the_real_lm_eval_gives_our_accuracy_and_our_log(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    evaluator = pytest.importorskip("lm_eval.evaluator")
    from lm_eval import utils
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    traces = own_traces(30)  # 24 that were learnt, and others
    write_traces(tmp_path / "strategyqa.jsonl", traces)
    opened = open_checkpoint(export)
    settings = EvalRecipe(task=str(tmp_path / "strategyqa.jsonl"), max_new_tokens=90, batch_size=8)
    ours = pipeline.evaluate(export, settings=settings)
    tasks = write_tasks(tmp_path / "tasks", opened.codec, {"strategyqa": [t.question for t in traces]}, 90)
    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
    theirs = evaluator.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(export), "dtype": "float32"},
        tasks=tasks,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        apply_chat_template=True,
        batch_size=4,
        device="cpu",
        log_samples=True,
        evaluation_tracker=tracker,
    )
    found = theirs["results"]["memreason_strategyqa"]
    assert 0 < ours["accuracy"] < 1  # the toy tells right from wrong, and lm-eval sees the same
    assert found["exact_match,answer-line"] == pytest.approx(ours["accuracy"], abs=1e-12)
    assert found["no_answer,answer-line"] == pytest.approx(ours["no_answer"], abs=1e-12)

    samples = theirs.pop("samples")
    tracker.save_results_aggregated(theirs, samples)
    tracker.save_results_samples("memreason_strategyqa", samples["memreason_strategyqa"])
    (their_results,) = (tmp_path / "theirs").rglob("results_*.json")
    (their_samples,) = (tmp_path / "theirs").rglob("samples_*.jsonl")
    results, log = lm_eval_log(Path(ours["folder"]), tmp_path / "log")
    a, b = ([row for _, row in read_jsonl(path)] for path in (log, their_samples))
    assert a == b
    mine, real = read_json(results), read_json(their_results)
    assert mine["results"] == {
        name: {key: pytest.approx(value) for key, value in row.items()} for name, row in real["results"].items()
    }
    for key in ("task_hashes", "versions", "n-shot", "n-samples", "higher_is_better", "group_subtasks"):
        assert mine[key] == real[key], key
    for key in ("chat_template", "chat_template_sha", "tokenizer_eos_token", "model_name", "fewshot_as_multiturn"):
        assert mine[key] == real[key], key
    names = [path.as_posix() for path in (results, log)]
    assert utils.get_results_filenames(names) == names[:1]
    assert utils.get_sample_results_filenames(names) == names[1:]
    assert utils.get_file_task_name(log.name) == "memreason_strategyqa"
