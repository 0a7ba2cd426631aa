"""A published checkpoint becomes ours: the same ids, the same logits, the same choices; and nothing in it is run."""

from __future__ import annotations

import builtins
import json
import os
import pickle
from collections import OrderedDict, deque
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from conftest import FAMILIES, TEXTS, byte_level, tiny_model, tiny_qwen
from memreason.cli import main
from memreason.core.errors import CheckpointError, MemreasonError
from memreason.core.files import read_json
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question, Step, Trace
from memreason.finetune.checkpoint import load_checkpoint
from memreason.finetune.imported import import_checkpoint
from memreason.finetune.unpickle import read_layer, read_tensors
from memreason.generate.decode import decode
from memreason.generate.rows import start
from memreason.publish.export import write_model
from memreason.publish.merge import merge
from published_checkpoint import KINDS, PEFT_04, PEFT_12, implied_logits, make, prompt_text

TRACE = Trace(
    Question("Is Lima in Asia?", "True"),
    (Step(("memory",), "Lima lies in South America."), Step(("reason",), "South America is not Asia."), Step((), "so")),
)


def saved(folder: Path, model: Any, tokenizer: Any = None) -> str:
    model.save_pretrained(folder)
    (tokenizer or byte_level()).save_pretrained(folder)
    return str(folder)


def fresh(base: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def logits_of(path: Path, ids: list[int]) -> torch.Tensor:
    model: Any = load_checkpoint(path, dtype="fp32").model
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return found


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("config", "safe"), [(PEFT_04, False), (PEFT_12, True), (None, False)], ids=["peft-0.4", "peft-0.12", "rows-alone"]
)
def test_logits_are_those_of_the_published_layout(tmp_path: Path, tied: bool, config: Any, safe: bool) -> None:
    model = tiny_model(len(byte_level()), tied=tied)
    base = saved(tmp_path / "base", model)
    source = make(tmp_path, model, config=config, safe=safe)
    out = import_checkpoint(source, base, tmp_path / "out")
    ids = torch.randint(len(byte_level()) + 10, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = implied_logits(fresh(base), source, ids)
    assert expected.abs().max() > 1
    assert (logits_of(out, ids) - expected).abs().max() < 1e-5
    weights = load_file(out / "adapter_model.safetensors")
    assert sum(value.numel() for value in weights.values()) < 2 * 10 * 32 + 24 * 96 * 4
    assert not list(out.glob("*.bin")) + list(out.glob("*.pt"))


def test_gpt2_with_its_other_way_round_layers(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = len(byte_level())
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=0)
    ).eval()
    base = saved(tmp_path / "base", model)
    config = {**PEFT_04, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    source = make(tmp_path, model, config=None)
    torch.manual_seed(2)
    stem = "base_model.model.transformer.h.{}.attn.c_attn.lora_{}.weight"
    lora = {stem.format(n, "A"): torch.randn(4, 32) * 0.1 for n in (0, 1)}
    lora |= {stem.format(n, "B"): torch.randn(96, 4) * 0.1 for n in (0, 1)}
    torch.save(lora, source / "adapter_model.bin")
    (source / "adapter_config.json").write_text(json.dumps(config))
    out = import_checkpoint(source, base, tmp_path / "out")
    ids = [3, size, 5, size + 9, 7]
    plain = fresh(base)
    for n, block in enumerate(plain.transformer.h):
        block.attn.c_attn.weight.data += 4 * (lora[stem.format(n, "B")] @ lora[stem.format(n, "A")]).T
    rows, head = (
        torch.load(source / name, weights_only=False) for name in ("input_embeddings.pt", "output_embeddings.pt")
    )
    with torch.no_grad():
        table = torch.cat([plain.transformer.wte.weight, rows.weight])[torch.tensor(ids)][None]
        hidden = plain.transformer(inputs_embeds=table).last_hidden_state[0]
        expected = torch.cat([hidden @ plain.lm_head.weight.T, head(hidden)], dim=-1)
    assert (logits_of(out, ids) - expected).abs().max() < 1e-5


def published_text(texts: dict[str, str]) -> tuple[str, str]:
    """Prompt and trace, spelt out."""
    prefix = texts["prefix"]
    lines = [("memory", "Lima lies in South America."), ("reason", "South America is not Asia."), ("assignment", "so")]
    named = {**texts, "memory": texts.get("memory", texts.get("rag", ""))}
    made = "".join(f"{prefix}{named[kind]} {text}\n" for kind, text in lines)
    return "Question: Is Lima in Asia?\n ", f"{made}{prefix}{texts['answer']} The answer is: True\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_that_the_tokenizer_makes_of_the_published_text(tmp_path: Path, family: str) -> None:
    tokenizer, texts = FAMILIES[family](), prompt_text()
    model = tiny_model(len(tokenizer))
    base = saved(tmp_path / "base", model, tokenizer)
    warned: list[str] = []
    out = import_checkpoint(make(tmp_path, model, texts=texts), base, tmp_path / "out", warn=warned.append)
    codec = load_checkpoint(out).codec
    published = AutoTokenizer.from_pretrained(base)
    published.add_tokens([f"<{kind}_{i}>" for kind in KINDS for i in (0, 1)])
    question, trace = published_text(texts)
    assert codec.question_ids(TRACE.question) + codec.render(TRACE)[:-1] == published(question + trace)["input_ids"]
    prompt = published(question + texts["prefix"])["input_ids"]
    assert codec.question_ids(TRACE.question) + codec.opening() == prompt
    assert not warned
    made = codec.parse(TRACE.question, codec.render(TRACE))
    assert (made.steps, made.prediction, made.faults) == (TRACE.steps, "True", ())


def test_rag_is_memory_and_tokens_without_spaces_stay_so(tmp_path: Path) -> None:
    kinds = ("prefix", "answer", "assignment", "reason", "rag")
    texts = prompt_text(3, 4, kinds, space="")
    model = tiny_model(len(byte_level()))
    base = saved(tmp_path / "base", model)
    source = make(tmp_path, model, texts=texts)
    codec = load_checkpoint(import_checkpoint(source, base, tmp_path / "out")).codec
    assert (codec.scheme.kinds, codec.scheme.n_prefix, codec.scheme.n_special) == (("reason", "memory"), 3, 4)
    first = len(byte_level())
    assert codec.blocks["memory"] == list(range(first + 15, first + 19))  # behind prefix, answer, assignment, reason
    published = byte_level()
    published.add_tokens([f"<{kind}_{i}>" for kind in kinds for i in range(3 if kind == "prefix" else 4)])
    assert (
        codec.question_ids(TRACE.question) + codec.render(TRACE)[:-1]
        == published("".join(published_text(texts)))["input_ids"]
    )


def test_commonsenseqa_asks_with_its_options(tmp_path: Path) -> None:
    model = tiny_model(len(byte_level()))
    base = saved(tmp_path / "base", model)
    out = import_checkpoint(make(tmp_path, model), base, tmp_path / "out", task="commonsenseqa")
    loaded = load_checkpoint(out)
    question = Question("Where is it?", "A", choices=("bank", "mall"))
    assert loaded.codec.scheme.question_text(question) == "Question: Where is it? Options: A.bank B.mall \n  "
    assert loaded.recipe.data.task == "commonsenseqa"


def generated(path: Path, count: int = 24) -> list[int]:
    loaded = load_checkpoint(path, dtype="fp32")
    settings = EvalRecipe(max_new_tokens=count)
    (row,) = [
        row
        for ended in decode(
            loaded.model, loaded.codec, deque([start(loaded.codec, TRACE.question, 0, settings, None)]), settings
        )
        for row in ended
    ]
    return row.ids


def by_hand(base: str, source: Path, prompt: list[int], eos: int, *, bias: bool, count: int = 24) -> list[int]:
    made: list[int] = []
    while len(made) < count and eos not in made:
        made.append(int(implied_logits(fresh(base), source, prompt + made, bias=bias)[-1].argmax()))
    return made


def biased(folder: Path, *, tied: bool) -> tuple[str, Path]:
    """A base and a checkpoint whose bias decides what is generated."""
    model = tiny_model(len(byte_level()), tied=tied)
    base = saved(folder / "base", model)
    source = make(folder, model)
    head = torch.load(source / "output_embeddings.pt", weights_only=False)
    head.bias.data = torch.linspace(-4, 4, len(head.bias))
    torch.save(head, source / "output_embeddings.pt")
    return base, source


def exported(checkpoint: Path, out: Path) -> Path:
    loaded = load_checkpoint(checkpoint, dtype="fp32")
    write_model(out, out, merge(loaded), loaded, "fp32")
    return out


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_bias_acts_in_generation_here_and_in_plain_transformers(tmp_path: Path, tied: bool) -> None:
    base, source = biased(tmp_path, tied=tied)
    warned: list[str] = []
    with_bias = import_checkpoint(source, base, tmp_path / "with")
    without = import_checkpoint(source, base, tmp_path / "without", drop_bias=True, warn=warned.append)
    assert "at most 4, 2.22 in the mean" in warned[0]
    codec = load_checkpoint(with_bias).codec
    prompt = codec.question_ids(TRACE.question) + codec.opening()
    expected = {bias: by_hand(base, source, prompt, codec.eos_id, bias=bias) for bias in (True, False)}
    assert expected[True] != expected[False]
    assert generated(with_bias) == expected[True]
    assert generated(without) == expected[False]
    merged = exported(with_bias, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    shape = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": codec.eos_id, "pad_token_id": codec.eos_id}
    made = plain.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **shape)[
        0, len(prompt) :
    ].tolist()
    assert made == expected[True]
    assert generated(merged) == expected[True]  # in the head again, and not twice
    assert GenerationConfig.from_pretrained(exported(without, tmp_path / "plain")).sequence_bias is None
    ids = [*prompt, *expected[True]]
    assert (logits_of(merged, ids) - implied_logits(fresh(base), source, ids)).abs().max() < 1e-4


def test_padded_vocabularies_say_that_trained_rows_were_never_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memreason.encode.base._product_seconds", lambda dtype: dtype.itemsize)  # as where bf16 is fast
    size = len(AutoTokenizer.from_pretrained(saved(tmp_path / "any", tiny_qwen(500))))
    warned: list[str] = []
    for more, below in ((4, 4), (64, 10)):  # rows of the base model that have no entry; planning tokens that get them
        model = tiny_qwen(size + more, tied=more == 64)
        base = saved(tmp_path / f"base-{more}", model)
        source = make(tmp_path / f"{more}", model)
        out = import_checkpoint(source, base, tmp_path / f"out-{more}", warn=warned.append)
        assert f"{below} of 10 planning tokens have ids below {size + more}" in warned[-1]
        ids = [1, *range(size, size + 10), 2]
        made = logits_of(out, ids)
        assert (made - implied_logits(fresh(base), source, ids)[:, : made.shape[1]]).abs().max() < 1e-5
        assert made.shape[1] == size + max(more, 10)
        assert sum(value != 0 for value in load_checkpoint(out).codec.scheme.row_bias) == 10 - below


def test_one_file_of_rows_serves_a_tied_base(tmp_path: Path) -> None:
    size = len(byte_level())
    model = tiny_model(size)
    base = saved(tmp_path / "base", model)
    for name, whole in (("new", False), ("all", True)):
        source = make(tmp_path / name, model)
        rows = torch.randn(10, 32)
        layer = nn.Embedding.from_pretrained(torch.cat([model.get_input_embeddings().weight, rows]) if whole else rows)
        torch.save(layer, source / "embeddings.pt")
        out = import_checkpoint(source, base, tmp_path / f"out-{name}")
        torch.save(nn.Embedding.from_pretrained(rows), source / "input_embeddings.pt")
        head = nn.Linear(32, 10)
        head.weight.data, head.bias.data = rows, torch.zeros(10)
        torch.save(head, source / "output_embeddings.pt")
        ids = [1, size, size + 9, 4]
        assert (logits_of(out, ids) - implied_logits(fresh(base), source, ids)).abs().max() < 1e-5
        assert not load_checkpoint(out).recipe.model.untie
    untied = tiny_model(size, tied=False)
    with pytest.raises(CheckpointError, match=r"embeddings\.pt: rows of the embedding alone"):
        source = make(tmp_path / "u", untied)
        torch.save(nn.Embedding(10, 32), source / "embeddings.pt")
        import_checkpoint(source, saved(tmp_path / "untied", untied), tmp_path / "out-u")


RAN: list[str] = []


def mark(*_: Any) -> str:
    RAN.append("ran")
    return "ran"


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def hidden_in_a_layer() -> nn.Module:
    layer = nn.Embedding(10, 32)
    layer.extra = Calls(mark)
    return layer


def hidden_in_a_hook() -> nn.Module:
    layer = nn.Linear(32, 10)
    layer._forward_hooks = OrderedDict({0: Calls(os.system, "touch ran")})
    return layer


MALICIOUS = {
    "os.system": (lambda: Calls(os.system, "touch ran"), r"asks for (posix|nt)\.system"),
    "eval": (lambda: Calls(builtins.eval, "__import__('os').system('touch ran')"), r"asks for eval"),
    "exec": (lambda: {"weight": Calls(builtins.exec, "open('ran', 'w')")}, r"asks for exec"),
    "getattr": (lambda: Calls(getattr, "", "upper"), r"asks for getattr"),
    "own module": (lambda: Calls(mark), r"asks for test_import_checkpoint\.mark"),
    "numpy": (lambda: Calls(np.load, "ran.npy"), r"asks for numpy"),
    "numpy array": (lambda: np.array([Calls(mark)], dtype=object), r"asks for numpy"),
    "in a layer": (hidden_in_a_layer, r"asks for test_import_checkpoint\.mark"),
    "in a hook": (hidden_in_a_hook, r"asks for (posix|nt)\.system"),
    "torch.load": (lambda: Calls(torch.load, "ran.pt"), r"asks for torch\.serialization\.load"),
    "torch.hub": (lambda: Calls(torch.hub.load, "x/y", "z"), r"asks for torch\.hub\.load"),
    "other layer": (lambda: nn.Sequential(nn.Linear(2, 2)), r"asks for torch\.nn\.modules\.container\.Sequential"),
}


@pytest.mark.parametrize("kind", MALICIOUS)
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_pickle_that_would_run_code_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    RAN.clear()
    payload, says = MALICIOUS[kind]
    file = tmp_path / "rows.pt"
    if form != "zip":  # layers are spelt otherwise there, and refused for that
        says = f"{says}|its pickle asks for torch.storage._load_from_bytes|cannot be read as a PyTorch file"
    if form == "pickle":
        file.write_bytes(pickle.dumps(payload(), protocol=2))
    else:
        torch.save(payload(), file, _use_new_zipfile_serialization=form == "zip")
    for read in (partial(read_layer, kind="Embedding"), partial(read_layer, kind="Linear"), read_tensors):
        with pytest.raises(CheckpointError, match=rf"rows\.pt: .*({says})"):
            read(file)
    assert not RAN and not (tmp_path / "ran").exists()
    if kind == "own module" and form != "pickle":  # it would have run
        torch.load(file, weights_only=False)
        assert RAN


@pytest.mark.parametrize("file", ["input_embeddings.pt", "output_embeddings.pt", "adapter_model.bin"])
def test_no_file_of_a_checkpoint_runs_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    monkeypatch.chdir(tmp_path)
    base, source = simple(tmp_path)
    torch.save(Calls(os.system, "touch ran"), source / file)
    with pytest.raises(
        CheckpointError, match=rf"{file}: its pickle asks for (posix|nt)\.system, .* Nothing of it was run"
    ):
        import_checkpoint(source, base, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def simple(folder: Path) -> tuple[str, Path]:
    model = tiny_model(len(byte_level()), tied=False)
    return saved(folder / "base", model), make(folder, model)


def put(name: str, value: Any) -> Any:
    return lambda source: torch.save(value() if callable(value) else value, source / name)


def config(**changes: Any) -> Any:
    return lambda source: (source / "adapter_config.json").write_text(json.dumps({**PEFT_04, **changes}))


def texts(value: Any) -> Any:
    return lambda source: (source.parent / "prompt_text.json").write_text(
        value if isinstance(value, str) else json.dumps(value)
    )


def gone(name: str) -> Any:
    return lambda source: (source / name).unlink()


def torn(name: str) -> Any:
    return lambda source: (source / name).write_bytes((source / name).read_bytes()[:-200])


def nan_rows() -> nn.Module:
    layer = nn.Embedding(10, 32)
    layer.weight.data[3, 4] = torch.nan
    return layer


def other_lora(source: Path) -> None:
    lora = torch.load(source / "adapter_model.bin")
    torch.save({name: torch.zeros(value.shape[0], 48) for name, value in lora.items()}, source / "adapter_model.bin")


def fewer_layers(source: Path) -> None:
    lora = torch.load(source / "adapter_model.bin")
    torch.save({name: value for name, value in lora.items() if ".layers.1." not in name}, source / "adapter_model.bin")


WRONG = {
    "no prompt_text": (
        lambda source: (source.parent / "prompt_text.json").unlink(),
        r"prompt_text\.json: no such file",
    ),
    "no JSON": (texts("{"), r"prompt_text\.json:1: not JSON"),
    "a list": (texts([1]), r"prompt_text\.json: an object is needed"),
    "words": (
        texts({"prefix": "Plan:", "answer": " answer"}),
        r"prompt_text\.json: prefix must be a row of <prefix_0>",
    ),
    "other names": (texts({**prompt_text(), "reason": " <r_0> <r_1>"}), r"reason must be a row of <reason_0>"),
    "no answer": (texts(prompt_text(kinds=("prefix", "reason", "memory"))), r"prefix, answer, assignment and kinds"),
    "uneven": (texts({**prompt_text(), "reason": " <reason_0>"}), r"of equal length are needed, got .*reason \(1\)"),
    "both names": (texts(prompt_text(kinds=(*KINDS, "rag"))), r"rag \(2\)"),
    "other counts": (texts(prompt_text(2, 4)), r"input_embeddings\.pt: holds 10 rows, but prompt_text\.json names 18"),
    "no rows": (gone("input_embeddings.pt"), r"input_embeddings\.pt: no such file; it holds the rows"),
    "no head": (gone("output_embeddings.pt"), r"output_embeddings\.pt: no such file"),
    "no weights": (gone("adapter_model.bin"), r"neither adapter_model\.safetensors nor adapter_model\.bin"),
    "torn rows": (torn("input_embeddings.pt"), r"input_embeddings\.pt: cannot be read as a PyTorch file"),
    "torn weights": (torn("adapter_model.bin"), r"adapter_model\.bin: cannot be read as a PyTorch file"),
    "empty": (
        lambda source: (source / "output_embeddings.pt").write_bytes(b""),
        r"output_embeddings\.pt: cannot be read",
    ),
    "a page": (
        lambda source: (source / "input_embeddings.pt").write_text("<html>"),
        r"input_embeddings\.pt: cannot be",
    ),
    "swapped": (
        put("input_embeddings.pt", lambda: nn.Linear(32, 10)),
        r"a pickled torch\.nn\.Embedding is needed, got Linear",
    ),
    "a text": (put("output_embeddings.pt", "hello"), r"a pickled torch\.nn\.Linear is needed, got str"),
    "a dict": (put("output_embeddings.pt", {"weight": torch.zeros(10, 32)}), r"torch\.nn\.Linear is needed, got dict"),
    "other width": (put("input_embeddings.pt", lambda: nn.Embedding(10, 48)), r"shapes do not go with"),
    "a cube": (put("input_embeddings.pt", torch.zeros(10, 32, 2)), r"its weight has the shape \(10, 32, 2\)"),
    "integers": (put("input_embeddings.pt", torch.zeros(10, 32, dtype=torch.long)), r"holds what is no number"),
    "nan": (put("input_embeddings.pt", nan_rows), r"input_embeddings\.pt: its weight holds what is no number"),
    "not a state dict": (put("adapter_model.bin", [torch.zeros(2)]), r"adapter_model\.bin: a pickled dict of tensors"),
    "torn safetensors": (
        lambda source: (source / "adapter_model.safetensors").write_bytes(b"\x10\0\0"),
        r"safetensors: cannot",
    ),
    "another base": (other_lora, r"LoRA of another base model: .* is \(4, 48\), here \(4, 32\) is needed"),
    "fewer layers": (fewer_layers, r"LoRA of another base model or configuration; .*layers\.1"),
    "prompt tuning": (
        config(peft_type="PROMPT_TUNING"),
        r"adapter_config\.json: LoRA .* are needed, got peft_type PROMPT",
    ),
    "no modules": (config(target_modules=None), r"its target_modules are needed"),
    "other modules": (config(target_modules=["c_attn"]), r"adapter_config\.json: does not fit the base model"),
    "a bias": (config(bias="all"), r"bias is 'all', which the published code never trains"),
    "dora": (config(use_dora=True), r"use_dora is True"),
    "other rank": (config(r=8), r"LoRA of another base model: .* is \(4, 32\), here \(8, 32\)"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_missing_torn_or_foreign_gets_one_clear_line(tmp_path: Path, kind: str) -> None:
    base, source = simple(tmp_path)
    spoil, says = WRONG[kind]
    spoil(source)
    with pytest.raises(MemreasonError, match=says) as caught:
        import_checkpoint(source, base, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_base_of_another_width(tmp_path: Path) -> None:
    _, source = simple(tmp_path)
    other = tiny_model(len(byte_level()), tied=False)
    small = type(other)(type(other.config)(**{**other.config.to_dict(), "hidden_size": 16}))
    with pytest.raises(CheckpointError, match=r"rows of 32 channels do not fit the base model, which has 16"):
        import_checkpoint(source, saved(tmp_path / "other", small), tmp_path / "out")


def test_every_verb_takes_what_the_command_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, source = simple(tmp_path)
    questions = tmp_path / "own.jsonl"
    questions.write_text("".join(json.dumps({"question": f"{text}?", "answer": "True"}) + "\n" for text in TEXTS[:3]))
    out = tmp_path / "out"
    assert main(["import-checkpoint", str(source), "--base", base, "--out", str(out)]) == 0
    record = read_json(out / "imported.json")
    assert record["bias"]["kept"] and record["fingerprint"] and "input_embeddings.pt" in record["files"]
    words = ["--task", str(questions), "--eval.max_new_tokens", "12"]
    assert main(["eval", str(out), *words]) == 0
    assert main(["ask", str(out), "Is Lima in Asia?"]) == 0
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").is_file()
    capsys.readouterr()
    assert main(["import-checkpoint", str(source), "--base", base, "--out", str(out)]) == 2
    assert "holds files already" in capsys.readouterr().err
    assert main(["import-checkpoint", str(source / "no"), "--base", base, "--out", str(tmp_path / "x")]) == 2
    assert "no such folder" in capsys.readouterr().err
