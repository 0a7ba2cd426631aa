"""The stages of a recipe, one small model each."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from memreason.core.errors import RecipeError

__all__ = [
    "DataRecipe",
    "EvalRecipe",
    "MethodRecipe",
    "ModelRecipe",
    "Stage",
    "TokensRecipe",
    "TrainRecipe",
    "training_argument_types",
]


@cache
def training_argument_types() -> dict[str, Any]:
    """TrainingArguments' fields and types, read from its source: importing it would import torch."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError("transformers is not installed", "environment")
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / "training_args.py").read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    plain: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str}
    types = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            parts = ast.unparse(node.annotation).split(" | ")
            simple = all(part in (*plain, "None") for part in parts)
            kind: Any = plain.get(parts[0], Any) if simple else Any
            types[node.target.id] = kind | None if simple and "None" in parts and len(parts) == 2 else kind
    types["fsdp"] = bool | None  # a text there only so that old flags parse
    return types


class Stage(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class DataRecipe(Stage):
    task: str = Field("atlas", description="task whose questions are trained on and evaluated")
    paths: list[str] = Field([], description="own trace files, PATH or PATH:WEIGHT, instead of the task's")
    n_train: int | None = Field(None, ge=1, description="training traces (None: all; atlas and sums: 2000)")
    validation: float = Field(
        0.1, ge=0, lt=1, description="share of the training traces held out where a task has no validation split"
    )
    step_types: Literal[
        "labelled", "arithmetic", "arithmetic-14", "tf-idf", "k-means", "balanced-k-means",
        "vae", "vae-next-step", "vae-contrastive", "shuffled", "pause",
    ] = Field(
        "labelled",
        description="kinds of lines: as labelled; the operators + - * / of each or 14 operations; clusters of their "
        "words (tf-idf) or of a model's hidden states; shuffled: as labelled, dealt out at random; pause: one for all",
    )  # fmt: skip
    lines: Literal["all", "none", "memory-first"] = Field(
        "all", description="lines of the training traces: all, only the answer, or memory before reason"
    )
    n_types: int = Field(5, ge=2, le=256, description="clusters of steps: kinds type_0, type_1, ...")
    embedding_model: str | None = Field(
        None, description="model whose hidden states are clustered, named as model.base is (None: the recipe's base)"
    )
    type_epochs: int = Field(100, ge=1, description="epochs of the vae that learns step types")
    min_frequency: int | float = Field(
        1, gt=0, description="tf-idf: steps that a word must stand in (below 1: a share)"
    )
    max_frequency: int | float = Field(1.0, gt=0, description="tf-idf: steps that it may stand in (to 1.0: a share)")
    hops: list[int] | None = Field(None, description="atlas, sums: how many lines must be combined")
    obscurity: tuple[float, float] | None = Field(None, description="atlas: range of population rank, 0 to 1")
    seed: int = Field(0, description="which questions are drawn")
    k_shot: int = Field(0, ge=0, le=64, description="training traces shown before every question")
    demo_selection: Literal["uniform", "similar", "prompt"] = Field(
        "uniform",
        description="which: drawn by the recipe's seed, the nearest to each question, or those behind which the base "
        "has the least loss on a sample of traces",
    )
    candidate_size: int = Field(100, ge=2, description="similar, prompt: how many drawn traces they are chosen from")
    demo_model: str | None = Field(
        None, description="similar: model whose embedding (mean hidden state) says what is near (None: words, BM25)"
    )

    @model_validator(mode="after")
    def check_demonstrations(self) -> DataRecipe:
        if self.demo_model and self.demo_selection != "similar":
            raise ValueError("data.demo_model: it is for data.demo_selection similar")
        if self.k_shot >= self.candidate_size and self.demo_selection != "uniform":
            raise ValueError(
                f"data.candidate_size: {self.k_shot} demonstrations need at least {self.k_shot + 1} candidates, "
                f"got {self.candidate_size}"
            )
        return self


class ModelRecipe(Stage):
    base: str = Field("smollm2-135m", description="built-in name, hub id, folder or GGUF file")
    revision: str | None = Field(None, description="hub revision; a checkpoint's names the commit it was trained on")
    fingerprint: str | None = Field(None, description="of a local base's files, checked when it is loaded")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="of the base weights")
    quantize: Literal["8bit", "4bit"] | None = Field(None, description="through bitsandbytes")
    unsafe_weights: bool = Field(False, description="load pickled weights where there are none in safetensors")
    trust_remote_code: bool = Field(False, description="run code that comes with a hub model")
    untie: bool = Field(False, description="give a head that is tied to the embedding a matrix of its own")
    random_initialize: bool = Field(False, description="train from scratch")
    offload: bool | dict[str, str] = Field(
        False,
        description="layers that do not fit the GPUs wait in memory, then on disk; a mapping says how much of each "
        "device may be used, as {'0': 20GiB, cpu: 60GiB}",
    )


class TokensRecipe(Stage):
    n_prefix: int = Field(1, ge=0, le=64, description="planning tokens that open every line")
    n_special: int = Field(2, ge=0, le=64, description="planning tokens per kind")
    kinds: list[str] = Field(["reason", "memory"], description="kinds of lines")
    placement: Literal["each_step", "only_at_front", "plan_first", "plan_only"] = Field(
        "each_step", description="where blocks stand: plan_first has all before the lines, plan_only no lines"
    )
    template: Literal["plain", "alpaca", "chat"] = Field(
        "plain", description="text around the question; chat: the base's own chat template"
    )
    instruction: str = Field("", description="what the model is told behind the question, e.g. to think step by step")
    add: bool = Field(True, description="False: no planning tokens at all")
    words: str = Field("", description="plain text that names a line's kinds instead of tokens, e.g. '{kind}:'")
    sparse_attention: bool = Field(
        False, description="a line sees the question and earlier lines through its planning tokens alone"
    )

    @model_validator(mode="after")
    def check_blocks(self) -> TokensRecipe:
        if self.words and "{kind}" not in self.words:
            raise ValueError(f"tokens.words: {{kind}} must stand in it, as in '{{kind}}:', got {self.words!r}")
        both = self.add and self.n_prefix and self.n_special and self.kinds
        if self.placement.startswith("plan") and not both:
            raise ValueError(f"tokens.placement: {self.placement} needs tokens of both sorts, n_prefix and n_special")
        each = self.add and not self.words and (self.n_prefix or (self.n_special and self.kinds))
        if self.sparse_attention and (self.placement == "only_at_front" or not each):
            raise ValueError(
                "tokens.sparse_attention: lines see one another through planning tokens of their own. Set "
                "tokens.add, n_prefix or n_special, no tokens.words, and a tokens.placement other than only_at_front"
            )
        return self


class MethodRecipe(Stage):
    name: Literal["full", "lora", "prompt-tuning", "lora+prompt-tuning", "prefix-tuning", "prompting"] = Field(
        "lora+prompt-tuning", description="what is trained (prompt-tuning: the new rows; prompting: nothing)"
    )
    lora_module: Literal["mlp", "atten", "all"] | list[str] = Field("all", description="which projections carry LoRA")
    lora_r: int = Field(16, ge=1, description="rank")
    lora_alpha: int = Field(16, ge=1, description="scale")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the LoRA input")


class TrainRecipe(Stage):
    """Fields of ours, and any field of Transformers' TrainingArguments beside them."""

    model_config = ConfigDict(extra="allow")

    model_max_length: int = Field(1024, ge=8, description="longer examples are dropped and counted")
    cut: bool = Field(False, description="cut longer examples instead")
    pass_tokens: int = Field(1024, ge=1, description="tokens of one pass forth and back; a batch takes several")
    compile: bool | None = Field(None, description="compile decoder layers (None: if the run is long enough to pay)")
    mode: Literal["supervised", "constant_len"] = Field("supervised", description="padded examples, or a packed stream")
    select_on: Literal["validation", "test"] = Field("validation", description="split that chooses the epoch")
    n_select: int = Field(100, ge=1, description="questions answered each epoch to choose it")

    @model_validator(mode="after")
    def check_training_arguments(self) -> TrainRecipe:
        known = training_argument_types()
        problems = []
        for name, value in (self.model_extra or {}).items():
            if name not in known:
                problems.append(f"train.{name}: no such field here nor in transformers.TrainingArguments")
                continue
            try:
                assert self.model_extra is not None
                self.model_extra[name] = TypeAdapter(known[name]).validate_python(value)
            except ValidationError as error:
                problems.append(f"train.{name}: {error.errors()[0]['msg'].lower()}, got {value!r}")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class EvalRecipe(Stage):
    task: str | None = Field(None, description="another task than the trained one (cross-task)")
    split: str = Field("test", description="split whose questions are answered")
    n: int | None = Field(
        None, ge=1, description="how many, drawn without replacement (None: all; atlas and sums: 300)"
    )
    batch_size: int = Field(32, ge=1, description="questions in flight")
    max_new_tokens: int = Field(256, ge=1, description="limit of a generated trace")
    max_length: int | None = Field(None, ge=2, description="limit of prompt and trace together")
    decoding: Literal["greedy", "sample", "model-default"] = Field("greedy", description="how tokens are chosen")
    temperature: float = Field(1.0, gt=0, description="for sampling")
    top_p: float = Field(1.0, gt=0, le=1, description="for sampling")
    n_samples: int = Field(1, ge=1, description="traces per question")
    seed: int = Field(0, description="of sampling, and of the draw of questions")
    calculator: bool = Field(False, description="complete GSM8K's <<48/2= while generating")
    engine: Literal["local", "vllm", "openai", "chat"] = Field(
        "local",
        description="what generates: here; for an exported model vLLM or any OpenAI-compatible server; chat: any chat "
        "model of such a server, asked in words",
    )
    base_url: str | None = Field(None, description="of the server, e.g. http://127.0.0.1:8000/v1")
    served_model: str | None = Field(None, description="the model's name there (None: the only one that it serves)")
    ray: int | None = Field(
        None, ge=1, description="workers on Ray that share the questions (None: this process alone)"
    )
    memory: Literal["recall", "retrieve", "retrieve-when-unsure"] = Field(
        "recall",
        description="where memory lines come from: the model alone, or a corpus in place of all or of unsure ones",
    )
    corpus: str | None = Field(
        None,
        description="to retrieve from: .jsonl (id, text), folder of .txt, .md, .jsonl, http(s)://…/retrieve, atlas",
    )
    retrieved: Literal["replaces", "precedes"] = Field(
        "replaces", description="a passage stands in place of the model's own memory line, or before it"
    )
    unsure_below: float | None = Field(
        None, allow_inf_nan=False, description="mean log-probability of an unsure line (None: the calibrated one)"
    )

    @model_validator(mode="after")
    def check_corpus(self) -> EvalRecipe:
        if self.memory != "recall" and not self.corpus:
            raise ValueError(f"eval.corpus: eval.memory {self.memory} needs one, e.g. atlas or FILE.jsonl")
        return self

    @model_validator(mode="after")
    def check_engine(self) -> EvalRecipe:
        if self.memory != "recall" and self.engine != "local":
            raise ValueError(f"eval.engine: {self.engine} does not stop at memory lines; eval.memory needs local")
        if self.calculator and self.engine != "local":
            raise ValueError(f"eval.engine: {self.engine} cannot be given results; eval.calculator needs local")
        served = self.engine in ("openai", "chat")
        if served and not self.base_url:
            raise ValueError(f"eval.base_url: eval.engine {self.engine} needs one, e.g. http://127.0.0.1:8000/v1")
        if not served and (self.base_url or self.served_model):
            raise ValueError("eval.base_url, eval.served_model: they are for eval.engine openai and chat")
        return self
