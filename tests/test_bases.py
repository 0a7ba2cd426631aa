"""Any base through one resolver: folder, hub id (cached or not), GGUF; pinned, and never pickled unless insisted on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, constants

import memreason.encode.resolve as resolving
from conftest import byte_level, save_base, tiny_model, tiny_recipe
from memreason import pipeline
from memreason.core.errors import ModelError
from memreason.core.files import read_json
from memreason.core.recipe import load_recipe
from memreason.encode.base import identity, load_model, load_tokenizer, locate
from memreason.encode.resolve import fingerprint, hub_commit
from memreason.finetune.checkpoint import load_checkpoint
from stub import Replies, listening

FIRST, SECOND = "a" * 40, "b" * 40
NAME = "maker/tiny"


def cached(hub: Path, commit: str, seed: int = 0) -> Path:
    """A hub model as the hub's client leaves it in its cache; `main` is this commit."""
    folder = hub / "models--maker--tiny"
    snapshot = folder / "snapshots" / commit
    save_base(snapshot, partial(tiny_model, seed=seed))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return snapshot


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The hub's cache in a folder of its own, in offline mode."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_commit.cache_clear()
    yield tmp_path / "hub"
    hub_commit.cache_clear()


def test_a_cached_hub_model_works_offline_and_its_commit_is_pinned(tmp_path: Path, hub: Path) -> None:
    cached(hub, FIRST)
    recipe = tiny_recipe(tmp_path, Path(NAME))
    run = pipeline.train(recipe)
    manifest = read_json(run / "manifest.json")
    assert (manifest["base"], manifest["revision"], manifest["fingerprint"]) == (NAME, FIRST, None)
    assert load_recipe(run / "checkpoint-3" / "recipe.yaml").model.revision == FIRST
    ids = torch.arange(20)[None]
    before = load_checkpoint(run).model(input_ids=ids).logits
    cached(hub, SECOND, seed=7)  # the hub's main moves on
    hub_commit.cache_clear()
    assert identity(NAME)["revision"] == SECOND
    assert torch.equal(load_checkpoint(run).model(input_ids=ids).logits, before)
    moved = load_checkpoint(run, base=NAME)  # named by hand: as it is now
    assert not torch.equal(moved.model(input_ids=ids).logits, before)
    shutil.rmtree(hub / "models--maker--tiny" / "snapshots" / FIRST)
    hub_commit.cache_clear()
    with pytest.raises(ModelError, match=rf"{NAME}: HF_HUB_OFFLINE is set, .* at revision {FIRST}") as caught:
        load_checkpoint(run)
    assert "\n" not in str(caught.value)


def test_a_run_goes_on_with_the_commit_it_began_with(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(hub, FIRST)
    recipe = tiny_recipe(tmp_path, Path(NAME))
    monkeypatch.setattr(pipeline, "run_trainer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pipeline.train(recipe)
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached(hub, SECOND, seed=7)
    hub_commit.cache_clear()
    assert read_json(pipeline.train(recipe) / "manifest.json")["revision"] == FIRST


def test_without_a_network_what_is_cached_works(tmp_path: Path) -> None:
    """In a process of its own, as the environment says; nothing is asked for twice."""
    cached(tmp_path / "home" / "hub", FIRST)
    code = (
        "from memreason.encode.base import load_model, load_tokenizer\n"
        "from memreason.core.errors import ModelError\n"
        f"print(len(load_tokenizer('{NAME}')), load_model('{NAME}').config.hidden_size)\n"
        "try: load_tokenizer('maker/other')\n"
        "except ModelError as error: print(error)\n"
    )
    nowhere = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **nowhere}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "Retrying" not in done.stderr, done.stderr
    sizes, said = done.stdout.splitlines()
    assert sizes == f"{len(byte_level())} 32"
    assert said.startswith(
        "maker/other: the hub cannot be reached, and there is no such folder, nor is it in the hub's"
    )


ANSWERS = {
    "gone": (404, "RepoNotFound"),
    "private": (401, "RepoNotFound"),
    "gated": (403, "GatedRepo"),
    "old": (404, "RevisionNotFound"),
    "broken": (500, ""),
}


class Hub(Replies):
    """Says about models what the hub says."""

    def do_GET(self) -> None:
        status, code = ANSWERS[self.path.split("/")[4].partition("?")[0]]
        self.reply(status, b"", {"X-Error-Code": code} if code else {})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gone", "the hub has no such model, or a private one: then set HF_TOKEN"),
        ("private", "the hub has no such model, or a private one: then set HF_TOKEN"),
        ("gated", "the hub gives it only to those who accepted its terms: do so there, then set HF_TOKEN"),
        ("old", "the hub has no revision v9 of it"),
        ("broken", "the hub refuses ("),
        ("no..name", "that is no name of a hub model"),
    ],
)
def test_what_the_hub_says_is_one_clear_line(hub: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with listening(Hub) as port, pytest.raises(ModelError) as caught:
        monkeypatch.setattr(resolving, "HfApi", partial(HfApi, endpoint=f"http://127.0.0.1:{port}"))
        locate(f"maker/{name}", "v9")
    assert str(caught.value).startswith(f"maker/{name}: {says}") and "\n" not in str(caught.value)


def test_a_local_base_that_changed_is_refused_unless_named(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    run = pipeline.train(tiny_recipe(tmp_path, base))
    known = read_json(run / "manifest.json")["fingerprint"]
    assert known == fingerprint(base)
    config = read_json(base / "config.json")
    (base / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9"}))
    load_checkpoint(run)  # who wrote it does not matter
    tiny_model(len(byte_level()), seed=3).save_pretrained(base)
    with pytest.raises(ModelError, match=rf"is not what it was when this was trained \(model\.fingerprint {known}\)"):
        load_checkpoint(run)
    load_checkpoint(run, base=str(base))  # named by hand: as it is now


def test_a_fingerprint_sees_other_weights_and_other_settings(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    found = {fingerprint(base)}
    shutil.move(base, tmp_path / "moved")
    assert fingerprint(tmp_path / "moved") in found
    for change in ({"rope_theta": 5.0}, {"rms_norm_eps": 0.1}):
        config = read_json(tmp_path / "moved" / "config.json")
        (tmp_path / "moved" / "config.json").write_text(json.dumps({**config, **change}))
        found.add(fingerprint(tmp_path / "moved"))
    weights = tmp_path / "moved" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert len(found | {fingerprint(tmp_path / "moved")}) == 4


def pickled(folder: Path) -> Path:
    save_base(folder)
    model = tiny_model(len(byte_level()))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_pickled_weights_are_refused_unless_the_user_insists(tmp_path: Path, hub: Path) -> None:
    base = pickled(tmp_path / "base")
    says = r"no weights in safetensors are there, and pickled ones can run code .* model\.unsafe_weights: true"
    with pytest.raises(ModelError, match=says) as caught:
        pipeline.train(tiny_recipe(tmp_path, base))
    assert "\n" not in str(caught.value)
    run = pipeline.train(
        tiny_recipe(tmp_path, base, output_dir=str(tmp_path / "own"), **{"model.unsafe_weights": True})
    )
    assert load_checkpoint(run).recipe.model.unsafe_weights
    shutil.move(base, hub / "models--maker--tiny" / "snapshots" / FIRST)
    (hub / "models--maker--tiny" / "refs").mkdir()
    (hub / "models--maker--tiny" / "refs" / "main").write_text(FIRST)
    with pytest.raises(ModelError, match=says):
        load_model(NAME)
    assert load_model(NAME, unsafe_weights=True).config.hidden_size == 32


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    (base / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    config = {**read_json(base / "config.json"), "model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="base: cannot be loaded") as caught:
        load_model(str(base))
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("empty", "holds no config.json, so it is not the folder of a base model"),
        ("file.txt", "a folder or a GGUF file is needed"),
        ("none.gguf", "no such folder or GGUF file"),
        ("torn.gguf", "cannot be read, it is torn or no GGUF"),
    ],
)
def test_what_is_no_model(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "torn.gguf").write_bytes(b"GGUF\3\0")
    with pytest.raises(ModelError, match=says) as caught:
        load_model(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_revision_is_for_hub_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.revision main is for hub models"):
        load_tokenizer(str(save_base(tmp_path / "base")), revision="main")


def test_an_untied_head_starts_as_the_embedding(tmp_path: Path) -> None:
    base = str(save_base(tmp_path / "base"))
    tied, untied = load_model(base, dtype="fp32"), load_model(base, dtype="fp32", untie=True)
    ids = torch.arange(30)[None]
    assert torch.equal(tied(input_ids=ids).logits, untied(input_ids=ids).logits)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    plain = str(save_base(tmp_path / "other", partial(tiny_model, tied=False)))
    heads = [load_model(plain, untie=untie).lm_head.weight for untie in (False, True)]
    assert torch.equal(*heads)


def write_gguf(path: Path, model: Any, tokenizer: Any) -> Path:
    """A Llama as llama.cpp keeps it: query and key rows in its own order of rotation."""
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_merges([" ".join(pair) for pair in saved["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in state.items():
        if name == "lm_head.weight":
            continue
        array = value.float().numpy()
        count = heads.get(name.split(".")[-2], 0)
        if count:
            parts = array.reshape(count, 2, array.shape[0] // count // 2, *array.shape[1:])
            array = parts.swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_a_base(tmp_path: Path) -> None:
    tokenizer = byte_level()
    model = tiny_model(len(tokenizer))
    base = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    ids = torch.arange(30)[None]
    assert (load_model(str(base), dtype="fp32")(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() < 1e-4
    run = pipeline.train(tiny_recipe(tmp_path, base))
    assert read_json(run / "manifest.json")["fingerprint"] == fingerprint(base)
    load_checkpoint(run)
    write_gguf(base, tiny_model(len(tokenizer), seed=4), tokenizer)
    with pytest.raises(ModelError, match="is not what it was when this was trained"):
        load_checkpoint(run)
