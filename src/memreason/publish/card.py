"""The model card: what a model is, what it was made of, what was measured, and how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from memreason.core.files import read_json
from memreason.encode.base import BUILT_IN
from memreason.finetune.checkpoint import Checkpoint

__all__ = ["model_card"]

LICENCES = dict.fromkeys(BUILT_IN, "apache-2.0")  # of other bases a user knows better


def model_card(kind: str, name: str, loaded: Checkpoint, checks: dict[str, str]) -> str:
    """README.md of an exported folder: `kind` is hf, gguf or adapter, `name` what stands as its title."""
    recipe, run = loaded.recipe, loaded.folder.parent
    manifest = read_json(run / "manifest.json") if (run / "manifest.json").is_file() else {}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.j2").render(
        kind=kind,
        name=name,
        recipe=recipe,
        yaml=recipe.to_yaml(),
        scheme=loaded.codec.scheme,
        licence=LICENCES.get(recipe.model.base),
        hub_base=_hub_id(recipe.model.base),
        manifest=manifest,
        results=_results(loaded.folder),
        checks=checks,
    )


def _hub_id(base: str) -> str | None:
    """A base that the hub would know: no folder of this machine."""
    known = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    return known.get(base) or (base if base.count("/") == 1 and not Path(base).exists() else None)


def _results(folder: Path) -> list[dict[str, Any]]:
    """The largest evaluation of each task and split; of the model alone, without a corpus to retrieve from."""
    found = [read_json(path) for path in sorted(folder.glob("eval/*/results.json"))]
    alone = [one for one in found if one["settings"].get("memory") in (None, "recall")]
    largest = {(one["task"], one["split"]): one for one in sorted(alone, key=lambda one: one["n"])}
    return [largest[key] for key in sorted(largest)]
