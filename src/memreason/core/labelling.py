"""The recipe of a labelling run: questions, a teacher, a protocol, checks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import yaml
from pydantic import Field, field_validator

from memreason.core.recipe import shipped
from memreason.core.settings import Overrides, read_settings
from memreason.core.stages import Stage

__all__ = [
    "CheckName",
    "ChecksRecipe",
    "EndpointRecipe",
    "LabelRecipe",
    "ProtocolName",
    "TeacherRecipe",
    "load_label_recipe",
]

CheckName = Literal[
    "kinds", "empty", "duplicate", "one_line", "gives_away", "uses_above", "length", "language", "answer"
]
ProtocolName = Literal["plan+fill", "single", "ordered", "tag", "self"]


class ChecksRecipe(Stage):
    skip: list[CheckName] = Field([], description="checks that are left out")
    min_steps: int = Field(2, ge=1, description="fewest steps of a trace")
    max_steps: int = Field(12, ge=1, description="most steps of a trace")
    max_characters: int = Field(600, ge=1, description="longest step")


class EndpointRecipe(Stage):
    base_url: str = Field("https://api.openai.com/v1", description="address of an OpenAI-compatible server")
    key_env: str = Field("OPENAI_API_KEY", description="environment variable that holds its key")
    in_flight: int = Field(16, ge=1, description="requests at a time")
    requests_per_minute: int | None = Field(None, ge=1, description="limit (None: none)")
    tokens_per_minute: int | None = Field(None, ge=1, description="limit on prompt and reply tokens (None: none)")

    @field_validator("base_url")
    @classmethod
    def check_base_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"teacher.endpoints: base_url must be http(s)://HOST/v1, got {value.split('@')[-1]!r}")
        if parts.username or parts.password or parts.query:
            raise ValueError("teacher.endpoints: no keys in base_url; put the key into the variable of key_env")
        return value.rstrip("/")


class TeacherRecipe(Stage):
    model: str = Field("", description="name of the teacher, as the server knows it; for `self`, a run or base model")
    local: bool | None = Field(None, description="run the model here, with our own engine (None: for `self`)")
    endpoints: list[EndpointRecipe] = Field([EndpointRecipe()], min_length=1, description="servers of that model")
    temperature: float | None = Field(0.0, ge=0, description="of sampling (None: the server's own)")
    top_p: float | None = Field(None, gt=0, le=1, description="of sampling (None: the server's own)")
    max_tokens: int = Field(1024, ge=16, description="limit of one reply")
    tokens_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="what the server calls that limit"
    )
    structured: Literal["auto", "schema", "json", "text"] = Field(
        "auto", description="how JSON is asked for (auto: the strictest way that the server takes)"
    )
    timeout: float = Field(120.0, gt=0, description="seconds until a request is given up and tried again")
    tries: int = Field(6, ge=1, description="tries of one request that meets errors of server or network")
    patience: float = Field(300.0, ge=0, description="seconds without any reply until the run stops")


class LabelRecipe(Stage):
    name: str | None = Field(None, description="names the folder (None: TASK-SPLIT)", pattern=r"^[\w.=+-]+$")
    output_dir: str | None = Field(None, description="folder (None: labels/NAME)")
    task: str = Field("strategyqa", description="task whose questions are labelled, or a .jsonl file of one's own")
    split: str = Field("train", description="split of the task")
    n: int | None = Field(None, ge=1, description="how many questions, drawn without replacement (None: all)")
    seed: int = Field(0, description="of the draw of questions")
    shard: str | None = Field(None, description="K/N: the K-th of N parts", pattern=r"^[1-9]\d*/[1-9]\d*$")
    protocol: ProtocolName = Field("plan+fill", description="how a trace is asked for")
    prompts: str | None = Field(None, description="folder of own prompt files, which replace the shipped ones by name")
    teacher: TeacherRecipe = TeacherRecipe()
    checks: ChecksRecipe = ChecksRecipe()
    attempts: int = Field(3, ge=1, description="replies or traces of a question that may fail before it is rejected")
    sample: int = Field(0, ge=0, description="which opinion: another number asks everything anew")
    prices: str | None = Field(None, description="own price table (YAML), before the shipped one")

    @field_validator("shard")
    @classmethod
    def check_shard(cls, value: str | None) -> str | None:
        if value and int(value.split("/")[0]) > int(value.split("/")[1]):
            raise ValueError(f"shard: K must not exceed N, got {value}")
        return value

    @property
    def folder(self) -> Path:
        return Path(self.output_dir or f"labels/{self.name or f'{Path(self.task).stem}-{self.split}'}")

    @property
    def part(self) -> tuple[int, int]:
        """(which, of how many), from 0."""
        which, parts = (self.shard or "1/1").split("/")
        return int(which) - 1, int(parts)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_label_recipe(source: str | Path | None, overrides: Overrides = ()) -> LabelRecipe:
    """Read the recipe of a labelling run, as `load_recipe` does. Raises RecipeError with all mistakes."""
    return read_settings(LabelRecipe, source, overrides, shipped("label"))
