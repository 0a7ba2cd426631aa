"""A YAML file and the flags beside it become a model; every mistake is reported at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from memreason.core.errors import RecipeError

__all__ = ["Overrides", "read_settings"]

Overrides = Sequence[tuple[str, Any]] | Mapping[str, Any]
T = TypeVar("T", bound=BaseModel)


def read_settings(model: type[T], source: str | Path | None, overrides: Overrides, known: Mapping[str, Path]) -> T:
    """Read a YAML file, or what a name stands for in `known`, apply overrides, and validate the whole as a `model`.

    Raises RecipeError holding every mistake of file and overrides together.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    if source is not None:
        values = _read_yaml(known.get(str(source), Path(source)), known)
    items = overrides.items() if isinstance(overrides, Mapping) else overrides
    for key, value in items:
        problems += _put(values, key.split("."), _number(value), key)
    try:
        recipe = model.model_validate(values)
    except ValidationError as error:
        problems += [line for item in error.errors() for line in _say(item)]
        raise RecipeError(problems, str(source or "recipe")) from error
    if problems:
        raise RecipeError(problems, str(source or "recipe"))
    return recipe


def _read_yaml(path: Path, known: Iterable[str]) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"no such file, and no shipped recipe of that name ({', '.join(known)})", str(path))
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 at byte {error.start}", str(path)) from error
    except yaml.YAMLError as error:
        raise RecipeError("not YAML: " + " ".join(str(error).split()), str(path)) from error
    if not isinstance(values, dict):
        raise RecipeError(f"a mapping of stages is needed, got {values!r}", str(path))
    return values


class _Loader(yaml.SafeLoader):
    """YAML 1.2's booleans and floats: in 1.1 `no` is False (`save_strategy: no`) and `1e-3` is a text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":bool", ":float"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.\d+|\d+\.\d*)([eE][-+]?\d+)?$|[-+]?\d+[eE][-+]?\d+$|[-+]?\.(inf|nan)$"),
    list("-+0123456789."),
)


def _number(value: Any) -> Any:
    """A flag's text as a recipe file would read it."""
    if not isinstance(value, str):
        return value
    try:
        read = yaml.load(value, _Loader)
    except yaml.YAMLError:
        return value
    return value if isinstance(read, dict) and not value.lstrip().startswith("{") else read  # "Memory:" is a text


def _put(values: dict[str, Any], path: list[str], value: Any, key: str) -> list[str]:
    for part in path[:-1]:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            return [f"{key}: {part} is not a stage of the recipe"]
        values = inner
    values[path[-1]] = value
    return []


def _say(item: Any) -> list[str]:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "value_error":
        return str(item["ctx"]["error"]).split("\n")
    if item["type"] == "extra_forbidden":
        return [f"{place}: no such field"]
    return [f"{place}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}"]
