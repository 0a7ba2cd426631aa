"""An exported model in other engines, behind `make soak`: the same questions, the same answers as here."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest

from memreason import pipeline
from memreason.core.files import read_json, read_jsonl
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Trace
from memreason.data.atlas import make_atlas
from memreason.finetune.checkpoint import open_checkpoint
from memreason.publish.export import export_model
from real_servers import OFFLINE, SMALL, VLLM, needs_vllm, transformers_serve, vllm_serve

pytestmark = pytest.mark.soak
COUNT = 24
SETTINGS = {"n": COUNT, "batch_size": 8, "max_new_tokens": 120}
Samples = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def exported(request: pytest.FixtureRequest, demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / request.param
    export_model(demo_run, out, [trace.question for trace in make_atlas("test", 20)], dtype=request.param)
    return out


@pytest.fixture(scope="module")
def local(exported: Path) -> Samples:
    return evaluated(exported)


def evaluated(exported: Path, **engine: Any) -> Samples:
    found = pipeline.evaluate(exported, settings=EvalRecipe(**SETTINGS, **engine))
    print({name: found[name] for name in ("accuracy", "well_formed", "seconds", "settings") if name in found})
    return samples(Path(found["folder"]))


def samples(folder: Path) -> Samples:
    return [line for _, line in read_jsonl(folder / "samples.jsonl")]


def differing(local: Samples, other: Samples, name: str) -> list[float]:
    """Margins, here, of the first tokens in which another engine's answers differ. Figures up to there must agree."""
    margins, farthest = [], 0.0
    for mine, theirs in zip(local, other, strict=True):
        assert mine["id"] == theirs["id"]
        given = mine["meta"]["given"]
        pairs = zip(mine["ids"], theirs["ids"], strict=False)
        end = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(mine["ids"]), len(theirs["ids"])))
        if mine["ids"] != theirs["ids"]:
            margins.append(mine["margins"][end - given])
        known = zip(mine["logprobs"][: end - given], theirs["logprobs"], strict=False)
        farthest = max([farthest, *(abs(a - b) for a, b in known if b is not None)])
    answers = sum(a["prediction"] == b["prediction"] for a, b in zip(local, other, strict=True))
    print(
        f"{name}: of {len(local)} questions {len(local) - len(margins)} have the same ids, {answers} the same answer; "
        f"margins of first differing tokens {margins}; log-probabilities differ by up to {farthest:.5f}"
    )
    return margins


def agrees(exported: Path, margins: Sequence[float]) -> None:
    """In fp32 nothing differs; in bf16 near-ties may flip."""
    assert not margins if exported.name == "fp32" else all(abs(margin) < 0.1 for margin in margins)


def chatted(url: str, model: str, exported: Path, local: Samples) -> list[bool]:
    """Whether `/v1/chat/completions`, asked as any chat client asks, gives the traces that were generated here."""
    codec = open_checkpoint(exported).codec
    same = []
    for line in local[:10]:
        question = Trace.from_json(line).question
        asked = {"model": model, "messages": [{"role": "user", "content": codec.scheme.message(question)}]}
        reply = httpx2.post(f"{url}/chat/completions", json={**asked, "temperature": 0, "max_tokens": 120}, timeout=600)
        text = reply.json()["choices"][0]["message"]["content"]
        ids = codec.opening() + codec.tokenizer(text, add_special_tokens=False)["input_ids"] + [codec.eos_id]
        made = codec.parse(question, ids)
        steps = [step.to_json() for step in made.steps]
        same.append((steps, made.prediction, made.faults) == (line["steps"], line["prediction"], ()))
    print(f"chat completions: {sum(same)} of {len(same)} traces are the same")
    return same


def test_transformers_serve_gives_the_same_answers(exported: Path, local: Samples) -> None:
    if exported.name == "bf16":
        pytest.skip("Transformers here and there: once is enough")
    with transformers_serve(str(exported)) as url:
        other = evaluated(exported, engine="openai", base_url=url, served_model=str(exported))
        assert all(chatted(url, str(exported), exported, local))
    agrees(exported, differing(local, other, "transformers serve, text"))
    assert {value for line in other for value in line["logprobs"]} == {None}


def test_vllm_serve_gives_the_same_answers(exported: Path, local: Samples) -> None:
    needs_vllm()
    with vllm_serve(exported, {"fp32": "float32", "bf16": "bfloat16"}[exported.name]) as url:
        other = evaluated(exported, engine="openai", base_url=url)
        margins = differing(local, other, f"vllm serve, ids, {exported.name}")
        same = chatted(url, "exported", exported, local)
    agrees(exported, margins)
    assert all(same) or exported.name == "bf16"
    assert all(value is not None for line in other for value in line["logprobs"])


def test_vllm_itself_gives_the_same_answers(exported: Path, local: Samples) -> None:
    needs_vllm()
    fields: Mapping[str, Any] = {**SETTINGS, "engine": "vllm"}
    command = [str(VLLM / "python"), "-m", "memreason", "eval", str(exported)]
    command += [word for name, value in fields.items() for word in (f"--eval.{name}", str(value))]
    subprocess.run(command, check=True, env={**os.environ, **OFFLINE, **SMALL}, stdout=subprocess.DEVNULL)
    (folder,) = {
        path.parent
        for path in (exported / "eval").glob("*/results.json")
        if read_json(path)["settings"]["engine"] == "vllm"
    }
    agrees(exported, differing(local, samples(folder), f"vLLM offline, {exported.name}"))
