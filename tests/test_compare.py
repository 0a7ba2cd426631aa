"""Comparisons: arms are recipes, nothing is trained twice, seeds are pooled rightly, the page shows what was found."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from conftest import own_traces, save_base
from memreason.cli import main
from memreason.comparing import compare, here, on_ray, plan, run_arm
from memreason.core.comparison import Comparison, jobs_of, load_comparison
from memreason.core.errors import DataError, MemreasonError, RecipeError
from memreason.core.files import read_json, write_traces
from memreason.core.recipe import Recipe, shipped
from memreason.core.trace import Question, Step, Trace
from memreason.data.atlas import make_atlas
from memreason.measure.arms import arm_faults, arm_table
from memreason.measure.score import Score, score_trace
from memreason.measure.stats import cluster_bootstrap, crossed_bootstrap, holm, mcnemar_exact, sign_flip, wilson
from memreason.report.comparison import comparison_page


def answered(rights: Sequence[bool], group: Sequence[str] | None = None) -> list[tuple[Trace, Score]]:
    made = []
    for n, right in enumerate(rights):
        meta = {"group": group[n]} if group else {}
        trace = Trace(Question(f"Is it {n}?", "True", meta=meta), (), prediction=str(right))
        made.append((trace, score_trace(trace)))
    return made


def test_one_row_of_values_has_the_interval_of_a_plain_bootstrap_by_group() -> None:
    random = np.random.default_rng(1)
    values, groups = random.random(60).tolist(), [n % 12 for n in range(60)]
    mean, low, high, spread = crossed_bootstrap([values], groups)
    expected = cluster_bootstrap(values, groups)
    assert (mean, low, high) == pytest.approx(expected, abs=0.01)
    assert spread == pytest.approx((high - low) / 3.92, rel=0.05)


def test_intervals_hold_the_truth_as_often_as_they_say_where_questions_and_seeds_both_vary() -> None:
    """The truth is 0. Drawing all pairs as if they were independent holds it hardly more than half as often."""
    random, held, naive = np.random.default_rng(0), 0, 0
    for _ in range(200):
        seeds, groups = random.normal(size=(8, 1)) * 0.5, random.normal(size=(1, 20))
        values = seeds + np.repeat(groups, 3, axis=1) + random.normal(size=(8, 60)) * 0.5
        _, low, high, _ = crossed_bootstrap(values.tolist(), [n // 3 for n in range(60)], samples=400)
        held += low <= 0 <= high
        _, low, high = cluster_bootstrap(values.ravel().tolist(), samples=400)
        naive += low <= 0 <= high
    assert held >= 180 and naive < 120


def test_a_pair_shares_its_questions_but_not_its_seeds() -> None:
    questions = np.random.default_rng(2).random(50)
    one, other = [(questions + 0.1).tolist()], [questions.tolist()]
    value, low, high, _ = crossed_bootstrap(one, list(range(50)), other)
    assert (value, low, high) == pytest.approx((0.1, 0.1, 0.1))


def test_adjusted_p_values_are_those_worked_out_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_a_question_counts_once_in_mcnemars_test_however_many_seeds_answered_it() -> None:
    ours = [answered([True] * 8 + [False] * 2), answered([True] * 8 + [False] * 2), answered([False] * 10)]
    theirs = [answered([False] * 10)]
    table = arm_table({"ours": ours, "theirs": theirs}, "theirs")
    row = table["arms"][0]["difference"]
    assert (row["more_here"], row["more_there"], row["p"]) == (8, 0, pytest.approx(2 / 2**8))
    assert table["arms"][0]["accuracy"] == pytest.approx(16 / 30) and table["arms"][0]["by_seed"] == [0.8, 0.8, 0.0]
    assert row["interval"][0] <= row["value"] <= row["interval"][1] and row["detectable"] > 0
    assert "difference" not in table["arms"][1]


def test_with_one_seed_the_test_is_mcnemars_and_otherwise_every_sign_is_tried() -> None:
    random = np.random.default_rng(3)
    for _ in range(20):
        one, other = random.random((2, 30)) < random.random((2, 1))
        expected = mcnemar_exact(one.tolist(), other.tolist())
        assert sign_flip((one.astype(int) - other).tolist()) == pytest.approx(expected)
    sizes = [3, -1, 2, 2, 0, -3, 1]
    sums = [sum(s * size for s, size in zip(signs, sizes, strict=True)) for signs in product((-1, 1), repeat=7)]
    assert sign_flip(sizes) == pytest.approx(np.mean(np.abs(sums) >= 4)) and sign_flip([]) == 1.0


def test_an_arm_whose_seeds_agree_is_not_favoured() -> None:
    """Both are right on half of all pairs; the questions on which both seeds are right are twice as many of one."""
    right = np.random.default_rng(4).random((2, 200)) < 0.5
    alike, apart = [answered(right[0].tolist())] * 2, [answered(seed.tolist()) for seed in right]
    row = arm_table({"alike": alike, "apart": apart}, "apart")["arms"][0]
    assert row["difference"]["p"] > 0.2 and abs(row["difference"]["value"]) < 0.05


def test_questions_of_one_entity_are_drawn_together() -> None:
    rights = [True] * 20 + [False] * 20
    alone = arm_table({"a": [answered(rights)]}, "a")["arms"][0]["interval"]
    grouped = arm_table({"a": [answered(rights, [str(n // 10) for n in range(40)])]}, "a")["arms"][0]["interval"]
    assert grouped[1] - grouped[0] > 1.5 * (alone[1] - alone[0])


def test_an_arm_that_is_never_right_has_an_interval() -> None:
    """Of 40 questions of 10 entities: Wilson's for 0, or all, of 10."""
    for always in (False, True):
        seeds = [answered([always] * 40, [str(n // 4) for n in range(40)])] * 2
        (row,) = arm_table({"a": seeds}, "a")["arms"]
        assert row["interval"] == pytest.approx(wilson(10 * always, 10)) and row["accuracy"] == always


def test_arms_that_answered_other_questions_are_not_compared() -> None:
    with pytest.raises(DataError, match="arm b answered other questions than a"):
        arm_table({"a": [answered([True])], "b": [answered([True, False])]}, "a")


def test_faults_are_read_by_words_so_that_blocks_make_no_difference() -> None:
    gold = [trace.with_question() for trace in make_atlas("test", 12, seed=0)]
    tagged = [Trace(t.question, t.steps, prediction=t.question.answer) for t in gold]
    plain = [Trace(t.question, tuple(Step((), s.text) for s in t.steps), prediction=t.question.answer) for t in gold]
    found = [arm_faults([[(t, score_trace(t)) for t in some]]) for some in (tagged, plain)]
    assert found[0] == found[1] and found[0] is not None
    assert found[0]["counts"]["right"] == 12 and found[0]["memory"] == 0
    assert arm_faults([[(Trace(t.question, (), prediction="True"), score_trace(t)) for t in tagged]]) is None


def comparison(folder: Path, changed: dict[str, Any] | None = None, **changes: Any) -> Comparison:
    """`changed`: sections of the settings in which some values are others."""
    data = folder / "traces.jsonl"
    if not data.is_file():
        write_traces(data, own_traces(24))
    base = folder / "base"
    settings = {
        "data": {"paths": [str(data)], "validation": 0},
        "model": {"base": str(base if base.is_dir() else save_base(base)), "dtype": "fp32"},
        "tokens": {"n_prefix": 1, "n_special": 2},
        "method": {"lora_dropout": 0},
        "train": {"per_device_train_batch_size": 8, "max_steps": 2, "eval_strategy": "no"},
        "eval": {"task": str(data), "n": 6, "max_new_tokens": 8},
    }
    settings |= {name: {**settings[name], **values} for name, values in (changed or {}).items()}
    arms = {"plain": {"tokens": {"add": False}}, "memory & reason": {}, "again": {}}
    values = {"name": "c", "recipe": "demo", "settings": settings, "seeds": [0, 1], "arms": arms}
    values |= {"output_dir": str(folder / "out"), **changes}
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return load_comparison(path)


def in_process(recipes: Sequence[Recipe]) -> Iterator[tuple[Recipe, str]]:
    for recipe in recipes:
        run_arm(recipe)
        yield recipe, ""


def test_every_arm_is_trained_and_compared_and_nothing_is_done_twice(tmp_path: Path) -> None:
    asked = comparison(tmp_path)
    found = compare(asked, work=in_process)
    runs = sorted((tmp_path / "out" / "arms").iterdir())
    assert len(runs) == 4  # two arms of three differ, on two seeds
    rows = {row["arm"]: row for row in found["arms"]}
    assert list(rows) == ["plain", "memory & reason", "again"] and found["against"] == "plain"
    assert rows["again"]["runs"] == rows["memory & reason"]["runs"]
    assert rows["again"]["difference"]["value"] == rows["memory & reason"]["difference"]["value"]
    cost = rows["memory & reason"]["cost"]
    assert cost["trainable_parameters"] > rows["plain"]["cost"]["trainable_parameters"] > 0 and cost["steps"] == 2
    assert read_json(tmp_path / "out" / "comparison.json") == found

    def nothing(recipes: Sequence[Recipe]) -> Iterator[tuple[Recipe, str]]:
        assert not recipes
        yield from ()

    assert compare(asked, work=nothing) == found
    # Another question of the evaluation trains nothing anew.
    weights = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("adapter_model.safetensors")}
    more = load_comparison(tmp_path / "comparison.yaml", [("eval.n", 8)])
    assert compare(more, work=in_process)["n"] == 8
    assert weights == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("adapter_model.safetensors")}


def test_an_arm_that_trains_nothing_is_run_once_for_all_seeds(tmp_path: Path) -> None:
    prompted = {"method": {"name": "prompting"}, "tokens": {"add": False, "instruction": "Say True or False."}}
    asked = comparison(tmp_path, arms={"asked": prompted, "other": {}})
    jobs = plan(asked)
    assert len(jobs) == 4 and len({job.recipe.output_dir for job in jobs if job.arm == "asked"}) == 1
    found = compare(asked, work=in_process)
    row = found["arms"][0]
    assert (row["seeds"], row["cost"]["trainable_parameters"], row["cost"]["steps"]) == (1, 0, 0)
    assert found["arms"][1]["seeds"] == 2
    generations = next((Path(row["runs"][0]) / "checkpoint-0" / "eval").rglob("generations.txt"))
    assert "Say True or False." in generations.read_text()


def test_same_tokens_means_more_steps_for_shorter_traces(tmp_path: Path) -> None:
    arms = {"whole": {}, "answer only": {"tokens": {"add": False}, "data": {"lines": "none"}}}
    asked = comparison(tmp_path, arms=arms, same="tokens", seeds=[0])
    settings = {**asked.settings, "train": {"per_device_train_batch_size": 8, "num_train_epochs": 4}}
    jobs = {job.arm: job.recipe for job in plan(asked.model_copy(update={"settings": settings}))}
    steps = {arm: recipe.train.model_extra["max_steps"] for arm, recipe in jobs.items() if recipe.train.model_extra}
    assert steps["whole"] == 12  # 24 traces, 8 a step, 4 epochs
    assert steps["answer only"] > 1.5 * steps["whole"]


def test_mistakes_of_all_arms_come_at_once(tmp_path: Path) -> None:
    arms = {"a": {"tokens": {"n_prefix": -1}}, "b": {"train": {"learning_rat": 1}}, "c": {}}
    with pytest.raises(RecipeError, match=r"arm a: tokens.n_prefix.*\n.*arm b: train.learning_rat"):
        jobs_of(comparison(tmp_path, arms=arms))
    with pytest.raises(
        RecipeError, match=r"a.token: no such stage(.|\n)*against: there is no arm 'x'(.|\n)*seeds: each"
    ):
        comparison(tmp_path, arms={"a": {"token": {}}, "b": {}}, against="x", seeds=[1, 1])
    with pytest.raises(RecipeError, match="no such file, and no shipped recipe of that name"):
        load_comparison("nothing")


def test_some_arms_alone() -> None:
    """They keep folders and order; one that there is not, or without the one to compare with, is refused."""
    some = {"only": ["pause blocks", "chain of thought"], "seeds": [1]}
    all_arms = {job.arm: job for job in jobs_of(load_comparison("atlas-arms", {"seeds": [1]}))}
    found = jobs_of(load_comparison("atlas-arms", some))
    assert found == [all_arms["chain of thought"], all_arms["pause blocks"]]
    with pytest.raises(RecipeError, match=r"1 problem\n.*only: there is no arm 'pause'"):
        load_comparison("atlas-arms", {"only": ["pause"]})
    with pytest.raises(RecipeError, match=r"against: there is no arm 'chain of thought'. There are: pause blocks"):
        load_comparison("atlas-arms", {"only": ["pause blocks"]})


@pytest.mark.parametrize("name", shipped("compare"))
def test_every_shipped_comparison_has_arms_that_can_be_planned(name: str) -> None:
    asked = load_comparison(name)
    jobs = jobs_of(asked)
    assert {job.arm for job in jobs} == set(asked.arms) and asked.about


def test_an_arm_runs_in_a_process_of_its_own_and_a_failure_does_not_stop_the_others(tmp_path: Path) -> None:
    asked = comparison(tmp_path, seeds=[0], arms={"right": {}, "wrong": {"method": {"lora_module": ["no_such_layer"]}}})
    with pytest.raises(MemreasonError, match=r"1 of 2 failed; what is done is kept\n.*wrong, seed 0: .*no_such_layer"):
        compare(asked, work=lambda recipes: here([*reversed(recipes)]))  # the wrong one first
    assert len(list((tmp_path / "out").rglob("arm-*.json"))) == 1


@pytest.mark.parametrize("while_there_is", ["manifest.json", "samples.jsonl"])  # an arm trains, an arm answers
def test_a_killed_comparison_takes_its_arm_with_it_and_goes_on(tmp_path: Path, while_there_is: str) -> None:
    changes = {"eval": {"n": 16, "max_new_tokens": 60, "batch_size": 1}} if while_there_is == "samples.jsonl" else {}
    comparison(tmp_path, seeds=[0], changed=changes, arms={"one": {}, "the same": {}})
    command = [sys.executable, "-m", "memreason", "compare", str(tmp_path / "comparison.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (there := list((tmp_path / "out").rglob(while_there_is))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    (child,) = (int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    process.send_signal(signal.SIGKILL)
    process.wait()
    while Path(f"/proc/{child}/cmdline").is_file() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "the arm goes on without its parent"
        time.sleep(0.02)
    kept = there[0].read_bytes()[:-1].rpartition(b"\n")[0]  # the last line may be torn
    assert main(["compare", str(tmp_path / "comparison.yaml")]) == 0
    assert (tmp_path / "out" / "comparison.html").is_file()
    if changes:
        answered = read_json(there[0].with_name("results.json"))["answered_before"]
        assert 0 < kept.count(b"\n") + 1 <= answered < 16, "nothing that was answered is answered again"


def test_the_page_shows_every_arm_and_nothing_in_it_becomes_a_tag(tmp_path: Path) -> None:
    asked = comparison(tmp_path, seeds=[0], arms={"plain": {}, "<script>x</script>": {"tokens": {"add": False}}})
    found = compare(asked, work=in_process)
    page = comparison_page(found, asked, "memreason compare c --eval.n 6")
    assert "n_special: 2" in page, "what all arms change"
    assert "<script" not in page and "&lt;script&gt;x" in page and "memreason compare c --eval.n 6" in page
    assert f"{found['arms'][0]['accuracy']:.3f}" in page and (
        "holds 0" in page or found["arms"][1]["difference"]["value"]
    )


def test_it_is_shown_in_80_columns_and_planned_without_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("memreason.timing.estimate.estimate", lambda recipe: {"seconds": {"total": [60, 90]}})
    asked = comparison(tmp_path, seeds=[0])
    assert main(["compare", str(tmp_path / "comparison.yaml"), "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "to do" in planned and "the same as memory & reason, seed 0" in planned
    assert re.search(r"plain +1 min 0 s to 1 min 30 s here\n +as long for each +2 min 0 s to 3 min 0 s", planned)
    assert not (tmp_path / "out").exists()
    compare(asked, work=in_process)
    assert main(["compare", str(tmp_path / "comparison.yaml"), "--dry-run"]) == 0
    done = capsys.readouterr().out
    assert "runs, 0 to do" in done and "estimated" not in done
    assert main(["compare", str(tmp_path / "comparison.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "memory & reason" in shown and "comparison.html" in shown
    assert max(len(line) for line in shown.splitlines() if str(tmp_path) not in line) <= 80


def test_several_processes_are_told_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(MemreasonError, match="start one process"):
        compare(comparison(tmp_path), work=here)


@pytest.mark.soak
def test_arms_on_ray_are_those_of_one_process(tmp_path: Path) -> None:
    one = compare(comparison(tmp_path, seeds=[0]), work=here)
    two = compare(comparison(tmp_path, seeds=[0], output_dir=str(tmp_path / "ray")), work=on_ray(2))
    for row, other in zip(one["arms"], two["arms"], strict=True):
        assert (
            row["accuracy"] == other["accuracy"]
            and row["cost"]["tokens_per_trace"] == other["cost"]["tokens_per_trace"]
        )
    wrong = comparison(tmp_path, seeds=[0], arms={"right": {}, "wrong": {"method": {"lora_module": ["no_such_layer"]}}})
    with pytest.raises(MemreasonError, match=r"wrong, seed 0: on .*no_such_layer"):
        compare(wrong, work=on_ray(2))
