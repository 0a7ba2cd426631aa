"""A typer: what was learnt of the steps of some traces, and tells the kind, type_0 ..., of any step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from memreason.core.errors import CheckpointError, DataError
from memreason.core.files import new_folder, read_json, write_json, writing
from memreason.core.kinds import VAES
from memreason.core.recipe import Recipe
from memreason.core.stages import DataRecipe, ModelRecipe
from memreason.core.trace import Step, Trace
from memreason.encode.base import identity
from memreason.encode.scheme import TokenScheme
from memreason.encode.step_types.clusters import fit_balanced, fit_centres, nearest
from memreason.encode.step_types.hidden import BATCH, step_vectors
from memreason.encode.step_types.vae import fit_vae, vae_types
from memreason.encode.step_types.words import fit_words, word_vectors

__all__ = ["Features", "Typer", "features", "fit_typer", "load_typer", "save_typer", "with_types"]

SETTINGS, ARRAYS = "typer.json", "typer.safetensors"
LAYER = "middle"  # whose states hidden.py gives: those of another would be told by wrong centres
FITTED_BY = ("step_types", "n_types", "seed", "type_epochs", "min_frequency", "max_frequency")  # of the data recipe
Arrays = dict[str, NDArray[np.float32]]
Fit = Callable[[Any, DataRecipe, NDArray[np.intp]], Arrays]

METHODS: dict[str, tuple[Fit, Callable[[Any, Arrays], NDArray[np.intp]]]] = {
    "tf-idf": (lambda vectors, data, _: fit_centres(vectors, data), nearest),
    "k-means": (lambda vectors, data, _: fit_centres(vectors, data), nearest),
    "balanced-k-means": (lambda vectors, data, _: fit_balanced(vectors, data), nearest),
    **dict.fromkeys(VAES, (fit_vae, vae_types)),
}


@dataclass(frozen=True)
class Typer:
    """How it was fitted, on hidden states of which model, read how; its numbers, and of tf-idf its words."""

    data: DataRecipe
    model: ModelRecipe
    templates: tuple[str, str]  # of questions and of their choices
    arrays: Arrays
    words: tuple[str, ...] = ()

    def types(self, vectors: Any) -> NDArray[np.intp]:
        """The type of each of some vectors: (n, features) -> (n,)."""
        return METHODS[self.data.step_types][1](vectors, self.arrays)


class Features(NamedTuple):
    """Vectors of those steps of some traces that something is known of."""

    vectors: Any  # (known steps, features), an array or a sparse matrix
    known: NDArray[np.bool_]  # (steps,): whether a step has one
    traces: NDArray[np.intp]  # (known steps,): which trace it is of


def features(typer: Typer, traces: Sequence[Trace], batch_size: int = BATCH) -> Features:
    """What a typer looks at, of each step that has a text, lies in the model's context, and for tf-idf holds a known
    word. The base model is loaded if these texts were not read with it before."""
    owner = np.repeat(np.arange(len(traces)), [len(trace.steps) for trace in traces])
    if typer.words:
        vectors = word_vectors(
            [step.text for trace in traces for step in trace.steps], typer.words, typer.arrays["idf"]
        )
        known = np.diff(vectors.indptr) > 0
        return Features(vectors[known], known, owner[known])
    scheme = TokenScheme(question_template=typer.templates[0], choice_template=typer.templates[1])
    states = step_vectors(traces, typer.model, scheme.question_text, batch_size)
    known = ~np.isnan(states[:, 0])
    vectors = states[known]
    if "mean" in typer.arrays:
        vectors = (vectors - typer.arrays["mean"]) / typer.arrays["scale"]
    return Features(vectors, known, owner[known])


def fit_typer(traces: Sequence[Trace], recipe: Recipe, templates: tuple[str, str], batch_size: int = BATCH) -> Typer:
    """Learn the types of these traces' steps as `data.step_types` of the recipe says; `templates` are a scheme's.

    The same seed gives the same types. Raises DataError for fewer different steps than types.
    """
    data = DataRecipe(**recipe.data.model_dump(include=set(FITTED_BY)))
    typer = Typer(data, embedder(recipe), templates, {})
    if data.step_types == "tf-idf":
        words, idf = fit_words([step.text for trace in traces for step in trace.steps], data)
        typer = replace(typer, words=tuple(words), arrays={"idf": idf})
    found = features(typer, traces, batch_size)
    vectors = found.vectors
    _check_enough(vectors, data)
    if not typer.words:  # the few features that are a thousand times the others would decide alone
        mean, scale = vectors.mean(0), np.maximum(vectors.std(0), 1e-6)
        typer = replace(typer, arrays={"mean": mean, "scale": scale})
        vectors = (vectors - mean) / scale
    fit, _ = METHODS[data.step_types]
    return replace(typer, arrays=typer.arrays | fit(vectors, data, found.traces))


def _check_enough(vectors: Any, data: DataRecipe) -> None:
    different = _different(vectors, data.n_types)
    if different < data.n_types:
        raise DataError(
            f"data.n_types {data.n_types}: the training traces have {different} different steps with a text; "
            "give more traces or ask for fewer types"
        )


def _different(vectors: Any, enough: int) -> int:
    """How many rows differ, counted no further than `enough`: tf-idf of a large set, made dense, fills the memory."""
    seen: set[bytes] = set()
    for place in range(vectors.shape[0]):
        row = vectors[place]
        seen.add(row.indices.tobytes() + row.data.tobytes() if hasattr(row, "indices") else row.tobytes())
        if len(seen) == enough:
            break
    return len(seen)


def embedder(recipe: Recipe) -> ModelRecipe:
    """The model whose hidden states are clustered, with the commit or fingerprint that it is known by."""
    model, named = recipe.model, recipe.data.embedding_model
    if named and named != model.base:
        model = ModelRecipe(base=named, trust_remote_code=model.trust_remote_code, unsafe_weights=model.unsafe_weights)
    exact = model.dtype == "auto" and not torch.cuda.is_available()  # not whichever is faster here: types would differ
    update = {"untie": False, "random_initialize": False, **({"dtype": "fp32"} if exact else {})}
    if recipe.data.step_types != "tf-idf":
        update |= {name: value for name, value in identity(model.base, model.revision).items() if value}
    return model.model_copy(update=update)


def with_types(typer: Typer, traces: Sequence[Trace], batch_size: int = BATCH) -> list[Trace]:
    """The same traces, the kind of each step told by the typer: ("type_0",) ...

    A step that nothing is known of has none, (), and is marked as an assignment: one without a text, one beyond the
    model's longest context, and for tf-idf one without a word that stood in the fitted steps.
    """
    if not any(trace.steps for trace in traces):
        return list(traces)
    found = features(typer, traces, batch_size)
    types = np.full(len(found.known), -1)
    if found.known.any():
        types[found.known] = typer.types(found.vectors)
    told = iter(types.tolist())
    return [replace(trace, steps=tuple(_typed(trace.steps, told))) for trace in traces]


def _typed(steps: Iterable[Step], told: Any) -> Iterable[Step]:
    for step in steps:
        number = next(told)
        yield replace(step, kinds=(f"type_{number}",) if number >= 0 else ())


def save_typer(typer: Typer, folder: Path) -> None:
    """JSON and safetensors, in a folder that appears whole or not at all."""
    with new_folder(folder) as partial:
        settings = {
            "data": typer.data.model_dump(mode="json", include=set(FITTED_BY)),
            "model": typer.model.model_dump(mode="json"),
            "templates": typer.templates,
            "words": typer.words,
            "layer": LAYER,
        }
        write_json(partial / SETTINGS, settings)
        with writing(partial / ARRAYS):
            save_file({name: np.ascontiguousarray(array) for name, array in typer.arrays.items()}, partial / ARRAYS)


def load_typer(folder: Path) -> Typer:
    """Raises CheckpointError if the folder holds no typer of this version."""
    if not (folder / SETTINGS).is_file():
        raise CheckpointError(f"{folder}: holds no {SETTINGS}, so it is no typer of `memreason step-types`")
    try:
        settings, arrays = read_json(folder / SETTINGS), load_file(folder / ARRAYS)
        question, choice = settings["templates"]
        if settings["layer"] != LAYER:
            raise ValueError(f"it looks at layer {settings['layer']!r}, not at {LAYER!r}")
        data, model = DataRecipe(**settings["data"]), ModelRecipe(**settings["model"])
        return Typer(data, model, (question, choice), arrays, tuple(settings["words"]))
    except (KeyError, TypeError, ValueError, OSError, ValidationError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a typer of this version ({type(error).__name__}: {error})") from error
