"""The recipe: all stages of a run together, read from a file and flags."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import Field, model_validator

from memreason.core.kinds import kinds_of
from memreason.core.settings import Overrides, read_settings
from memreason.core.stages import DataRecipe, EvalRecipe, MethodRecipe, ModelRecipe, Stage, TokensRecipe, TrainRecipe

__all__ = ["Recipe", "load_recipe", "shipped"]


class Recipe(Stage):
    name: str = Field("run", description="names the run folder", pattern=r"^[\w.=+-]+$")
    seed: int = Field(0, description="of training")
    output_dir: str | None = Field(None, description="run folder (None: runs/NAME)")
    data: DataRecipe = DataRecipe()
    model: ModelRecipe = ModelRecipe()
    tokens: TokensRecipe = TokensRecipe()
    method: MethodRecipe = MethodRecipe()
    train: TrainRecipe = TrainRecipe()
    eval: EvalRecipe = EvalRecipe()

    @property
    def folder(self) -> Path:
        return Path(self.output_dir or f"runs/{self.name}")

    @model_validator(mode="after")
    def follow_step_types(self) -> Recipe:
        """Kinds that a rule or a fit gives are those of the tokens."""
        kinds = kinds_of(self.data.step_types, self.data.n_types)
        if kinds is None:
            return self
        if "kinds" in self.tokens.model_fields_set and self.tokens.kinds != list(kinds):
            raise ValueError(
                f"tokens.kinds: data.step_types {self.data.step_types} gives {', '.join(kinds)}; leave tokens.kinds out"
            )
        self.tokens = self.tokens.model_copy(update={"kinds": list(kinds)})
        return self

    @model_validator(mode="after")
    def check_together(self) -> Recipe:
        if self.method.name == "prefix-tuning" and (self.train.model_extra or {}).get("gradient_checkpointing"):
            raise ValueError("train.gradient_checkpointing: prefix-tuning does not take it; leave it out")
        if self.method.name == "prompting" and self.tokens.add:
            raise ValueError("tokens.add: nothing is trained by method prompting, so it must be false")
        if self.eval.engine == "chat" and self.method.name != "prompting":
            raise ValueError(
                "eval.engine: chat asks another model than the trained one; it needs method.name prompting"
            )
        if self.method.name == "full" and self.model.quantize:
            raise ValueError("model.quantize: quantised weights cannot be trained in full; use a LoRA method")
        if self.method.name == "prefix-tuning" and self.tokens.sparse_attention:
            raise ValueError(
                "tokens.sparse_attention: prefix-tuning's virtual tokens stand in no segment; use another method.name"
            )
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def shipped(kind: str = "") -> dict[str, Path]:
    """Recipes that come with the package: name -> file. Those of labelling runs are of kind "label"."""
    return {path.stem: path for path in sorted((Path(__file__).parent.parent / "recipes" / kind).glob("*.yaml"))}


def load_recipe(source: str | Path | None, overrides: Overrides = ()) -> Recipe:
    """Read a recipe file or a shipped recipe's name, then apply overrides such as ("train.learning_rate", "1e-3").

    Raises RecipeError holding every mistake of file and overrides together.
    """
    return read_settings(Recipe, source, overrides, shipped())
