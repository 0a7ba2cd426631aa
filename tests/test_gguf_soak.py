"""llama.cpp's own converter and llama.cpp itself, behind `make soak`: the same ids, the same answers as here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import own_traces, save_base, sentencepiece_bpe, tiny_model, tiny_recipe
from memreason import exports, pipeline
from memreason.core.errors import ExportError
from memreason.core.files import read_json, read_jsonl
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question, Trace
from memreason.encode.codec import Codec
from memreason.finetune.checkpoint import load_checkpoint, open_checkpoint
from memreason.generate.engines import generate
from memreason.measure.score import score_trace
from memreason.publish import gguf as room
from memreason.publish.chat import prompt_ids
from memreason.publish.gguf import GGUF, export_gguf

pytestmark = pytest.mark.soak
COUNT = 100
SETTINGS = {"n": COUNT, "max_new_tokens": 160}


def asked_of_llama_cpp(folder: Path, codec: Codec, questions: Sequence[Question], longest: int, chats: int) -> Any:
    """What llama.cpp makes of the questions as ids, and of the first `chats` of them as messages."""
    given = {
        "file": str(folder / GGUF),
        "prompts": [prompt_ids(codec, question) for question in questions],
        "messages": [codec.scheme.message(question) for question in questions[:chats]],
        "texts": ["".join(codec.scheme.tokens)],
        "max_tokens": longest,
    }
    command = [sys.executable, str(Path(__file__).with_name("ask_llama_cpp.py"))]
    done = subprocess.run(command, input=json.dumps(given), stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["texts"] == [list(codec.describe().values())]  # blocks are single ids, one for one
    assert found["prompts"] == given["prompts"][:chats]  # messages are read as the trained prompts
    assert [size for size, _ in found["chats"]] == [len(prompt) for prompt in given["prompts"][:chats]]  # one BOS
    return found


@pytest.fixture(scope="module")
def local(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the engine here generates in fp32: of merged weights, as a run is answered in the machine's dtype."""
    merged = exports.export(demo_run, tmp_path_factory.mktemp("out") / "fp32", dtype="fp32")
    settings = load_checkpoint(demo_run).recipe.eval.model_copy(update=SETTINGS)
    folder = Path(pipeline.evaluate(merged, settings=settings)["folder"])
    return [line for _, line in read_jsonl(folder / "samples.jsonl")]


@pytest.mark.parametrize(("kind", "ids_alike", "within"), [("f16", 0.97, 0.02), ("q8_0", 0.75, 0.05)])
def test_llama_cpp_answers_as_transformers_does(
    demo_run: Path, local: list[dict[str, Any]], tmp_path: Path, kind: str, ids_alike: float, within: float
) -> None:
    folder = exports.export(demo_run, tmp_path / kind, to="gguf", gguf_type=kind)
    codec = open_checkpoint(folder).codec
    questions = [Trace.from_json(line).question for line in local]
    found = asked_of_llama_cpp(folder, codec, questions, 160, 10)
    made = [codec.parse(one, codec.opening() + ids) for one, ids in zip(questions, found["made"], strict=True)]
    right = [score_trace(trace).verdict == "correct" for trace in made]
    known = [score_trace(Trace.from_json(line)).verdict == "correct" for line in local]
    alike = [line["ids"] == codec.opening() + ids for line, ids in zip(local, found["made"], strict=True)]
    answers = [line["prediction"] == trace.prediction for line, trace in zip(local, made, strict=True)]
    well_formed = sum(not trace.faults for trace in made)
    print(
        f"{kind}, {read_json(folder / 'export.json')['checks']['GGUF']}: accuracy {sum(right)} of {len(right)} (here "
        f"{sum(known)}), the same ids {sum(alike)}, the same answer {sum(answers)}, well formed {well_formed}"
    )
    assert sum(alike) >= ids_alike * len(alike)
    assert abs(sum(right) - sum(known)) <= within * len(right)
    texts = [codec.decode(ids[:-1] if ids[-1] == codec.eos_id else ids) for ids in found["made"][:10]]
    assert [text for _, text in found["chats"]] == texts  # blocks are printed, the end is not


def sentencepiece_run(folder: Path) -> Path:
    """A run of a tiny Llama whose tokenizer is a SentencePiece BPE with a BOS, as Llama-2's and Mistral's are."""
    tokenizer = sentencepiece_bpe()
    tiny_model(len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return pipeline.train(tiny_recipe(folder, folder / "base", **{"eval.max_new_tokens": 16}))


def test_sentencepiece_texts_are_read_as_the_trained_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = sentencepiece_run(tmp_path)
    loaded = load_checkpoint(run)
    questions = [trace.question for trace in own_traces(4)]
    export_gguf(run, tmp_path / "out", questions, kind="f32")
    found = asked_of_llama_cpp(tmp_path / "out", loaded.codec, questions, 16, 4)
    settings = EvalRecipe(max_new_tokens=16)
    batches = generate(loaded.model, loaded.codec, questions, settings)
    here = {one.question.id: one.ids for batch in batches for one in batch}
    assert [loaded.codec.opening() + ids for ids in found["made"]] == [here[question.id] for question in questions]
    monkeypatch.setattr(room, "_rank_pieces", lambda file, model: None)
    export_gguf(run, tmp_path / "unranked", questions, kind="f32")
    with pytest.raises(AssertionError):
        asked_of_llama_cpp(tmp_path / "unranked", loaded.codec, questions, 16, 4)


def test_what_the_converter_does_not_know_is_refused_in_one_line(tmp_path: Path) -> None:
    """A byte-level tokenizer that no published model has."""
    run = pipeline.train(tiny_recipe(tmp_path, save_base(tmp_path / "base")))
    with pytest.raises(ExportError, match=r"refuses this model.*pre-tokenizer was not recognized"):
        export_gguf(run, tmp_path / "out", [trace.question for trace in own_traces(2)])
    assert not (tmp_path / "out").exists()
