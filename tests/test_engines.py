"""Engines: ids go to a server or to vLLM and come back as those of the right question, or the user learns why not."""

from __future__ import annotations

import json
import math
import sys
import threading
import types
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from completions import OFF, Completions, completing, error, from_table, logprob
from conftest import byte_level, own_traces, save_base, tiny_model, tiny_recipe
from memreason import pipeline
from memreason.cli import main
from memreason.core.errors import CheckpointError, EngineError, RecipeError
from memreason.core.files import read_json, read_jsonl
from memreason.core.recipe import Recipe, load_recipe
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question, Step, Trace
from memreason.encode.base import load_tokenizer
from memreason.encode.codec import Codec
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_tokens
from memreason.finetune.checkpoint import open_checkpoint, save_checkpoint, with_weights
from memreason.finetune.prepare import trainable_model
from memreason.generate.answer import answer_questions
from memreason.generate.engines import generate
from memreason.generate.onward import begun_ids, continue_traces
from memreason.generate.rows import Generation

MODEL = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=512))  # an engine elsewhere reads no more of it


def known_traces(count: int) -> list[Trace]:
    """A question each, and the trace that its answer shall be: no two alike."""
    return [
        Trace(
            Question(f"Is Lima the capital of Peru? {n}", "True"),
            (Step(("memory",), f"Lima {n} lies in South America."), Step(("reason",), f"so Peru {n} lies there.")),
            prediction=str(n),
        )
        for n in range(count)
    ]


def server_of(codec: Codec, traces: Sequence[Trace], **more: Any) -> Completions:
    """A server whose model has learnt these traces by heart."""
    given = codec.opening()
    answers = {tuple(codec.question_ids(trace.question) + given): codec.render(trace)[len(given) :] for trace in traces}
    return Completions(codec.tokenizer, codec.eos_id, from_table(answers), **more)


def settings_for(server: Completions, **more: Any) -> EvalRecipe:
    return EvalRecipe(engine="openai", base_url=server.url, **{"batch_size": 4, "max_new_tokens": 200} | more)


def asked(codec: Codec, traces: Sequence[Trace], settings: EvalRecipe) -> list[Generation]:
    made = generate(MODEL, codec, [trace.question for trace in traces], settings)
    return [one for batch in made for one in batch]


def right(codec: Codec, traces: Sequence[Trace], made: Sequence[Generation]) -> bool:
    """Whether each question came back once, with the ids of its own trace."""
    expected = {trace.question.id: codec.render(trace) for trace in traces}
    return {one.question.id: one.ids for one in made} == expected and len(made) == len(expected)


@pytest.mark.parametrize("style", ["vllm", "llama.cpp"])
def test_ids_go_in_and_come_out_with_their_figures(codec: Codec, style: str) -> None:
    traces = known_traces(9)
    with completing(server_of(codec, traces, style=style, seconds=0.02)) as server:
        made = asked(codec, traces, settings_for(server))
    assert right(codec, traces, made)
    assert 1 < server.most <= 4
    given = len(codec.opening())
    for one in made:
        count = len(one.ids) - given
        known = count - (style == "llama.cpp")  # it does not show the end
        assert one.logprobs[:known] == pytest.approx([logprob(n) for n in range(known)])
        assert one.margins[:known] == pytest.approx([math.exp(logprob(n)) - math.exp(-3) for n in range(known)])
        assert all(map(math.isnan, one.entropies)) and len(one.entropies) == count
        assert all(map(math.isnan, one.logprobs[known:]))
    first = server.questions()[0]
    assert first["prompt"] == max((codec.question_ids(t.question) + codec.opening() for t in traces), key=len)
    assert first["skip_special_tokens"] is first["spaces_between_special_tokens"] is False
    assert first["temperature"] == 0 and first["max_tokens"] == 200 and "seed" not in first


@pytest.mark.parametrize("style", ["text", "chat"])
def test_where_only_text_goes_in_and_out_blocks_survive(codec: Codec, style: str) -> None:
    traces = known_traces(6)
    template = "Question: {}\n" + "".join(codec.scheme.blocks["prefix"])
    with completing(server_of(codec, traces, style=style, template=template.format)) as server:
        made = asked(codec, traces, settings_for(server))
    found = {one.question.id: codec.parse(one.question, one.ids) for one in made}
    assert {key: (one.steps, one.answer, one.faults) for key, one in found.items()} == {
        trace.question.id: (trace.steps, trace.answer, ()) for trace in traces
    }
    assert all(math.isnan(value) for one in made for value in (*one.logprobs, *one.margins, *one.entropies))
    if style == "chat":
        assert server.questions()[-1]["messages"][0]["content"].startswith("Is Lima the capital")
    assert all("return_token_ids" not in body for body in server.questions()[-5:])  # found out once


def test_figures_that_are_not_there_are_null_in_the_samples(byte_codec: Codec, tmp_path: Path) -> None:
    traces, model = known_traces(3), tiny_model(8)
    with completing(server_of(byte_codec, traces, style="text")) as server:
        settings = settings_for(server)
        found = answer_questions(model, byte_codec, [trace.question for trace in traces], settings, folder=tmp_path)
    assert [(one.steps, one.answer) for one in found] == [(one.steps, one.answer) for one in traces]
    for _, line in read_jsonl(tmp_path / "samples.jsonl"):
        assert set(line["logprobs"]) == set(line["margins"]) == set(line["entropies"]) == {None}
        assert len(line["logprobs"]) == len(line["ids"]) - line["meta"]["given"]


def test_a_token_that_llama_cpp_leaves_out_is_not_lost(byte_codec: Codec) -> None:
    traces = [Trace(Question("Is it?", "True"), (Step(("memory",), "日本 lies in Asia."),), prediction="True")]
    with completing(server_of(byte_codec, traces, style="llama.cpp")) as server:
        made = asked(byte_codec, traces, settings_for(server))
    assert right(byte_codec, traces, made)
    assert all(map(math.isnan, made[0].logprobs))  # ids that were read again have no figures


def test_an_answer_ends_at_its_limit_and_there_is_no_end_put_to_it(byte_codec: Codec) -> None:
    traces = known_traces(2)
    for style in ("vllm", "llama.cpp", "text"):
        with completing(server_of(byte_codec, traces, style=style)) as server:
            made = asked(byte_codec, traces, settings_for(server, max_new_tokens=7))
        given = len(byte_codec.opening())
        whole = {trace.question.id: byte_codec.render(trace) for trace in traces}
        assert all(one.ids == whole[one.question.id][: given + 7] for one in made), style


def test_sampling_is_asked_for_as_the_settings_say(byte_codec: Codec) -> None:
    traces = known_traces(3)
    seeds = []
    for _ in range(2):
        with completing(server_of(byte_codec, traces)) as server:
            sampled = {"decoding": "sample", "temperature": 0.7, "top_p": 0.9, "n_samples": 2, "seed": 3}
            assert len(asked(byte_codec, traces, settings_for(server, **sampled))) == 6
        assert {(body["temperature"], body["top_p"], body["top_k"]) for body in server.questions()} == {(0.7, 0.9, -1)}
        seeds.append(sorted(body["seed"] for body in server.questions()))
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 6
    with completing(server_of(byte_codec, traces)) as server:
        asked(byte_codec, traces, settings_for(server, decoding="model-default"))
    assert not {"temperature", "top_p", "top_k", "seed", "min_p"} & set(server.questions()[0])


def test_failures_are_tried_again_and_no_answer_is_mixed_up(byte_codec: Codec) -> None:
    traces = known_traces(24)
    busy, broken = (429, error("busy"), {"retry-after-ms": "20"}), (500, error("oops"), OFF)
    with completing(server_of(byte_codec, traces, seconds=0.01)) as server:
        server.troubles = [busy, broken, None, busy, (503, error("loading"), OFF), broken, busy]
        made = asked(byte_codec, traces, settings_for(server, batch_size=8))
    assert right(byte_codec, traces, made)
    assert len(server.questions()) == 24 + 7


def test_two_clients_at_once_are_not_mixed_up(byte_codec: Codec) -> None:
    traces = known_traces(20)
    halves, made = (traces[:10], traces[10:]), {}
    with completing(server_of(byte_codec, traces, seconds=0.01)) as server:
        clients = [
            threading.Thread(
                target=lambda n=n, half=half: made.update({n: asked(byte_codec, half, settings_for(server))})
            )
            for n, half in enumerate(halves)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    assert all(right(byte_codec, half, made[n]) for n, half in enumerate(halves))


def test_lines_that_are_given_go_to_a_server_too(byte_codec: Codec) -> None:
    trace = known_traces(1)[0]
    begun = Trace(trace.question, trace.steps[:1])
    given = begun_ids(byte_codec, begun)
    prompt = byte_codec.question_ids(trace.question) + given
    answers = {tuple(prompt): byte_codec.render(trace)[len(given) :]}
    server = Completions(byte_codec.tokenizer, byte_codec.eos_id, from_table(answers))
    with completing(server):
        settings, ids = settings_for(server), {trace.question.id: given}
        (made,) = continue_traces(MODEL, byte_codec, [trace.question], ids, settings)  # type: ignore[arg-type]
        assert (made.steps, made.answer) == (trace.steps, trace.answer)
        server.style = "chat"
        with pytest.raises(EngineError, match="takes chat messages only"):
            [*continue_traces(MODEL, byte_codec, [trace.question], ids, settings)]  # type: ignore[arg-type]


def test_who_stops_listening_is_not_kept_waiting(byte_codec: Codec) -> None:
    traces = known_traces(40)
    with completing(server_of(byte_codec, traces, seconds=0.05)) as server:
        batches = generate(MODEL, byte_codec, [trace.question for trace in traces], settings_for(server))
        next(batches)
        batches.close()
    assert len(server.questions()) < 20


# What is wrong with a server: how it is made, and what the user reads.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "several models": ({"models": ("toy", "other")}, r"serves toy, other\. Which\? Give --eval\.served_model"),
    "another tokenizer": ({"tokenizer": byte_level()}, r"its tokenizer does not hold the blocks: <prefix_0><answer_0>"),
    "blocks lost": (
        {"style": "text", "written": lambda text: "".join(part.split(">", 1)[-1] for part in text.split("<"))},
        r"blocks are lost in its text, which has \d+ of \d+ tokens: ' Lima",
    ),
    "another prompt": (
        {"style": "chat", "template": "Lima, says the user: {}".format},
        r"reads a prompt of \d+ tokens as \d+",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_server_that_would_give_wrong_answers_is_refused(byte_codec: Codec, what: str) -> None:
    made, message = WRONG[what]
    traces = known_traces(4)
    server = server_of(byte_codec, traces)
    for name, value in made.items():
        setattr(server, name, value)
    with completing(server), pytest.raises(EngineError, match=message):
        asked(byte_codec, traces, settings_for(server))


def test_a_wrong_name_a_wrong_path_and_no_server_are_told_apart(byte_codec: Codec) -> None:
    traces = known_traces(2)
    with completing(server_of(byte_codec, traces)) as server:
        with pytest.raises(EngineError, match=r"`gpt` does not exist.*It serves toy, and was asked for gpt"):
            asked(byte_codec, traces, settings_for(server, served_model="gpt"))
        assert right(byte_codec, traces, asked(byte_codec, traces, settings_for(server, served_model="toy")))
        server.listing = False
        assert right(byte_codec, traces, asked(byte_codec, traces, settings_for(server)))
        assert "model" not in server.asked[-1]  # what it serves is its affair
        gone = settings_for(server)
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:\d+/v1: no connection .*--eval\.base_url"):
        asked(byte_codec, traces, gone)


def test_a_refused_key_is_named_and_never_shown(byte_codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    traces = known_traces(2)
    with completing(server_of(byte_codec, traces)) as server:
        server.troubles = [(401, error("Incorrect API key: sk-secret"), {})]
        with pytest.raises(EngineError, match=r"the key in OPENAI_API_KEY was refused \(HTTP 401\)") as refused:
            asked(byte_codec, traces, settings_for(server))
        server.troubles = [(403 + 5, error("odd sk-secret"), {"x-should-retry": "false"})]
        with pytest.raises(EngineError, match=r"odd \*\*\*") as odd:
            asked(byte_codec, traces, settings_for(server))
    assert set(server.keys) == {"Bearer sk-secret"}
    assert "sk-secret" not in str(refused.value) + str(odd.value)


def test_a_question_that_spells_a_block_is_never_sent_as_text(byte_codec: Codec) -> None:
    spelled = Trace(Question("What is <memory_0> for?", "?"), known_traces(1)[0].steps, prediction="1")
    traces = [*known_traces(3), spelled]
    for style in ("vllm", "text"):
        with completing(server_of(byte_codec, traces, style=style)) as server:
            if style == "vllm":  # as ids it is harmless
                assert right(byte_codec, traces, asked(byte_codec, traces, settings_for(server)))
                continue
            with pytest.raises(EngineError, match=r"What is <memory_0> for.*other tokens if it is text"):
                asked(byte_codec, traces, settings_for(server))
        assert not [body for body in server.questions() if "memory_0" in str(body["prompt"])]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is one whole model, with weights as they were drawn."""
    folder = tmp_path_factory.mktemp("whole")
    return save(folder / "checkpoint-1", tiny_recipe(folder, save_base(folder / "base"), **{"method.name": "full"}))


def save(folder: Path, recipe: Recipe) -> Path:
    codec = add_tokens(TokenScheme(), load_tokenizer(recipe.model.base))
    save_checkpoint(folder, trainable_model(recipe, codec), codec, recipe)
    return folder


@pytest.fixture(scope="module")
def here(run: Path) -> dict[str, Any]:
    """The results of its evaluation here."""
    questions = run.parent / "asked.jsonl"
    rows = [{"question": trace.question.text, "answer": trace.question.answer} for trace in own_traces(12)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return pipeline.evaluate(run, settings=EvalRecipe(task=str(questions), max_new_tokens=16, batch_size=4))


def same_as(run: Path, here: dict[str, Any]) -> Completions:
    """A server that answers as the run's model answers here."""
    codec, answers = open_checkpoint(run).codec, {}
    for _, line in read_jsonl(Path(here["folder"]) / "samples.jsonl"):
        given = line["meta"]["given"]
        prompt = codec.question_ids(Trace.from_json(line).question) + line["ids"][:given]
        answers[tuple(prompt)] = line["ids"][given:]
    return Completions(codec.tokenizer, codec.eos_id, from_table(answers))


def kept(folder: Path | str, *names: str) -> list[dict[str, Any]]:
    """These fields of the samples."""
    return [{name: line.get(name) for name in names} for _, line in read_jsonl(Path(folder) / "samples.jsonl")]


def test_an_evaluation_through_a_server_reads_no_weights_and_resumes(
    run: Path, here: dict[str, Any], tmp_path: Path
) -> None:
    server = same_as(run, here)
    (weights,) = run.glob("*.safetensors")
    weights.rename(tmp_path / "aside")
    command = ["eval", str(run), "--task", here["task"], "--eval.max_new_tokens", "16", "--eval.engine", "openai"]
    try:
        with completing(server):
            command += ["--eval.base_url", server.url, "--eval.batch_size", "4"]
            assert main(command) == 0
            first = len(server.questions())
            assert main(command) == 0  # all is there already
            assert len(server.questions()) == first == 12
    finally:
        (tmp_path / "aside").rename(weights)
    folders = {path.parent for path in (run / "eval").glob("asked-*/samples.jsonl")}
    assert len(folders) == 2  # the engine is part of what was done
    (there,) = folders - {Path(here["folder"])}
    fields = ("ids", "steps", "prediction", "faults")
    assert kept(there, *fields) == kept(here["folder"], *fields)
    assert read_json(there / "results.json")["accuracy"] == here["accuracy"]


def test_what_was_answered_before_a_server_went_is_kept(run: Path, here: dict[str, Any]) -> None:
    server = same_as(run, here)
    with completing(server):
        settings = EvalRecipe(task=here["task"], max_new_tokens=15, batch_size=4, engine="openai", base_url=server.url)
        server.last = 6
        with pytest.raises(EngineError, match="teapot"):
            pipeline.evaluate(run, settings=settings)
        server.last = None
        before = len(server.questions())
        results = pipeline.evaluate(run, settings=settings)
    assert results["n"] == 12 and results["answered_before"] > 0
    assert len(server.questions()) - before == 12 - results["answered_before"]


MISTAKES = {
    "eval.base_url: eval.engine openai needs one": {"eval.engine": "openai"},
    "they are for eval.engine openai": {"eval.base_url": "http://127.0.0.1:1/v1"},
    "vllm does not stop at memory lines": {"eval.engine": "vllm", "eval.memory": "retrieve", "eval.corpus": "atlas"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_settings_that_do_not_go_together_are_refused(message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(None, MISTAKES[message])


def test_a_training_is_not_evaluated_elsewhere(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, save_base(tmp_path / "base"), **{"eval.engine": "vllm"})
    with pytest.raises(RecipeError, match="vllm runs exported models"):
        pipeline.run(recipe)
    assert not recipe.folder.exists()


def test_vllm_refuses_an_adapter_and_tells_that_it_is_missing(run: Path, here: dict[str, Any], tmp_path: Path) -> None:
    adapter = save(tmp_path / "checkpoint-1", tiny_recipe(tmp_path, save_base(tmp_path / "base")))
    settings = EvalRecipe(task=here["task"], engine="vllm")
    for known in (None, with_weights(open_checkpoint(adapter))):
        with pytest.raises(CheckpointError, match="First `memreason export`"):
            pipeline.evaluate(adapter, settings=settings, checkpoint=known)
    if "vllm" not in sys.modules:
        with pytest.raises(EngineError, match="an environment of its own"):
            pipeline.evaluate(run, settings=settings)


class Library:
    """What of vLLM is used, over a toy: requests wait, a step answers one, and each is told how it was made."""

    def __init__(self, following: Any) -> None:
        self.following, self.made, self.asked, self.aborted = following, [], [], []  # type: ignore[var-annotated]
        self.waiting: deque[tuple[str, list[int], Any]] = deque()
        self.module: Any = types.ModuleType("vllm")
        self.module.LLM, self.module.SamplingParams = self.opened, SimpleNamespace
        self.params: Any = types.ModuleType("vllm.sampling_params")
        self.params.RequestOutputKind = SimpleNamespace(FINAL_ONLY=2)

    def opened(self, **given: Any) -> Any:
        self.made.append(given)
        return SimpleNamespace(llm_engine=self)

    def add_request(self, number: str, prompt: dict[str, list[int]], params: Any) -> None:
        self.waiting.append((number, prompt["prompt_token_ids"], params))
        self.asked.append(params)

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Any]:
        number, ids, params = self.waiting.pop()  # not in their order
        made = self.following(ids)[: params.max_tokens]
        top = [
            {token: SimpleNamespace(logprob=logprob(n)), 9: SimpleNamespace(logprob=-3.0)}
            for n, token in enumerate(made)
        ]
        output = SimpleNamespace(token_ids=made, logprobs=top)
        return [SimpleNamespace(request_id=number, finished=True, outputs=[output]), SimpleNamespace(finished=False)]

    def abort_request(self, numbers: list[str]) -> None:
        self.aborted = numbers
        self.waiting.clear()


def test_vllm_gets_ids_and_the_weights_as_they_were_exported(
    run: Path, here: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from memreason.generate import vllm

    monkeypatch.setattr(vllm, "ENVIRONMENT", {})
    vllm._engine.cache_clear()
    library = Library(same_as(run, here).following)
    monkeypatch.setitem(sys.modules, "vllm", library.module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", library.params)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    settings = EvalRecipe(task=here["task"], max_new_tokens=16, batch_size=4, engine="vllm")
    there = pipeline.evaluate(run, settings=settings)
    assert kept(there["folder"], "ids") == kept(here["folder"], "ids") and there["accuracy"] == here["accuracy"]
    (made,) = library.made
    assert made["dtype"] == "float32" and made["skip_tokenizer_init"] and made["max_num_seqs"] == 4
    assert made["max_model_len"] % 512 == 0 and made["tensor_parallel_size"] == 2  # of 3, for two heads
    assert Path(made["model"]) == Path(there["checkpoint"])
    first = library.asked[0]
    assert first.temperature == 0 and first.ignore_eos and first.stop_token_ids == [open_checkpoint(run).codec.eos_id]
    sampled = settings.model_copy(update={"decoding": "sample", "n_samples": 2, "temperature": 0.5})
    pipeline.evaluate(run, settings=sampled)
    assert len(library.made) == 1  # the engine is still open
    assert {one.temperature for one in library.asked[-24:]} == {0.5} and len(
        {one.seed for one in library.asked[-24:]}
    ) == 24
    opened = open_checkpoint(run)
    batches = generate(opened.model, opened.codec, [trace.question for trace in own_traces(9)], settings)
    next(batches)
    batches.close()
    assert len(library.aborted) == 8 and not library.waiting
    vllm._engine.cache_clear()
