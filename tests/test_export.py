"""The way out: what is exported is what was trained, every check can fail, and nothing half-written is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conftest import BASES, FAMILIES, byte_level, own_traces, save_base, tiny_recipe
from memreason import exports, pipeline
from memreason.cli import main
from memreason.core.errors import CheckpointError, ExportError, StorageError
from memreason.core.files import new_folder, read_json
from memreason.core.trace import Question
from memreason.encode.codec import Codec
from memreason.encode.scheme import TokenScheme
from memreason.encode.vocab import add_tokens
from memreason.finetune.checkpoint import load_checkpoint
from memreason.publish import export as room
from memreason.publish import gate
from memreason.publish.adapter import export_adapter
from memreason.publish.chat import chat_ids, chat_template, prompt_ids
from memreason.publish.export import export_model
from stub import Replies, listening

pytestmark = pytest.mark.usefixtures("hatched")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "initializer_range": 0.3}


def gemma(rows: int) -> Any:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=rows, head_dim=16, **SMALL)).eval()


def qwen3(rows: int) -> Any:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=rows + 64, head_dim=16, **SMALL)).eval()  # padded


def mistral(rows: int) -> Any:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(vocab_size=rows, sliding_window=None, **SMALL)).eval()


def gpt2(rows: int) -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512, "initializer_range": 0.3}
    dropped = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=rows, **sizes, **dropped)).eval()


def phi(rows: int) -> Any:
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(vocab_size=rows, resid_pdrop=0.0, embd_pdrop=0.0, **SMALL)).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    return model


# family -> how a model of it is made, and where its LoRA goes
MODELS: dict[str, tuple[Any, Any]] = {
    **{name: (make, "all") for name, make in BASES.items()},  # Llama, tied and not; Qwen2, padded
    "qwen3": (qwen3, "all"),
    "gemma": (gemma, "all"),
    "mistral": (mistral, "all"),
    "gpt2": (gpt2, ["c_attn", "c_fc"]),
    "phi": (phi, ["q_proj", "v_proj", "fc1"]),  # its head has a bias
}
QUESTIONS = [trace.question for trace in own_traces(5)]


def trained(folder: Path, family: str = "tied", **changes: Any) -> Path:
    make, modules = MODELS[family]
    base = save_base(folder / "base", make)
    changes = {"method.lora_module": modules, "eval.max_new_tokens": 24, **changes}
    return pipeline.train(tiny_recipe(folder, base, **changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("family", MODELS)
def test_every_family_passes_the_gate(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate itself compares logits, rows, weights, blocks, prompts and traces, the last ones in a fresh process."""
    if family == "tied":
        monkeypatch.setattr(gate, "subprocess", subprocess)  # once, a process of its own
    run = trained(tmp_path, family)
    found = export_model(run, tmp_path / "out", QUESTIONS, dtype="fp32")
    assert list(found) == ["logits of the adapter", "rows", "new rows", "weights", "blocks", "traces"]
    assert found["traces"].startswith("5 alike")
    again = load_checkpoint(tmp_path / "out")
    assert again.recipe.method.name == "full"
    assert again.codec.scheme == load_checkpoint(run).codec.scheme


@pytest.mark.parametrize("family", ["tied", "untied", "padded", "qwen3", "gemma", "mistral", "gpt2"])
def test_an_adapter_loads_in_plain_peft(tmp_path: Path, family: str) -> None:
    found = export_adapter(trained(tmp_path, family), tmp_path / "out", QUESTIONS)
    assert found["traces"].startswith("5 alike")
    weights = tmp_path / "out" / "adapter_model.safetensors"
    base = tmp_path / "base" / "model.safetensors"
    assert weights.stat().st_size < base.stat().st_size
    card = (tmp_path / "out" / "README.md").read_text()
    assert "PeftModel.from_pretrained(base" in card


def test_peft_drops_a_biased_head(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="PEFT drops the bias"):
        export_adapter(trained(tmp_path, "phi"), tmp_path / "out", QUESTIONS)


@pytest.mark.parametrize("method", ["lora", "prompt-tuning", "full"])
def test_methods(tmp_path: Path, method: str) -> None:
    """Rows that were never trained (lora) are not in a base model: an adapter brings them along."""
    run = trained(tmp_path, "untied", **{"method.name": method})
    assert export_model(run, tmp_path / "hf", QUESTIONS, dtype="bf16")["traces"].startswith("5 alike")
    if method == "full":
        with pytest.raises(ExportError, match="holds the whole model"):
            export_adapter(run, tmp_path / "adapter", QUESTIONS)
    else:
        assert export_adapter(run, tmp_path / "adapter", QUESTIONS)["traces"].startswith("5 alike")


def test_virtual_tokens_cannot_be_merged(tmp_path: Path) -> None:
    run = trained(tmp_path, **{"method.name": "prefix-tuning"})
    with pytest.raises(CheckpointError, match="virtual tokens"):
        export_model(run, tmp_path / "out", QUESTIONS)
    assert not (tmp_path / "out").exists()


SCHEMES = {
    "plain": TokenScheme(n_prefix=2, n_special=3),
    "alpaca": TokenScheme(question_template="Below is a question.\n\n{question}{choices}\n\n### Response:\n"),
    "spaced": TokenScheme(block_separator=" "),
    "no prefix": TokenScheme(n_prefix=0),
    "front": TokenScheme(placement="only_at_front"),
    "no blocks": TokenScheme(n_prefix=0, n_special=0),
    "braces": TokenScheme(question_template="{{% x %}} BEFORE {question}{choices} BEHIND\n"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bos", [False, True])
def test_a_message_becomes_the_trained_prompt(family: str, scheme: str, bos: bool) -> None:
    tokenizer = FAMILIES[family]()
    if bos:
        named = tokenizer.bos_token or tokenizer.eos_token
        tokenizer.bos_token = named
        single = TemplateProcessing(f"{named} $A", special_tokens=[(named, tokenizer.convert_tokens_to_ids(named))])
        tokenizer.backend_tokenizer.post_processor = single
    codec = add_tokens(SCHEMES[scheme], tokenizer)
    assert len(codec.opening_special_ids) == (bos or family == "sentencepiece-bpe")
    template = chat_template(codec)
    questions = [
        Question("Is Lima the capital of Peru?", "True"),
        Question("Which is a city?", "B", choices=("Peru", "Lima")),
        Question("{{ 7 * 7 }} {% raw %}", "x"),
        Question("two\nlines, “curly” quotes", "x"),
    ]
    for question in questions:
        assert chat_ids(codec.tokenizer, codec.scheme.message(question), template) == prompt_ids(codec, question)


def test_a_conversation_asks_its_last_question() -> None:
    codec = add_tokens(TokenScheme(), byte_level())
    template = chat_template(codec)

    def text(messages: list[dict[str, Any]], generate: bool = True) -> str:
        tokenizer: Any = codec.tokenizer
        made = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=generate
        )
        return str(made)

    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "One?"}]
    talk += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": [{"type": "text", "text": "Two?"}]}]
    assert text(talk) == "Question: Two?\n<prefix_0>"
    assert text(talk, generate=False) == "Question: Two?\n"
    begun = [*talk[:2], {"role": "assistant", "content": "<memory_0><memory_1> Lima"}]
    assert text(begun, generate=False) == "Question: One?\n<prefix_0><memory_0><memory_1> Lima"
    with pytest.raises(Exception, match="a user message is needed"):
        text([{"role": "system", "content": "x"}])


def test_blocks_outlive_decoding_without_special_tokens(run: Path, tmp_path: Path) -> None:
    export_model(run, tmp_path / "out", QUESTIONS, dtype="fp32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    codec = load_checkpoint(run).codec
    ids = codec.render(own_traces(1)[0])
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("<prefix_0><memory_0><memory_1> Lima lies")
    config = read_json(tmp_path / "out" / "generation_config.json")
    assert (config["eos_token_id"], config["do_sample"], config["max_new_tokens"]) == (codec.eos_id, False, 24)


def _one_row_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    merge = room.merge

    def spoilt(loaded: Any) -> Any:
        model = merge(loaded)
        with torch.no_grad():
            model.get_input_embeddings().weight[loaded.codec.blocks["memory"][1]] += 0.1
        return model

    monkeypatch.setattr(room, "merge", spoilt)


def _after_writing(change: Any) -> Any:
    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        write = room.write_model

        def spoilt(folder: Path, *rest: Any) -> None:
            write(folder, *rest)
            change(folder)

        monkeypatch.setattr(room, "write_model", spoilt)

    return spoil


def _edit(name: str, old: str, new: str) -> Any:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return _after_writing(change)


def _other_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})


BROKEN = {
    "a row of a block": (_one_row_changed, "off the adapter's"),
    "stored weights": (_after_writing(_other_weights), "stored weights are not the merged ones"),
    "a token": (_edit("tokenizer.json", '"<memory_1>"', '"<memory_9>"'), "block memory|Codec|cannot"),
    "the template": (_edit("chat_template.jinja", "Question: ", "Question:"), "does not give the trained prompt"),
    "the weights' file": (_after_writing(lambda folder: (folder / "config.json").unlink()), "."),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_every_check_can_fail_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    spoil, said = BROKEN[broken]
    spoil(monkeypatch)
    with pytest.raises(Exception, match=said):
        export_model(run, tmp_path / "out", QUESTIONS, dtype="fp32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layer", ["get_input_embeddings", "get_output_embeddings"])
def test_a_new_row_that_no_trace_uses_is_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: str
) -> None:
    """Logits over a few traces cannot tell: of an untied input they see those rows alone that the traces hold."""
    run, merge = trained(tmp_path, "untied"), room.merge

    def spoilt(loaded: Any) -> Any:
        model = merge(loaded)
        with torch.no_grad():
            getattr(model, layer)().weight[loaded.codec.blocks["assignment"][0]] += 1e-6
        return model

    monkeypatch.setattr(room, "merge", spoilt)
    with pytest.raises(ExportError, match=r"the new rows of the (input|head) are not the adapter's"):
        export_model(run, tmp_path / "out", QUESTIONS, dtype="fp32")


def test_traces_of_another_model_are_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = gate.ask_adapter

    def other(*given: Any) -> gate.Before:
        before = ask(*given)
        return replace(before, traces=[[*ids[:-1], ids[-1] ^ 1] for ids in before.traces])

    monkeypatch.setattr(gate, "ask_adapter", other)
    with pytest.raises(ExportError, match="5 of 5 traces are not those"):
        export_model(run, tmp_path / "out", QUESTIONS, dtype="fp32")


def test_rows_that_do_not_fit_the_tokenizer_are_refused(byte_codec: Codec) -> None:
    model = BASES["tied"](len(byte_codec.tokenizer) - 1)
    with pytest.raises(ExportError, match="the tokenizer has"):
        gate.check_rows(model, byte_codec)


def test_nothing_is_written_over_and_a_kill_leaves_no_name(run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(StorageError, match="holds files already"):
        export_model(run, tmp_path / "full", QUESTIONS)
    left = tmp_path / ".out.partial"  # of an export that was killed
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    export_model(run, tmp_path / "out", QUESTIONS, dtype="fp32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "out"]
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "next"):
        raise KeyboardInterrupt
    assert not (tmp_path / "next").exists()


def test_the_verb_and_the_card(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.evaluate(run, settings=load_checkpoint(run).recipe.eval.model_copy(update={"n": 4}))
    main(["export", str(run), "--out", str(tmp_path / "out"), "--dtype", "fp32"])
    told = capsys.readouterr().out
    assert "✓ traces: 20 alike" in told
    assert f"vllm serve {tmp_path / 'out'}" in " ".join(told.split())
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for part in ("atlas, test split, 4 questions: accuracy", "lora+prompt-tuning", "2411.13504", "lora_r: 16"):
        assert part in card
    named = tmp_path / "named"
    export_model(run, named, QUESTIONS, dtype="fp32", name="me/model")
    assert 'pipeline("text-generation", "me/model")' in (named / "README.md").read_text()  # as the hub will have it
    assert str(tmp_path) not in card.split("## Recipe")[0].replace(str(tmp_path / "base"), "")


class Hub(Replies):
    """What of the hub's API an upload needs; every request is kept."""

    requests: ClassVar[list[tuple[str, str, bytes]]] = []
    refuse, address = 0, ""

    def _take(self) -> bytes:
        body = self.body()
        self.requests.append((self.command, self.path, body))
        return body

    def do_GET(self) -> None:
        self._take()
        self.reply(200, {"id": "me/model", "siblings": [], "sha": "0" * 40, "private": True})

    def do_POST(self) -> None:
        body = self._take()
        if self.refuse:
            self.reply(self.refuse, {"error": "no"})
        elif self.path == "/api/repos/create":
            self.reply(200, {"url": f"{self.address}/me/model", "id": "me/model"})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            self.reply(200, {"files": [{"path": path, **plain} for path in files]})
        elif self.path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        else:
            address = f"{self.address}/me/model/commit/1"
            self.reply(200, {"commitUrl": address, "commitOid": "0" * 40, "success": True})


@contextmanager
def hub(refuse: int = 0) -> Iterator[tuple[type[Hub], dict[str, str]]]:
    """A stub, and the environment of a process that takes it for the hub: the address is read when it is imported."""
    kind = type("Stub", (Hub,), {"requests": [], "refuse": refuse})
    with listening(kind) as port:
        kind.address = f"http://127.0.0.1:{port}"
        yield kind, {"HF_ENDPOINT": kind.address, "HF_TOKEN": "hf_" + "a" * 30}


def pushed(folder: Path, name: str, environment: dict[str, str], *, public: bool = False) -> str:
    """What `push` returned or raised, in a process of its own."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom memreason.core.errors import ExportError\n"
        "from memreason.publish.push import push\n"
        f"try:\n    print(push(Path({str(folder)!r}), {name!r}, public={public}))\n"
        "except ExportError as error:\n    print('refused:', error)"
    )
    named = {**os.environ, "HF_HUB_OFFLINE": "0", **environment}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=named)
    return done.stdout


@pytest.mark.parametrize("public", [False, True])
def test_push(tmp_path: Path, public: bool) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\ntags: [x]\n---\n")
    with hub() as (stub, environment):
        assert pushed(tmp_path, "me/model", environment, public=public).strip() == f"{stub.address}/me/model"
    (created,) = [json.loads(body) for _, path, body in stub.requests if path == "/api/repos/create"]
    assert (created.get("visibility") == "private" or created.get("private") is True) is not public
    committed = b"".join(body for _, path, body in stub.requests if "/commit/" in path).decode()
    assert "config.json" in committed


def test_a_hub_that_refuses_or_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with hub(refuse=403) as (_, environment):
        assert "refused: --push me/model: the hub refused (403" in pushed(tmp_path, "me/model", environment)
        assert "OWNER/NAME is needed" in pushed(tmp_path, "a b/c d/e", environment)
        nameless = {**environment, "HF_TOKEN": "", "HF_HOME": str(tmp_path)}
        assert "refused: --push me/model: no token" in pushed(tmp_path, "me/model", nameless)
    nowhere = {**environment, "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "the hub is not reached" in pushed(tmp_path, "me/model", nowhere)


def test_what_cannot_be_pushed_is_told_before_anything_is_made(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(room, "load_checkpoint", lambda *given, **named: pytest.fail("began"))
    monkeypatch.setattr("memreason.publish.push.get_token", lambda: None)
    for name, said in (("model", "OWNER/NAME is needed"), ("a b/c", "OWNER/NAME is needed"), ("me/model", "no token")):
        assert main(["export", str(run), "--out", str(tmp_path / "out"), "--push", name]) == 2
        assert said in capsys.readouterr().err
    assert main(["export", str(run), "--to", "gguf", "--converter", "nothing.py", "--out", str(tmp_path / "out")]) == 2
    assert "--converter nothing.py: no such file" in capsys.readouterr().err


def test_nothing_is_pushed_before_the_gate(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _one_row_changed(monkeypatch)
    monkeypatch.setattr(exports, "push", lambda *given, **named: pytest.fail("pushed"))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--push", "me/model"]) == 2
    assert not (tmp_path / "out").exists()
