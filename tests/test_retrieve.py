"""Memory from outside: corpora, search by words, retrieval servers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memreason.core.errors import DataError, RetrieverError
from memreason.core.files import write_jsonl
from memreason.core.trace import Question
from memreason.data.atlas import memory_line_true
from memreason.data.atlas_facts import countries
from memreason.retrieve import bm25
from memreason.retrieve.bm25 import open_bm25
from memreason.retrieve.corpus import corpus_hash, read_corpus
from memreason.retrieve.http import BATCH, HttpRetriever
from memreason.retrieve.outside import open_retriever
from memreason.retrieve.passage import Passage, closest, searching, sentence_for
from stub import Replies, listening

TEXTS = {
    "a": "Lima is the capital of Peru.",
    "b": "Quito is the capital of Ecuador.",
    "ü": "東京 is the capital of Japan; so says Çelik.",
    "d": "Lima beans are beans.",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMREASON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "corpus.jsonl"
    write_jsonl(path, ({"id": name, "text": text} for name, text in TEXTS.items()))
    return str(path)


# --- corpora


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "c" / "deep").mkdir(parents=True)
    (tmp_path / "c" / "b.txt").write_text("One.\nStill one.\n\n \nTwo.\n", encoding="utf-8")
    (tmp_path / "c" / "deep" / "a.md").write_text("Three.", encoding="utf-8")
    (tmp_path / "c" / "no.pdf").write_bytes(b"\xff")
    write_jsonl(tmp_path / "c" / "z.jsonl", [{"contents": '"Title"\nFour.'}, {"id": 7, "text": "Five."}])
    found = list(read_corpus(str(tmp_path / "c")))
    assert [one.id for one in found] == ["b.txt#1", "b.txt#2", "deep/a.md#1", "z.jsonl#1", "z.jsonl#7"]
    assert [one.text for one in found] == ["One.\nStill one.", "Two.", "Three.", '"Title"\nFour.', "Five."]
    assert Path(found[2].source) == tmp_path / "c" / "deep" / "a.md"


def test_what_cannot_be_searched_is_named(tmp_path: Path) -> None:
    for name in ("nowhere", str(tmp_path)):
        with pytest.raises(RetrieverError, match=r"eval\.corpus: .* is no corpus"):
            open_retriever(name)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"id": 3}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl:2: a passage needs a 'text'"):
        open_retriever(str(bad))
    bad.write_text('{"text": "…!"}\n', encoding="utf-8")
    with pytest.raises(RetrieverError, match="no passage with a word in it"):
        open_retriever(str(bad))
    assert not list((tmp_path / "home" / "bm25").glob("*"))  # nothing half made is left behind


def test_atlas_says_every_fact_as_a_memory_line_does() -> None:
    found = list(read_corpus("atlas"))
    assert len({one.id for one in found}) == len(found) > 800
    assert all(memory_line_true(one.text) for one in found)
    for name, country in countries().items():
        assert f"The capital of {name} is {country.capital}." in {one.text for one in found}


# --- search by words


def test_search(corpus: str) -> None:
    found = open_bm25(corpus).search(["capital of Peru", "beans", "東京", "çelik", "", "zebra", "Lima"], 3)
    ids = [[one.id for one in row] for row in found]
    assert ids[0][0] == "a" and len(ids[0]) == 3
    assert ids[1:] == [["d"], ["ü"], ["ü"], [], [], ids[6]]
    assert set(ids[6]) == {"a", "d"}
    assert found[0][0] == Passage("a", TEXTS["a"], found[0][0].score, corpus)
    assert [one.score for one in found[0]] == sorted((one.score for one in found[0]), reverse=True)
    assert found[0][0].score > 0


def test_more_are_asked_for_than_there_are(corpus: str) -> None:
    searched = open_bm25(corpus)
    assert len(searched.search(["the capital"], 100)[0]) == 3
    assert searched.search([], 5) == []


def test_equal_passages_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "same.jsonl"
    write_jsonl(path, ({"id": str(n), "text": "The same words."} for n in range(40)))
    (row,) = open_bm25(str(path)).search(["same words"], 40)
    assert [one.id for one in row] == [str(n) for n in range(40)]


def test_an_index_is_kept_and_mapped(corpus: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_bm25(corpus).search(["Peru"], 2)
    monkeypatch.setattr(bm25, "_build", lambda *_: pytest.fail("built again"))
    again = open_bm25(corpus)
    assert again.search(["Peru"], 2) == first
    assert isinstance(again.index.scores["data"], np.memmap)
    assert [path.name for path in (home / "bm25").iterdir()] == [corpus_hash(corpus)]


def test_a_changed_corpus_gets_a_new_index(corpus: str, home: Path) -> None:
    before = open_bm25(corpus).search(["Bolivia"], 2)
    with Path(corpus).open("a", encoding="utf-8") as handle:
        handle.write('{"id": "new", "text": "Sucre is a capital of Bolivia."}\n')
    (after,) = open_bm25(corpus).search(["Bolivia"], 2)
    assert before == [[]] and after[0].id == "new"
    assert len(list((home / "bm25").iterdir())) == 2


def test_several_threads_search_at_once(corpus: str) -> None:
    searched, wrong = open_bm25(corpus), []

    def ask(query: str, wanted: str) -> None:
        wrong.extend(row for _ in range(100) for row in searched.search([query], 1) if row[0].id != wanted)

    pairs = [("Peru", "a"), ("Ecuador", "b"), ("Japan", "ü"), ("beans", "d")]
    threads = [threading.Thread(target=ask, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def passages(*texts: str) -> list[Passage]:
    return [Passage(str(n), text, 10.0 - n) for n, text in enumerate(texts)]


def test_the_closest_passage_opens_as_the_line_does() -> None:
    found = passages(
        "Kuala Lumpur lies in Asia.", "The capital of Malaysia is Kuala Lumpur.", "The capital of Brunei is B."
    )
    assert closest("The capital of Brunei is Kuala Lumpur.", found) == found[2]
    assert closest("Lumpur is what I say.", found) == found[0]  # none opens so: the best by score
    assert closest("The town of Kuala Lumpur is in Malaysia.", found) == found[0]  # "The" alone is no opening
    assert closest("x", []) is None


def test_of_a_long_passage_the_sentence_that_is_meant() -> None:
    long = "Peru is large. It has mountains.\nThe capital of Peru is Lima! It lies by the sea."
    assert sentence_for(long, "The capital of Peru is Cusco.") == "The capital of Peru is Lima!"
    assert sentence_for(" Short. And two. ", "two") == "Short. And two."
    assert (
        sentence_for("word " * 100 + "end.", "end") == ("word " * 100 + "end.").strip()
    )  # one sentence: cut by tokens


def test_false_lines_find_the_facts_that_they_are_about() -> None:
    """Each country with another one's capital, currency and continent."""
    everyone = list(countries().values())
    asked, wanted = [], []
    for one, other in zip(everyone, everyone[1:] + everyone[:1], strict=True):
        name = one.name[0].upper() + one.name[1:]
        asked += [f"The capital of {one.name} is {other.capital}.", f"{name} lies in {other.continent}."]
        wanted += [f"The capital of {one.name} is {one.capital}.", f"{name} lies in {one.continent}."]
    found = searching(open_retriever("atlas"))([(Question(f"What of {line}?", "?"), line) for line in asked])
    hits = [one is not None and one[1] == fact for one, fact in zip(found, wanted, strict=True)]
    assert sum(hits) / len(hits) > 0.99


# --- search by a server


@dataclass
class Server:
    """A retrieval server: it answers with the replies given, one after another, the last one for ever."""

    replies: list[tuple[int, Any]]
    asked: list[dict[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/retrieve"

    port: int = 0


@pytest.fixture
def server() -> Iterator[Server]:
    known = Server([])

    class Handler(Replies):
        def do_POST(self) -> None:
            known.asked.append(json.loads(self.body()))
            status, reply = known.replies.pop(0) if len(known.replies) > 1 else known.replies[0]
            self.reply(status, reply if isinstance(reply, bytes) else reply(known.asked[-1]))

    with listening(Handler) as known.port:
        yield known


def answered(body: dict[str, Any]) -> dict[str, Any]:
    """As Search-R1's server answers."""
    row = [{"document": {"id": "7", "contents": '"Peru"\nLima is its capital.'}, "score": 12.5}]
    return {"result": [row * (2 if query == "two" else 1) if query != "none" else [] for query in body["queries"]]}


def test_a_server_is_asked_as_search_r1_asks(server: Server) -> None:
    server.replies = [(200, answered)]
    found = open_retriever(server.url).search(["two", "none", "çà 東京"], 5)
    assert server.asked == [{"queries": ["two", "none", "çà 東京"], "topk": 5, "return_scores": True}]
    one = Passage("7", "Lima is its capital.", 12.5, "Peru")
    assert found == [[one, one], [], [one]]
    many = [str(n) for n in range(2 * BATCH + 1)]
    assert len(HttpRetriever(server.url).search(many, 1)) == len(many)
    assert [len(body["queries"]) for body in server.asked[1:]] == [BATCH, BATCH, 1]


@pytest.mark.parametrize(
    ("document", "wanted"),
    [
        ({"contents": "Plain."}, ("Plain.", "")),
        ({"title": "T", "text": "Said.", "contents": '"T"\nSaid.'}, ("Said.", "T")),
        ("Bare.", ("Bare.", "")),
    ],
)
def test_documents_of_other_servers(server: Server, document: Any, wanted: tuple[str, str]) -> None:
    server.replies = [(200, lambda body: {"result": [[{"document": document, "score": 1}], [document]]})]
    rows = HttpRetriever(server.url).search(["a", "b"], 3)
    for (one,) in rows:
        assert (one.text, one.source) == (wanted[0], wanted[1] or server.url)
    assert rows[0][0].id == rows[1][0].id != ""


def test_a_server_that_stumbles_is_asked_again(server: Server) -> None:
    server.replies = [(503, b"later"), (429, b"slowly"), (200, answered)]
    assert len(HttpRetriever(server.url, first_wait=0.01).search(["q"], 1)[0]) == 1
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("reply", "tries", "said"),
    [
        ((404, b"no such thing"), 1, r"HTTP 404, is it the address of /retrieve\? It says: no such thing"),
        ((200, b"<html>"), 1, "not JSON"),
        ((200, lambda body: {"result": []}), 1, "no list of passages for each of 1 queries"),
        ((200, lambda body: [1]), 1, "no list of passages"),
        ((200, lambda body: {"result": [[{"document": {"id": 1}}]]}), 1, "a passage without 'contents'"),
        ((500, b"broken"), 4, "HTTP 500, 4 times"),
    ],
)
def test_a_server_that_fails(server: Server, reply: tuple[int, Any], tries: int, said: str) -> None:
    server.replies = [reply]
    with pytest.raises(RetrieverError, match=said) as caught:
        HttpRetriever(server.url, first_wait=0.01).search(["q"], 1)
    assert server.url in str(caught.value) and len(server.asked) == tries


def test_no_server_at_all() -> None:
    with pytest.raises(RetrieverError, match=r"no answer .* 4 times"):
        HttpRetriever("http://127.0.0.1:9/retrieve", first_wait=0.01).search(["q"], 1)
