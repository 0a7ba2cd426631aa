"""Questions shared out over workers on a Ray of two processes: the same answers, whoever dies."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import own_traces, save_base, tiny_recipe
from memreason import inside, pipeline
from memreason.cli import main
from memreason.core.errors import EngineError
from memreason.core.files import read_jsonl
from memreason.core.stages import EvalRecipe
from memreason.encode.base import load_model, load_tokenizer
from memreason.encode.codec import Codec
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_rows, add_tokens
from memreason.finetune.checkpoint import load_checkpoint, open_checkpoint, save_checkpoint
from memreason.finetune.methods import trainable
from memreason.generate import engines
from memreason.generate.cluster import reason, share_of
from memreason.generate.decode import decode
from memreason.generate.engines import generate
from memreason.generate.on_ray import _job, _shards, _Worker
from memreason.generate.rows import Engine, Row
from memreason.measure.counterfactual import INTERVENTIONS
from memreason.retrieve.outside import open_retriever
from memreason.retrieve.passage import searching

QUESTIONS = [trace.question for trace in own_traces(20)]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint that was never trained: its answers are noise, and of many lengths."""
    base, folder = save_base(tmp_path / "base"), tmp_path / "run" / "checkpoint-1"
    recipe = tiny_recipe(tmp_path, base)
    model = load_model(str(base), dtype="fp32")
    codec = add_tokens(TokenScheme(), load_tokenizer(str(base)))
    add_rows(model, codec)
    save_checkpoint(folder, trainable(model, codec, recipe.method), codec, recipe)
    return folder


@pytest.fixture
def local_ray() -> Iterator[Any]:
    """Ray as it is started when someone asks, and no longer there afterwards."""
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import a test
    yield ray
    ray.shutdown()


def dies_once(marker: Path, model: Any, codec: Codec, waiting: deque[Row], settings: EvalRecipe) -> Iterator[list[Row]]:
    """The local engine, whose first process to have some answers is killed before it can hand them out."""
    for ended in decode(model, codec, waiting, settings):
        if ended and not marker.exists():
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        yield ended


def answers(path: Path, settings: EvalRecipe, **how: Any) -> dict[tuple[str, int], tuple[list[int], list[float]]]:
    loaded = (open_checkpoint if settings.ray else load_checkpoint)(path)
    made = [one for batch in generate(loaded.model, loaded.codec, QUESTIONS, settings, **how) for one in batch]
    found = {(one.question.id, one.sample): (one.ids, one.logprobs) for one in made}
    assert len(found) == len(made) == len(QUESTIONS) * settings.n_samples
    return found


def test_a_lost_workers_questions_are_done_again_and_all_answers_are_those_of_one_process(
    checkpoint: Path, tmp_path: Path, local_ray: Any
) -> None:
    settings = EvalRecipe(decoding="sample", n_samples=2, max_new_tokens=24, batch_size=4)
    alone = answers(checkpoint, settings)
    marker = tmp_path / "died"
    shared = answers(checkpoint, settings.model_copy(update={"ray": 2}), engine=partial(dies_once, marker))
    assert int(marker.read_text()) != os.getpid()
    assert len({len(ids) for ids, _ in alone.values()}) > 1
    assert {key: ids for key, (ids, _) in shared.items()} == {key: ids for key, (ids, _) in alone.items()}
    for key, (_, logprobs) in shared.items():
        torch.testing.assert_close(logprobs, alone[key][1], atol=1e-3, rtol=0)


def in_this_process(engine: Engine) -> Engine:
    """What on_ray does, without Ray: the model is read anew, rows travel as bytes."""

    def run(model: Any, codec: Codec, waiting: deque[Row], settings: EvalRecipe) -> Iterator[list[Row]]:
        worker = _Worker(_job(model, settings, engine))
        for rows in _shards(list(waiting), 2, settings.batch_size):
            made, problem = pickle.loads(worker({"rows": pickle.dumps(rows)})["rows"])
            if problem:
                raise EngineError(problem)
            yield made

    return run


def files_of(folder: Path) -> dict[str, Any]:
    """All that an evaluation left, figures to three places: floats differ in the last ones with what is in flight."""
    found = {path.name: [line for _, line in read_jsonl(path)] for path in folder.glob("*.jsonl")}
    return {name: [near(line) for line in lines] for name, lines in found.items()}


def near(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: near(one) for key, one in value.items()}
    if isinstance(value, list):
        return [near(one) for one in value]
    return pytest.approx(value, abs=1e-3) if isinstance(value, float) else value


def test_evaluation_and_interventions_leave_the_same_files_whether_they_are_shared_out(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way through the house; the workers themselves are tried elsewhere in this file."""
    settings = EvalRecipe(task="atlas", n=6, max_new_tokens=24, n_samples=2, batch_size=4)
    alone = inside.faults(checkpoint, settings=settings, counterfactual=True)
    folder = Path(alone["folder"])
    expected = files_of(folder)
    assert sum(name.startswith("given-") for name in expected) == len(INTERVENTIONS)
    shutil.rmtree(folder)
    monkeypatch.setattr(engines, "on_ray", in_this_process)
    shared = inside.faults(checkpoint, settings=settings.model_copy(update={"ray": 2}), counterfactual=True)
    assert shared == alone
    assert files_of(folder) == expected


def test_shards_hold_short_and_long_prompts_alike_and_every_row_once() -> None:
    rows = [Row(QUESTIONS[0], n, 9, [0] * (200 - n), torch.Generator()) for n in range(100)]
    shards = _shards(rows, 2, 8)
    assert sorted(row.sample for shard in shards for row in shard) == list(range(100))
    assert {len(shard) for shard in shards} == {25}  # two for each worker
    assert max(map(len, _shards(rows, 1, 8))) <= 32  # four times what is in flight
    tokens = [sum(len(row.pending) for row in shard) for shard in shards]
    assert max(tokens) - min(tokens) < 100
    assert all(len(one.pending) > len(next_.pending) for shard in shards for one, next_ in pairwise(shard))
    assert [len(shard) for shard in _shards(rows[:3], 8, 32)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("nodes", "wanted", "share", "room"),
    [
        ([{"CPU": 8.0}], 2, {"num_cpus": 4}, 2),
        ([{"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 4.0}], 2, {"num_cpus": 4}, 3),
        ([{"CPU": 4.0}, {"CPU": 4.0}], 3, {"num_cpus": 2}, 4),
        ([{"CPU": 2.0}], 5, {"num_cpus": 1}, 2),
        ([{"CPU": 64.0}, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}], 8, {"num_gpus": 1}, 8),
        ([{}], 1, {"num_cpus": 1}, 0),
    ],
)
def test_a_worker_gets_a_gpu_or_as_many_cores_as_let_all_have_a_place(
    nodes: list[dict[str, float]], wanted: int, share: dict[str, int], room: int
) -> None:
    lost = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0}}
    assert share_of([lost, *({"Alive": True, "Resources": one} for one in nodes)], wanted) == (share, room)


@pytest.fixture
def eval_on_ray(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """`memreason eval --ray 2`, which fails; returns what it says."""

    def run() -> str:
        assert main(["eval", str(checkpoint), "--task", "atlas", "--eval.n", "3", "--ray", "2"]) == 2
        said = capsys.readouterr().err
        return next(line for line in said.splitlines() if line.startswith("error: "))

    return run


def test_without_ray_the_extra_is_named(eval_on_ray: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert eval_on_ray() == "error: eval.ray needs Ray: pip install 'memreason[ray]'"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:{closed}", "no cluster answers there (Connection refused)"),
        ("ray://127.0.0.1:10001", "not through Ray Client; run on a machine of the cluster, as HOST:6379"),
    ],
)
def test_a_cluster_that_does_not_answer_is_named(
    address: str, said: str, eval_on_ray: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    with socket.socket() as one:  # bound, but nobody listens
        one.bind(("127.0.0.1", 0))
        there = address.format(closed=one.getsockname()[1])
        monkeypatch.setenv("RAY_ADDRESS", there)
        assert eval_on_ray() == f"error: RAY_ADDRESS={there}: {said}"


def test_a_ray_that_does_not_start_is_told_in_one_line(
    eval_on_ray: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")

    def timed_out(**how: Any) -> None:
        assert how["address"] == "local"
        raise Exception("Traceback:\n  a remote one\nThe current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", timed_out)
    assert eval_on_ray() == "error: Ray does not start here: The current node timed out during startup"


def test_a_model_that_is_only_in_memory_is_refused(checkpoint: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    with pytest.raises(EngineError, match="the workers read the model from its checkpoint, and this one is in memory"):
        _job(loaded.model, EvalRecipe(ray=1), decode)


def test_a_worker_that_cannot_read_the_checkpoint_says_where_and_why(checkpoint: Path) -> None:
    job = _job(open_checkpoint(checkpoint).model, EvalRecipe(ray=1), decode)
    rows = pickle.dumps([Row(QUESTIONS[0], 0, 9, [1, 2], torch.Generator())])
    shutil.rmtree(checkpoint)
    _, problem = pickle.loads(_Worker(job)({"rows": rows})["rows"])
    assert problem == (
        f"a worker on {socket.gethostname()}: {checkpoint}: no such run or checkpoint. "
        "Every machine must see it under this path, as on a shared file system"
    )


def test_a_search_goes_to_the_workers_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloudpickle = pytest.importorskip("ray").cloudpickle
    monkeypatch.setenv("MEMREASON_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("corpus.jsonl").write_text('{"id": "1", "text": "Lima is the capital of Peru."}\n')
    sent = cloudpickle.dumps(searching(open_retriever("corpus.jsonl")))
    monkeypatch.chdir("/")
    assert pickle.loads(sent)([(QUESTIONS[0], "Lima lies in Peru.")]) == [("1", "Lima is the capital of Peru.")]
    address = "http://127.0.0.1:9/retrieve"
    assert pickle.loads(pickle.dumps(open_retriever(address))).url == address


def test_of_rays_long_messages_the_last_line_is_told() -> None:
    long = "The actor died.\n\nray::__init__() (pid=1)\n  File x.py\nModuleNotFoundError: No module named 'memreason'\n"
    assert reason(RuntimeError(long)) == "ModuleNotFoundError: No module named 'memreason'"
    assert reason(RuntimeError()) == "RuntimeError"


@contextmanager
def shared_out(checkpoint: Path, mark: str) -> Iterator[subprocess.Popen[str]]:
    """`memreason eval --ray 2` as from a terminal. `mark` finds all processes of its Ray; none may be left behind."""
    words = ["eval", str(checkpoint), "--task", "atlas", "--eval.n", "200", "--eval.batch_size", "4", "--ray", "2"]
    words += ["--eval.max_new_tokens", "64"]  # long enough to be stopped in
    process = subprocess.Popen(
        [sys.executable, "-m", "memreason", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TEST_ON_RAY": mark, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
    )
    try:
        yield process
        wait_until(lambda: not processes(mark))
    finally:
        for pid in processes(mark):
            os.kill(pid, signal.SIGKILL)


def processes(mark: str, name: str = "") -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"TEST_ON_RAY={mark}".encode() in (folder / "environ").read_bytes():
                found += [int(folder.name)] if name in (folder / "cmdline").read_text() else []
        except OSError:  # gone, or not ours to read
            continue
    return found


def wait_until(there: Callable[[], Any], patience: float = 240) -> Any:
    end = time.monotonic() + patience
    while not (found := there()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def samples(checkpoint: Path) -> dict[str, list[int]]:
    paths = checkpoint.glob("eval/*/samples*.jsonl")
    return {line["id"]: line["ids"] for path in paths for _, line in read_jsonl(path, torn_tail=True)}


@pytest.mark.soak
def test_whoever_is_stopped_or_killed_the_run_goes_on_and_leaves_no_process(checkpoint: Path) -> None:
    settings = EvalRecipe(task="atlas", n=200, batch_size=4, max_new_tokens=64)
    expected = pipeline.evaluate(checkpoint, settings=settings)
    alone = samples(checkpoint)
    shutil.rmtree(expected["folder"])
    with shared_out(checkpoint, "ctrl-c") as process:
        wait_until(lambda: samples(checkpoint))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        assert errors.endswith("stopped; run the same command again to go on\n")
    before = len(samples(checkpoint))
    with shared_out(checkpoint, "driver") as process:
        wait_until(lambda: len(samples(checkpoint)) > before)
        process.kill()
        process.communicate()
    before = len(samples(checkpoint))
    assert 0 < before < 200
    with shared_out(checkpoint, "worker") as process:
        os.kill(wait_until(lambda: processes("worker", "ray::MapWorker"))[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    assert {line.partition(":")[0] for line in errors.replace("\r", "\n").splitlines()} == {"", "atlas/test"}  # our bar
    assert samples(checkpoint) == alone
