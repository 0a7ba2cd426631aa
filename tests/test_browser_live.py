"""The live page in a browser: a trace streams in, a line is changed and run from, a correction is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from memreason import pipeline
from memreason.core.files import read_traces, write_traces
from memreason.core.stages import EvalRecipe
from memreason.core.trace import Question, Step, Trace
from memreason.finetune.checkpoint import load_checkpoint
from memreason.generate.answer import answer_questions
from memreason.generate.onward import begun_ids, continue_traces
from memreason.generate.recall import retrieving
from memreason.report.gather import gather
from memreason.report.page import page
from served import KNOWN, SETTINGS, Served, fluent_run, serving

EVIL = '<img src=x onerror="window.evil = 1"> is <memory_0>'
CHANGED = "Quito lies in Asia."


@pytest.fixture(scope="module")
def run(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run that was evaluated on its own questions."""
    folder = tmp_path_factory.mktemp("live")
    found = fluent_run(folder)
    write_traces(folder / "own.jsonl", KNOWN)
    settings = EvalRecipe(task=str(folder / "own.jsonl"), max_new_tokens=80)
    pipeline.evaluate(found, settings=settings)
    return found


@pytest.fixture(scope="module")
def expected(run: Path) -> dict[str, Trace]:
    """What the model answers, and how it goes on behind a changed line, without a server."""
    loaded = load_checkpoint(run)
    (evil,) = answer_questions(loaded.model, loaded.codec, [Question(EVIL, "?")], SETTINGS)
    begun = replace(KNOWN[1], steps=(Step(("memory",), CHANGED),))
    ids = {begun.question.id: begun_ids(loaded.codec, begun)}
    (changed,) = continue_traces(loaded.model, loaded.codec, [begun.question], ids, SETTINGS)
    return {"evil": evil, "changed": changed, "checkpoint": loaded}  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def served(run: Path, expected: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    def search(asked: Any) -> Any:
        return [("p1", "Lima lies in Peru.") for _ in asked]

    html = page({**gather([run]), "live": True})
    with serving(expected["checkpoint"], tmp_path_factory.mktemp("kept"), page=html, search=search) as found:
        yield found


@pytest.fixture(params=[1200, 390])
def tab(request: pytest.FixtureRequest, browser: Any, served: Served) -> Iterator[Any]:
    """The page on a wide screen and on a phone; an error in it or a request to another server fails the test."""
    wrong: list[str] = []
    context = browser.new_context(viewport={"width": request.param, "height": 800}, reduced_motion="reduce")
    one, home = context.new_page(), f"http://127.0.0.1:{served.port}/"
    one.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    one.on("pageerror", lambda error: wrong.append(str(error)))
    one.on("request", lambda sent: None if sent.url.startswith(home) else wrong.append(sent.url))
    one.goto(home)
    yield one
    over = one.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    context.close()
    told = "Failed to load resource: the server responded with a status of 503"  # Chromium's own word on a full server
    assert [text for text in wrong if not text.startswith(told)] == [] and over <= 0


def ask(tab: Any, text: str) -> Any:
    """Ask, and wait until the whole trace stands there."""
    tab.get_by_role("textbox", name="Question", exact=True).fill(text)
    tab.get_by_role("button", name="Ask", exact=True).click()
    box = tab.locator(".answers article").first
    box.locator(".lines:not(.writing) .answer").wait_for()
    return box


def said(box: Any) -> list[str]:
    return list(box.locator(".lines .step .said").all_inner_texts())


def texts(trace: Trace) -> list[str]:
    return [*(step.text for step in trace.steps), trace.prediction or "(none)"]


def test_a_trace_streams_in_and_its_texts_are_text(tab: Any, expected: dict[str, Trace]) -> None:
    tab.evaluate("""() => {
        window.grown = new Set();
        new MutationObserver(() => {
            const lines = document.querySelector(".answers .lines");
            if (lines) window.grown.add(lines.innerText);
        }).observe(document.querySelector(".answers"), { childList: true, subtree: true });
    }""")
    box = ask(tab, EVIL)
    assert said(box) == texts(expected["evil"])
    assert box.locator("h3").inner_text() == EVIL and tab.evaluate("window.evil") is None
    assert tab.evaluate("window.grown.size") > 3
    kinds = [chip for chip in box.locator(".step .chip").all_inner_texts() if chip != "answer"]
    assert kinds == ["+".join(step.kinds) or "line" for step in expected["evil"].steps]
    colours = "getComputedStyle(document.querySelector('.answers .step.{}')).borderLeftColor"
    assert tab.evaluate(colours.format("memory")) != tab.evaluate(colours.format("answer"))


def test_change_a_line_of_an_opened_trace_run_from_there_and_keep_it(
    tab: Any, served: Served, run: Path, expected: dict[str, Trace]
) -> None:
    served.corrections.unlink(missing_ok=True)
    tab.locator(".option", has_text=KNOWN[1].question.text).click()
    trace = tab.locator("#trace")
    before = said(trace)
    trace.get_by_role("button", name="Change this line").first.click()
    panel = trace.locator(".change")
    offers = panel.locator(".offers button")
    offers.first.wait_for()
    assert offers.all_inner_texts()[-1] == "found Lima lies in Peru."
    panel.get_by_role("textbox").fill(CHANGED)
    panel.get_by_role("button", name="Run from here").click()
    panel.locator(".keep").wait_for()
    old, new = (panel.locator(f".{name} .said").all_inner_texts() for name in ("before", "after"))
    assert (old, new) == (before, texts(expected["changed"]))
    panel.get_by_label("Answer to learn").fill("True")
    panel.get_by_role("button", name="Keep this correction").click()
    panel.get_by_text("kept in corrections.jsonl").wait_for()
    (kept,) = read_traces(served.corrections)
    assert kept.steps == expected["changed"].steps and (kept.answer, kept.prediction) == ("True", None)
    assert kept.question.id == KNOWN[1].question.id
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        serious = [one for one in Axe().run(tab).response["violations"] if one["impact"] in ("serious", "critical")]
        assert [(one["id"], one["nodes"][0]["html"][:200]) for one in serious] == []


def test_a_found_line_keeps_where_it_is_from(tab: Any, served: Served) -> None:
    served.corrections.unlink(missing_ok=True)
    box = ask(tab, KNOWN[1].question.text)
    box.get_by_role("button", name="Change this line").first.click()
    box.get_by_role("button", name="found Lima lies in Peru.").click()
    box.get_by_role("button", name="Run from here").click()
    box.locator(".keep").wait_for()
    assert "given, from p1" in box.locator(".after .given").inner_text()
    box.get_by_role("button", name="Keep this correction").click()
    box.get_by_text("kept in corrections.jsonl").wait_for()
    (kept,) = read_traces(served.corrections)
    assert kept.steps[0] == Step(("memory",), "Lima lies in Peru.", "p1")


def test_what_the_server_refuses_is_said(tab: Any, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.live, "limit", 0)
    tab.get_by_role("textbox", name="Question", exact=True).fill("Is it?")
    tab.get_by_role("button", name="Ask", exact=True).click()
    tab.get_by_text("Not answered: too many questions are open; ask again later (in 1 s)").wait_for()


@pytest.mark.parametrize("width", [1200, 390])
def test_retrieved_lines_say_where_they_are_from(
    browser: Any, run: Path, expected: dict[str, Any], tmp_path: Path, width: int
) -> None:
    """The page says that lines are looked up; each shows its passage's id, and what the model had written."""

    def search(asked: Any) -> Any:
        return [("p1", EVIL) for _ in asked]

    html = page({**gather([run]), "live": True, "memory": "all: what is found in own.jsonl stands there"})
    with serving(expected["checkpoint"], tmp_path, page=html, engine=retrieving(search, math.inf)) as there:
        tab = browser.new_page(viewport={"width": width, "height": 800})
        tab.goto(f"http://127.0.0.1:{there.port}/")
        assert "Memory lines are looked up, all: what is found in own.jsonl" in tab.locator(".ask .note").inner_text()
        box = ask(tab, KNOWN[1].question.text)
        line = box.locator(".lines .step.memory").first
        assert line.locator(".said").inner_text() == EVIL and tab.evaluate("window.evil") is None
        assert line.locator(".source").inner_text() == "retrieved: p1"
        assert f"the model had: {KNOWN[1].steps[0].text}" in line.locator(".below").inner_text()
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        tab.close()
