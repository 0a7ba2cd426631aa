"""Step types: fitted on hidden states of the prefix so far, or on words; told again for new text; kept with a run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from conftest import byte_level, own_traces, save_base, tiny_model, tiny_recipe
from memreason import pipeline
from memreason.cli import main
from memreason.core.errors import CheckpointError, DataError
from memreason.core.files import read_json, read_traces, write_json, write_traces
from memreason.core.kinds import CLUSTERED, OPERATORS
from memreason.core.recipe import load_recipe
from memreason.core.stages import ModelRecipe
from memreason.core.trace import Question, Step, Trace
from memreason.data.sums import make_sums
from memreason.data.tasks import Splits, load_splits
from memreason.encode.scheme import TokenScheme
from memreason.encode.step_types.clusters import fit_balanced, fit_centres, nearest
from memreason.encode.step_types.hidden import hidden_vectors, step_vectors
from memreason.encode.step_types.typer import (
    Features,
    _different,
    fit_typer,
    load_typer,
    save_typer,
    with_types,
)
from memreason.encode.step_types.vae import fit_vae
from memreason.finetune.prepare import prepare
from memreason.finetune.step_types import with_step_types
from memreason.measure.clusters import clusters, purity

TEMPLATES = (TokenScheme().question_template, TokenScheme().choice_template)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMREASON_HOME", str(tmp_path / "cache"))


def test_vectors_are_of_the_prefix_so_far() -> None:
    """One pass over a trace gives what a pass over each prefix gives, whatever stands beside it in the batch."""
    tokenizer = byte_level()
    model, traces = tiny_model(len(tokenizer)), own_traces(5)
    scheme = TokenScheme()
    vectors = hidden_vectors(traces, model, tokenizer, scheme.question_text, batch_size=2)
    assert vectors.shape == (sum(len(trace.steps) for trace in traces), 32)
    question = tokenizer(scheme.question_text(traces[1].question))["input_ids"]
    first, second = (tokenizer(f" {step.text}\n")["input_ids"] for step in traces[1].steps)
    for place, prefix, step in ((1, question, first), (2, question + first, second)):
        with torch.no_grad():
            layers = model.base_model(input_ids=torch.tensor([prefix + step]), output_hidden_states=True).hidden_states
            states = layers[1][0]  # of the embedding and two layers
        np.testing.assert_allclose(vectors[place], states[len(prefix) :].mean(0).numpy(), atol=1e-5)


@pytest.mark.parametrize("method", CLUSTERED)
def test_train_learns_step_types_of_its_training_traces(method: str, tmp_path: Path) -> None:
    changes = {"data.step_types": method, "data.n_types": 2, "data.type_epochs": 3, "data.validation": 0.25}
    recipe = tiny_recipe(tmp_path, save_base(tmp_path / "base"), **changes)
    run = pipeline.train(recipe)
    assert recipe.tokens.kinds == ["type_0", "type_1"]
    assert {"<type_0_0>", "<type_1_1>"} <= set(read_json(run / "manifest.json")["tokens"])
    typer, splits = load_typer(run / "step_types"), load_splits(recipe.data)
    again = fit_typer(splits.train, recipe, TEMPLATES)
    assert typer.arrays.keys() == again.arrays.keys()
    assert all((typer.arrays[name] == again.arrays[name]).all() for name in typer.arrays)
    assert pipeline.train(recipe) == run  # gone on with, or done: the same types


def test_a_run_goes_on_with_the_types_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(tmp_path, save_base(tmp_path / "base"), **{"data.step_types": "tf-idf", "data.n_types": 2})
    recipe.folder.mkdir()
    first = prepare(recipe, run=recipe.folder, warn=lambda _: None)
    assert not (recipe.folder / "step_types").exists()  # a dry run keeps nothing
    (recipe.folder / "recipe.yaml").write_text(recipe.to_yaml())
    prepare(recipe, run=recipe.folder, warn=lambda _: None)
    monkeypatch.setattr("memreason.finetune.step_types.fit_typer", None)
    assert prepare(recipe, run=recipe.folder, warn=lambda _: None).splits == first.splits


def test_only_training_traces_are_fitted_on(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, tmp_path, **{"data.step_types": "tf-idf", "data.n_types": 2})
    rows = [Trace(Question(str(n), "1"), (Step((), text),)) for n, text in enumerate(("one two", "two three", "four"))]
    splits = with_step_types(recipe, Splits(rows[:2], rows[2:], []), TokenScheme(), None, lambda _: None)
    assert {step.kinds for trace in splits.train for step in trace.steps} == {("type_0",), ("type_1",)}
    assert splits.validation[0].steps[0].kinds == ()  # none of its words stood in training


# Steps of four kinds, in words and in vectors.
FOUR = {
    "+": "adding {n} and more makes a sum",
    "-": "taking {n} away leaves fewer",
    "*": "multiplied {n} times over",
    "/": "divided into {n} equal parts",
}


def four_kinds(count: int) -> list[Trace]:
    order = [list(FOUR)[(n + n // 4 + place) % 4] for n in range(count) for place in range(3)]
    steps = [Step((kind,), FOUR[kind].format(n=n)) for n, kind in enumerate(order)]
    return [Trace(Question(f"q{n}", "1"), tuple(steps[3 * n : 3 * n + 3])) for n in range(count)]


def told_by_vectors(traces: Sequence[Trace], *_: object) -> np.ndarray:
    """Hidden states in which the kinds of FOUR can be told, beside much else; empty texts have none."""
    rng, kinds = np.random.default_rng(0), list(FOUR)
    centres = rng.normal(size=(4, 24))
    rows = [
        centres[next(i for i, kind in enumerate(kinds) if step.text[:3] == FOUR[kind][:3])] * 2 + rng.normal(size=24)
        if step.text
        else np.full(24, np.nan)
        for trace in traces
        for step in trace.steps
    ]
    return np.array(rows, np.float32)


@pytest.mark.parametrize("method", CLUSTERED)
def test_known_types_are_recovered_and_told_of_new_steps(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memreason.encode.step_types.typer.step_vectors", told_by_vectors)
    monkeypatch.setattr("memreason.encode.step_types.typer.identity", lambda *_: {})
    traces = four_kinds(100)
    recipe = load_recipe(None, {"data.step_types": method, "data.n_types": 4, "data.type_epochs": 40})
    typer = fit_typer(traces, recipe, TEMPLATES)
    made = with_types(typer, traces)
    share = purity(made, traces)
    assert share is not None
    assert share > 0.95
    save_typer(typer, tmp_path / "typer")
    assert {path.suffix for path in (tmp_path / "typer").iterdir()} == {".json", ".safetensors"}
    loaded = load_typer(tmp_path / "typer")
    assert with_types(loaded, traces) == made
    new = [Trace(Question("new", "1"), (Step((), ""), Step((), "adding 7777 and more makes a sum"), Step((), "")))]
    kinds = [step.kinds for step in with_types(loaded, new)[0].steps]
    plus = next(step.kinds for trace in made for step in trace.steps if step.text.startswith("adding"))
    assert kinds == [(), plus, ()]


def test_balanced_clusters_are_of_nearly_equal_size() -> None:
    rng = np.random.default_rng(0)
    uneven = np.concatenate([rng.normal(0, 1, (240, 6)), rng.normal(1.5, 1, (60, 6))]).astype(np.float32)
    data = load_recipe(None, {"data.step_types": "balanced-k-means", "data.n_types": 3}).data
    sizes = np.bincount(nearest(uneven, fit_balanced(uneven, data)), minlength=3)
    plain = np.bincount(nearest(uneven, fit_centres(uneven, data)), minlength=3)
    assert sizes.sum() == 300
    assert max(abs(sizes - 100)) <= 5 < max(abs(plain - 100))


def test_unknown_words_tell_no_type() -> None:
    recipe = load_recipe(None, {"data.step_types": "tf-idf", "data.n_types": 4})
    typer = fit_typer(four_kinds(40), recipe, TEMPLATES)
    new = [Trace(Question("q", "1"), (Step((), "zebra quagga"), Step((), ""), Step((), "zebra divided")))]
    kinds = [step.kinds for step in with_types(typer, new)[0].steps]
    assert kinds[:2] == [(), ()]
    assert kinds[2] in {(f"type_{n}",) for n in range(4)}


def test_a_step_beyond_the_context_tells_no_type() -> None:
    tokenizer = byte_level()
    model, (trace,) = tiny_model(len(tokenizer)), own_traces(2)[1:]
    until_first = [TokenScheme().question_text(trace.question), f" {trace.steps[0].text}\n"]
    model.config.max_position_embeddings = sum(len(tokenizer(text)["input_ids"]) for text in until_first)
    vectors = hidden_vectors([trace], model, tokenizer, TokenScheme().question_text)
    assert np.isnan(vectors).all(axis=1).tolist() == [False, True]


def test_vectors_are_read_once_for_the_same_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ModelRecipe(base=str(save_base(tmp_path / "base")), dtype="fp32")
    first = step_vectors(own_traces(5), base, TokenScheme().question_text)
    monkeypatch.setattr("memreason.encode.step_types.hidden.load_model", None)
    assert (step_vectors(own_traces(5), base, TokenScheme().question_text) == first).all()
    with pytest.raises(TypeError):
        step_vectors(own_traces(6), base, TokenScheme().question_text)
    assert [path.suffix for path in (tmp_path / "cache" / "steps").iterdir()] == [".npy"]


@pytest.mark.parametrize("method", ["k-means", "arithmetic-14"])
def test_the_command_writes_traces_to_train_on(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "base")
    write_traces("own.jsonl", make_sums("train", 8))
    words = ["step-types", "own.jsonl", "--model_name_or_path", str(tmp_path / "base"), "--num_types", "3"]
    assert main([*words, "--selection_method", method, "--batch_size", "4", "--out", "made"]) == 0
    made = read_traces("made/traces.jsonl")
    assert [trace.question for trace in made] == [trace.question for trace in read_traces("own.jsonl")]
    about = read_json("made/clusters.json")
    assert about["steps"] == sum(len(trace.steps) for trace in made)
    assert 0 < about["purity"] <= 1
    assert "purity against the labelled kinds" in capsys.readouterr().out
    learnt = method == "k-means"
    assert {kind for trace in made for step in trace.steps for kind in step.kinds} <= set(
        ("type_0", "type_1", "type_2") if learnt else OPERATORS
    )
    assert (Path("made/typer/typer.json").is_file(), Path("made/clusters.svg").is_file()) == (learnt, learnt)
    if learnt:
        svg = Path("made/clusters.svg").read_text()
        assert all(f"{name} · {row['steps']} steps" in svg for name, row in about["types"].items())
    assert main([*words, "--out", "made"]) == 2
    assert "made: holds files already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "a file of traces or a task is needed"),
        (["own.jsonl"], "--out: a folder is needed"),
        (["own.jsonl", "--out", "x", "--method", "mlp"], "--method: one of tf-idf, k-means"),
        (["own.jsonl", "--out", "x", "--num_types", "1"], "data.n_types: input should be greater than or equal to 2"),
        (["nowhere.jsonl", "--out", "x"], "nowhere.jsonl: no such file"),
        (["nonsense", "--out", "x"], "unknown task 'nonsense'"),
        (["own.jsonl", "--out", "x", "--method", "tf-idf", "--n-types", "9"], "have 2 different steps with a text"),
        (["own.jsonl", "--out", "x", "--method", "tf-idf", "--min_frequency", "999"], "they leave no word of 36 steps"),
    ],
)
def test_clear_errors(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_traces("own.jsonl", own_traces(24))
    assert main(["step-types", *words]) == 2
    assert says in capsys.readouterr().err
    assert not Path("x").exists()


def test_next_steps_and_typers_that_are_not_there(tmp_path: Path) -> None:
    data = load_recipe(None, {"data.step_types": "vae-next-step", "data.n_types": 2}).data
    with pytest.raises(DataError, match="no trace has two steps; use vae"):
        fit_vae(np.eye(3, dtype=np.float32), data, np.arange(3))
    with pytest.raises(CheckpointError, match=r"holds no typer.json"):
        load_typer(tmp_path)
    (tmp_path / "typer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a typer of this version"):
        load_typer(tmp_path)


def test_words_of_many_steps_are_never_made_dense() -> None:
    """tf-idf of MATH's 60,000 lines would take gigabytes."""
    rows = sparse.csr_matrix(([1.0, 1.0, 2.0], ([0, 1, 2], [7, 7, 9])), shape=(3, 10**9))
    assert (_different(rows, 5), _different(rows, 2)) == (2, 2)
    rows = sparse.csr_matrix(([1.0] * 9, (np.repeat(range(3), 3), [0, 1, 2, 0, 1, 5, 7, 8, 9])), shape=(3, 10))
    made = [Trace(Question("q", "1"), tuple(Step(("type_0",), text) for text in ("near", "nearer", "far")))]
    found = Features(rows, np.ones(3, bool), np.zeros(3, np.intp))
    assert clusters(made, made, found)["types"]["type_0"]["examples"][-1] == "far"


def test_a_typer_of_another_layer_is_refused(tmp_path: Path) -> None:
    data = load_recipe(None, {"data.step_types": "tf-idf", "data.n_types": 2})
    save_typer(fit_typer(make_sums("train", 4), data, TEMPLATES), tmp_path / "typer")
    settings = read_json(tmp_path / "typer" / "typer.json")
    for changed in ({**settings, "layer": "last"}, {name: settings[name] for name in settings if name != "layer"}):
        write_json(tmp_path / "typer" / "typer.json", changed)
        with pytest.raises(CheckpointError, match="not a typer of this version"):
            load_typer(tmp_path / "typer")
