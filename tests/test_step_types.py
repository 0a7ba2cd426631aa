"""Step types: fitted on hidden states of the prefix so far, or on words; told again for new text; kept with a run."""

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import byte_level, own_traces, save_base, tiny_model, tiny_recipe
from memreason import pipeline
from memreason.core.files import read_json
from memreason.core.kinds import CLUSTERED
from memreason.data.tasks import load_splits
from memreason.encode.scheme import TokenScheme
from memreason.encode.step_types.hidden import hidden_vectors
from memreason.encode.step_types.typer import fit_typer, load_typer

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
            states = model.base_model(input_ids=torch.tensor([prefix + step])).last_hidden_state[0]
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
