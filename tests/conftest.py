"""Tokenizers of the families that causal models use, and 2-layer models, all made in memory."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import hatchery
from memreason import pipeline
from memreason.core.files import read_json, write_traces
from memreason.core.recipe import Recipe, load_recipe
from memreason.core.trace import Question, Step, Trace
from memreason.encode.codec import Codec
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_tokens
from memreason.publish import gate

torch.set_num_threads(1)  # tiny models on parallel workers: more threads only wait for one another

TEXTS = [
    "Question: Is Lima the capital of Peru?",
    "The answer is: True",
    "Lima lies in South America, so Peru lies in South America.",
    "memory reason answer prefix assignment 0 1 2 3 4 5 6 7 8 9",
    "Was ist das? Çà et là — 東京, naïve <memory_0> </s> {question}",
]


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([text.replace(" ", "▁") for text in TEXTS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    alphabet = sorted({*"".join(TEXTS), "\n", "▁"})
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        unk_token="<unk>",
        special_tokens=["<unk>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


NO_BROWSER = "no Chromium here"
BROWSER_FLAGS = ("gpu", "background-networking", "component-update", "sync")  # what Chromium shall leave alone


# Of the module, not the session: while Playwright is open its loop runs in this thread, and no test can use asyncio.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium, driven by Playwright; tests that need it are left out where there is none."""
    path = shutil.which("chromium")
    if not path:
        pytest.skip(NO_BROWSER)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in BROWSER_FLAGS)]
        one = playwright.chromium.launch(executable_path=path, args=flags)
        yield one
        one.close()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None]:
    """Behind all else, as the last line: which tests the want of a browser left out."""
    yield
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = terminal.stats.get("skipped", ()) if terminal else ()
    files = Counter(one.nodeid.split("::")[0] for one in skipped if NO_BROWSER in str(one.longrepr))
    if files:
        told = ", ".join(f"{name} ({count} tests)" for name, count in sorted(files.items()))
        terminal.write_line(f"left out, {NO_BROWSER}: {told}")


FAMILIES = {"byte-level": byte_level, "sentencepiece-bpe": sentencepiece_bpe, "unigram": unigram}


@pytest.fixture(params=FAMILIES)
def codec(request: pytest.FixtureRequest) -> Codec:
    return add_tokens(TokenScheme(n_prefix=2, n_special=3), FAMILIES[request.param]())


@pytest.fixture
def byte_codec() -> Codec:
    return add_tokens(TokenScheme(n_prefix=1, n_special=2), byte_level())


@pytest.fixture
def trace() -> Trace:
    return Trace(
        Question("Is Lima the capital of Peru?", "True"),
        (Step(("memory",), "Lima lies in South America."), Step(("reason",), "so Peru lies in South America.")),
    )


def tiny_model(rows: int, *, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=32,
        initializer_range=0.3,  # at 0.02 a frozen head of this width cannot give any token a high logit
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def tiny_qwen(rows: int, *, tied: bool = False) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=32,
        initializer_range=0.3,  # at 0.02 a frozen head of this width cannot give any token a high logit
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return Qwen2ForCausalLM(config).eval()


BASES: dict[str, Callable[[int], Any]] = {
    "tied": tiny_model,
    "untied": lambda rows: tiny_model(rows, tied=False),
    "padded": lambda rows: tiny_qwen(rows + 64),
}


def greedy(model: Any, ids: list[int], eos: int, count: int) -> list[int]:
    """Plain decoding without a cache."""
    made: list[int] = []
    with torch.no_grad():
        while len(made) < count and eos not in made:
            made.append(int(model(input_ids=torch.tensor([ids + made]), use_cache=False).logits[0, -1].argmax()))
    return made


def save_base(folder: Path, make: Callable[[int], Any] = tiny_model) -> Path:
    """A base model's folder: its weights and a byte-level tokenizer."""
    tokenizer = byte_level()
    make(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def own_traces(count: int) -> list[Trace]:
    """Labelled traces of one and of two lines, so that examples differ in length."""
    steps = (Step(("memory",), "Lima lies in South America."), Step(("reason",), "so Peru lies in South America."))
    return [
        Trace(Question(f"Is Lima the capital of Peru? {n}", str(n % 2 == 0)), steps[: 1 + n % 2]) for n in range(count)
    ]


def tiny_recipe(folder: Path, base: Path, **changes: Any) -> Recipe:
    """A recipe that trains a tiny model on own traces into folder/run: fp32, no dropout, no evaluation."""
    data = folder / "traces.jsonl"
    if not data.is_file():
        write_traces(data, own_traces(24))
    settings = {
        "output_dir": str(folder / "run"),
        "data.paths": [str(data)],
        "data.validation": 0,
        "model.base": str(base),
        "model.dtype": "fp32",
        "method.lora_dropout": 0.0,
        "train.max_steps": 3,
        "train.per_device_train_batch_size": 4,
        "train.learning_rate": 1e-2,
        "train.warmup_steps": 0,
        "train.lr_scheduler_type": "constant",
        "train.logging_steps": 1,
        "train.disable_tqdm": True,
        "eval.max_new_tokens": 8,
    }
    return load_recipe(None, {**settings, **changes})


@pytest.fixture(scope="module")
def hatched() -> Iterator[None]:
    """The gate's fresh processes come from the hatchery."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "subprocess", hatchery)
        yield


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For long tests: the demo's run if it was made here, else a short one of the same model."""
    demo = Path(__file__).parent.parent / "runs" / "demo"
    if (demo / "manifest.json").is_file() and read_json(demo / "manifest.json").get("best"):
        return demo
    short = {"data.n_train": 400, "data.validation": 0, "output_dir": str(tmp_path_factory.mktemp("run") / "short")}
    return pipeline.train(load_recipe("demo", short))
