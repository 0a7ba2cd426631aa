"""The recipe of a comparison: what every arm starts from, what each changes, and on which seeds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from memreason.core.errors import RecipeError
from memreason.core.files import settings_hash
from memreason.core.recipe import Recipe, load_recipe, shipped
from memreason.core.settings import Overrides, read_settings
from memreason.core.stages import Stage

__all__ = ["Comparison", "Job", "jobs_of", "load_comparison"]

STAGES = tuple(name for name, field in Recipe.model_fields.items() if isinstance(field.default, Stage))
Fields = dict[str, dict[str, Any]]  # stage -> field -> value, as in a recipe


class Comparison(Stage):
    name: str = Field("comparison", description="names the folder", pattern=r"^[\w.=+-]+$")
    about: str = Field("", description="what is asked, in a sentence")
    recipe: str = Field("demo", description="recipe file, or a shipped recipe's name, that every arm starts from")
    settings: Fields = Field({}, description="what all arms change in it")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="of training: each arm is trained once with each")
    same: Literal["steps", "tokens"] = Field("steps", description="what every trained arm gets as much of")
    against: str = Field("", description="arm that the others are compared with (empty: the first)")
    arms: dict[str, Fields] = Field(min_length=2, description="what each arm changes")
    only: list[str] = Field([], description="take these arms alone (empty: all)")
    output_dir: str | None = Field(None, description="folder (None: runs/NAME)")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir or f"runs/{self.name}")

    @model_validator(mode="after")
    def check_arms(self) -> Comparison:
        problems = [
            f"{where}: no such stage of a recipe. There are: {', '.join(STAGES)}"
            for name, fields in {"settings": self.settings, **self.arms}.items()
            for stage in fields
            if stage not in STAGES
            for where in (f"{name}.{stage}",)
        ]
        if unknown := [f"only: {_no_arm(name, self.arms)}" for name in self.only if name not in self.arms]:
            problems += unknown
        elif self.only:
            self.arms = {name: fields for name, fields in self.arms.items() if name in self.only}
        self.against = self.against or next(iter(self.arms))
        if self.against not in self.arms:
            problems.append(f"against: {_no_arm(self.against, self.arms)}")
        if len(set(self.seeds)) < len(self.seeds):
            problems.append(f"seeds: each once, got {self.seeds}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Job:
    """One arm on one seed. Two jobs of the same `recipe.output_dir` are one."""

    arm: str
    seed: int
    recipe: Recipe


def load_comparison(source: str | Path, overrides: Overrides = ()) -> Comparison:
    """Read a comparison's file or a shipped one's name. Overrides of a recipe's fields, such as ("eval.n", 100), change
    all arms, others, such as ("seeds", [0]), the comparison.

    Raises RecipeError holding every mistake of file and overrides together.
    """
    items = overrides.items() if isinstance(overrides, Mapping) else overrides
    put = [(f"settings.{key}" if key.split(".")[0] in STAGES else key, value) for key, value in items]
    return read_settings(Comparison, source, put, shipped("compare"))


def jobs_of(comparison: Comparison, known: Mapping[str, Fields] | None = None) -> list[Job]:
    """Every arm on every seed, seed by seed, as a recipe whose folder lies in the comparison's. `known` are fields of
    arms that stand in none of the files.

    Arms that come to the same recipe share a folder, so that nothing is trained twice; so do the seeds of an arm on
    which nothing of it depends. Raises RecipeError with the mistakes of all arms.
    """
    jobs, problems = [], list[str]()
    folders: dict[str, Path] = {}
    for seed, arm in product(comparison.seeds, comparison.arms):  # a whole comparison on one seed comes first
        fields = dict(_dotted(comparison.settings)) | dict(_dotted(comparison.arms[arm]))
        fields |= dict(_dotted((known or {}).get(arm, {})))
        try:
            recipe = load_recipe(comparison.recipe, {**fields, "seed": seed})
        except RecipeError as error:
            problems += [f"arm {arm}: {problem}" for problem in error.problems]
            continue
        if not _depends_on_seed(recipe):
            recipe = recipe.model_copy(update={"seed": comparison.seeds[0]})
        key = settings_hash(
            recipe.model_dump(mode="json", exclude={"eval", "name", "output_dir"}, exclude_defaults=True)
        )
        folder = folders.setdefault(key, comparison.folder / "arms" / f"{_slug(arm)}-{key}")
        jobs.append(Job(arm, seed, recipe.model_copy(update={"name": _slug(arm), "output_dir": str(folder)})))
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)), comparison.name)
    return jobs


def _no_arm(name: str, arms: Iterable[str]) -> str:
    return f"there is no arm {name!r}. There are: {', '.join(arms)}"


def _dotted(fields: Fields) -> Iterator[tuple[str, Any]]:
    for stage, values in fields.items():
        yield from ((f"{stage}.{name}", value) for name, value in values.items())


def _depends_on_seed(recipe: Recipe) -> bool:
    return recipe.method.name != "prompting" or recipe.data.k_shot > 0


def _slug(arm: str) -> str:
    return re.sub(r"[^\w.+=]+", "-", arm).strip("-") or "arm"
