"""The report in a browser: the explorer's search, filters, links and keys, colours, a phone, speed, accessibility."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from made_run import answered, save_findings, save_retrieval, save_run
from memreason.core.trace import MEMORY, Question, Step, Trace
from memreason.data.atlas import make_atlas
from memreason.pages import write_report
from memreason.report.gather import gather
from memreason.report.page import page

EVIL = '</script><script>window.evil = 1</script><img src=x onerror="window.evil = 2">'
Open = Callable[..., Any]
COUNT = 300  # traces of the small page


def all_traces(seed: int) -> list[Trace]:
    """One whose texts are markup, and 2,000 of atlas with one draw of mistakes."""
    import random

    draw = random.Random(seed)
    meta = {"form": "capital_choice", "hops": 1, "obscurity": 0.5, "group": "Peru"}
    facts = ({"subject": "Peru", "relation": "capital", "object": "Lima"},)
    question = Question(f"Is {EVIL} a text?", "A", "own", choices=(EVIL, "no"), facts=facts, meta=meta)
    evil = Trace(question, (Step((MEMORY,), EVIL),), prediction="B")
    return [evil, *(answered(trace, draw) for trace in make_atlas("train", 2000))]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, browser: Any) -> dict[str, Path]:
    """Pages of a large run, of a small one with every finding, of both, and a live one."""
    folder = tmp_path_factory.mktemp("reports")
    first = save_run(folder / "first", 0, traces=all_traces(0))
    second = save_run(folder / "second", 0, traces=all_traces(7)[:COUNT])
    save_findings(next(second.glob("checkpoint-*/eval/*")))
    save_retrieval(second / "checkpoint-113")
    pages = {"large": write_report(first), "two": write_report([first, second], out=folder / "two.html")}
    pages["small"] = write_report(second)
    pages["live"] = folder / "live.html"
    hook = "<script>window.calls = []; window.memreasonLive = (...all) => window.calls.push(all);</script>"
    before, ours = page({**gather([second]), "live": True}).rsplit("<script>", 1)
    pages["live"].write_text(f"{before}{hook}<script>{ours}", encoding="utf-8")
    return pages


@pytest.fixture
def opened(browser: Any, reports: dict[str, Path]) -> Iterator[Open]:
    """Open a page in a context of its own; a console error, a page error or a request to anywhere fails the test."""
    wrong: list[str] = []
    contexts = []

    def show(name: str = "small", hash: str = "", **settings: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **settings})
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda sent: None if sent.url.startswith(("file:", "data:")) else wrong.append(sent.url))
        tab.goto(reports[name].as_uri() + hash)
        return tab

    yield show
    for context in contexts:
        context.close()
    assert wrong == []


def found(tab: Any) -> int:
    """How many traces the page says that it shows."""
    return int(tab.locator("#count").inner_text().split(" of ")[0].replace(",", ""))


def test_search_finds_words_of_questions_lines_and_answers(opened: Open) -> None:
    tab = opened("large")
    assert found(tab) == 2001
    tab.fill("#q", "springfield capital")
    shown = found(tab)
    assert 0 < shown < 500
    tab.locator(".option").first.click()
    assert tab.locator("#trace mark").count() >= 2
    tab.fill("#q", "no such word anywhere")
    assert found(tab) == 0 and tab.get_by_text("No trace fits.").is_visible()


def test_filters_narrow_sort_and_clear(opened: Open) -> None:
    tab = opened()
    tab.select_option("#verdict", "wrong")
    wrong = found(tab)
    tab.select_option("#fault", "memory")
    assert 0 < found(tab) < wrong
    tab.select_option("#fault", "")
    tab.select_option("#fact", "one is false")
    assert 0 < found(tab) < wrong
    tab.click("#clear")
    assert found(tab) == COUNT
    tab.select_option("#sort", "unsure")
    tab.locator("#sure").fill("70")
    assert 0 < found(tab) < COUNT and "≤ 0.70" in tab.locator("#sure-said").inner_text()
    least = [float(text) for text in tab.locator(".option .doubt").all_inner_texts()[:10]]
    assert least and least == sorted(least) and least[-1] <= 0.7


def test_a_link_opens_its_trace_and_its_filters(opened: Open) -> None:
    tab = opened()
    tab.select_option("#verdict", "wrong")
    tab.fill("#q", "continent")
    tab.locator(".option").nth(3).click()
    asked, hash = tab.locator("#trace h3").inner_text(), tab.evaluate("location.hash")
    again = opened(hash=hash)
    assert again.locator("#trace h3").inner_text() == asked
    assert (found(again), again.locator("#verdict").input_value()) == (found(tab), "wrong")
    alone = opened(hash=again.locator("#trace .link").get_attribute("href"))
    assert alone.locator("#trace h3").inner_text() == asked and found(alone) == COUNT


def test_keys(opened: Open) -> None:
    tab = opened()
    press = tab.keyboard.press
    question = tab.locator("#trace h3")
    press("j")
    first = question.inner_text()
    press("j")
    assert question.inner_text() != first
    press("k")
    assert question.inner_text() == first
    press("/")
    tab.keyboard.type("jk")  # typed, not obeyed
    assert tab.locator("#q").input_value() == "jk" and question.inner_text() == first
    tab.fill("#q", "")
    tab.locator("#list").focus()
    press("ArrowDown")
    press("End")
    assert tab.locator(".option[aria-selected=true]").get_attribute("aria-posinset") == str(COUNT)
    assert tab.locator("#list").get_attribute("aria-activedescendant") == f"row-{COUNT - 1}"
    press("Home")
    assert question.inner_text() == first
    press("Enter")
    assert tab.evaluate("document.activeElement.id") == "trace"
    press("?")
    assert tab.locator("#help").is_visible()
    press("Escape")
    assert not tab.locator("#help").is_visible() and question.inner_text() == first
    press("Escape")
    assert question.count() == 0 and tab.evaluate("document.activeElement.id") == "list"


def test_markup_in_texts_shows_as_text(opened: Open) -> None:
    tab = opened(hash="#task=own")
    tab.locator(".option").click()
    assert EVIL in tab.locator("#trace h3").inner_text()
    assert tab.locator("#trace .said").first.inner_text() == EVIL
    assert tab.evaluate("window.evil") is None and tab.locator("#trace img").count() == 0


def test_a_trace_shows_evidence_checks_and_rule(opened: Open) -> None:
    tab = opened(hash="#fault=memory&q=springfield")
    tab.locator(".option").first.click()
    trace = tab.locator("#trace")
    assert "✗ false" in trace.inner_text() and "it is" in trace.locator(".evidence").inner_text()
    assert "rule: answer line" in trace.inner_text() and "fault: memory" in trace.inner_text()


def test_each_run_has_its_own_threshold_of_doubt(opened: Open) -> None:
    """The first run is not calibrated (0.9), the second is (0.938)."""
    tab = opened("two")
    tab.select_option("#sort", "unsure")
    flagged = """() => [...document.querySelectorAll("#trace article")].map((side) =>
        [...side.querySelectorAll(".step:has(.sure)")].map((step) => {
            const told = step.querySelector(".sure").textContent.replace("probability ", "");
            return [Number(told), step.classList.contains("unsure")];
        }))"""
    seen: list[set[bool]] = [set(), set()]
    for _ in range(40):
        tab.keyboard.press("j")
        for place, (below, lines) in enumerate(zip((0.9, 0.938), tab.evaluate(flagged), strict=False)):
            clear = [(p, unsure) for p, unsure in lines if abs(p - below) > 0.006]  # shown with two digits
            assert all(unsure == (p < below) for p, unsure in clear)
            seen[place] |= {unsure for p, unsure in clear if 0.906 < p < 0.932}
    assert seen == [{False}, {True}]


def test_curves_stay_inside_their_section(opened: Open) -> None:
    for width in (1200, 360):
        tab = opened(viewport={"width": width, "height": 800})
        frame = tab.locator("#retrieval").bounding_box()
        for shape in tab.locator("#retrieval circle").all():
            box = shape.bounding_box()
            assert frame["x"] <= box["x"] and box["x"] + box["width"] <= frame["x"] + frame["width"]
        colours = tab.locator("#retrieval circle.ring").evaluate(
            "(ring) => [getComputedStyle(ring).stroke, getComputedStyle(document.querySelector('circle.dot')).fill]"
        )
        assert len(set(colours)) == 2


def test_only_rows_in_sight_are_in_the_page(opened: Open) -> None:
    tab = opened("large")
    assert tab.locator(".option").count() < 60
    tab.evaluate("document.getElementById('list').scrollTop = 60000")
    tab.wait_for_selector("#row-910")
    assert tab.locator(".option").count() < 60


def test_two_runs_stand_side_by_side(opened: Open) -> None:
    tab = opened("two")
    tab.select_option("#differs", "verdicts differ")
    assert 0 < found(tab) < COUNT
    tab.keyboard.press("j")
    assert tab.locator("#trace article").count() == 2
    verdicts = tab.locator("#trace .verdict > :first-child").all_inner_texts()
    assert len(set(verdicts)) == 2
    tab.select_option("#differs", "lines differ")
    tab.locator(".option").nth(1).click()
    assert tab.locator("#trace").get_by_text("≠ differs").count() >= 1


def test_the_live_hook_is_called_for_each_line(opened: Open) -> None:
    tab = opened("live")
    tab.keyboard.press("j")
    lines = tab.locator("#trace .lines > .step:not(.answer)").count()
    calls = tab.evaluate("window.calls.map(([trace, index, box]) => [trace.lines[index].text, box.isConnected])")
    assert [text for text, _ in calls] == tab.locator("#trace .step:not(.answer) .said").all_inner_texts()
    assert len(calls) == lines and all(connected for _, connected in calls)


def test_colours_follow_the_system_and_the_toggle(opened: Open) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = opened().evaluate(ground), opened(color_scheme="dark").evaluate(ground)
    assert light != dark
    tab = opened()
    tab.select_option("#theme", "dark")
    assert tab.evaluate(ground) == dark
    tab.reload()
    assert tab.evaluate(ground) == dark  # kept
    tab.select_option("#theme", "")
    tab.emulate_media(color_scheme="dark")
    assert tab.evaluate(ground) == dark
    tab.select_option("#theme", "light")
    assert tab.evaluate(ground) == light


@pytest.mark.parametrize("name", ["small", "two"])
def test_a_phone_scrolls_one_way_only(opened: Open, name: str) -> None:
    tab = opened(name, viewport={"width": 360, "height": 740}, has_touch=True)
    width = "document.documentElement.scrollWidth"
    assert tab.evaluate(width) == 360
    tab.locator(".option").first.tap()
    assert tab.locator("#trace h3").is_visible() and not tab.locator("#list").is_visible()
    assert tab.evaluate(width) == 360
    tab.click("#back")
    assert tab.locator("#list").is_visible()


def test_2000_traces_open_within_a_second(opened: Open) -> None:
    """The page's own work, all scripts, styles and layout: processor time, since other tests may hold the processor."""
    tab = opened("small")
    session = tab.context.new_cdp_session(tab)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    tab.goto(tab.url.replace("second/report.html", "first/report.html"))
    assert found(tab) == 2001
    measured = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    assert 0 < measured["TaskDuration"] < 1


AXE = [("small", 1200, "light"), ("small", 360, "dark"), ("two", 1200, "dark")]


@pytest.mark.parametrize(("name", "width", "scheme"), AXE)
def test_axe_finds_no_serious_fault(opened: Open, name: str, width: int, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    tab = opened(name, "#verdict=wrong", viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab.locator(".option").first.click()
    for summary in tab.locator("summary").all():
        summary.click()
    found = Axe().run(tab).response["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert [(one["id"], one["nodes"][0]["html"][:200]) for one in serious] == []
    tab.keyboard.press("?")
    assert Axe().run(tab, "#help").response["violations"] == []


def test_replaced_lines_of_an_answer_tried_anew(browser: Any, tmp_path: Path) -> None:
    """A wrong trace that was answered anew with gold lines shows what became of it."""
    from memreason.core.files import read_jsonl, write_jsonl

    made = [replace(trace, prediction="") for trace in make_atlas("train", 1)]
    run = save_run(tmp_path / "run", 0, traces=made)
    (path,) = run.glob("checkpoint-*/eval/*/faults.jsonl")
    (line,) = [line for _, line in read_jsonl(path)]
    gold = {"given": [{"kinds": ["memory"], "text": "Given line."}], "steps": [], "answer": "Anew"}
    write_jsonl(path, [{**line, "ways": {"exact": "format", "judge": "memory"}, "counterfactual": {"gold": gold}}])
    tab = browser.new_page()
    tab.goto(write_report(run).as_uri())
    tab.keyboard.press("j")
    tab.locator("summary", has_text="Anew, with gold memory lines").click()
    assert tab.get_by_text("Given line.").is_visible() and tab.get_by_text("Anew", exact=True).is_visible()
    assert "judge way: memory" in tab.locator(".evidence").inner_text()
    tab.close()
