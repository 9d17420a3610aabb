"""The study's page in a headless Chromium, by clicks and keys. Skipped where there is no Chromium."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minigpt5.evaluation.study.__main__ import main
from minigpt5.evaluation.study.answers import read_key, read_votes
from minigpt5.evaluation.study.design import QUESTIONS, TIE
from tests.helpers.study_runs import make_row, write_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[browser]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here"),
    pytest.mark.timeout(180),
]
EVIL = "<img src=x onerror=\"document.title='broken into'\"> & so on"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    ids = [f"row-{number}" for number in range(3)]
    first = write_run(tmp_path / "first", [make_row(id, ["A fox.", EVIL], (181, 85, 43)) for id in ids])
    second = write_run(tmp_path / "second", [make_row(id, ["A hen.", "It ends."], (43, 108, 181)) for id in ids])
    main(["make", str(first), str(second), "--out", str(tmp_path / "study.html"), "--seed", "5"])
    return tmp_path / "study.html"


@pytest.fixture
def page(study: Path) -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text))
        page.on("request", lambda asked: problems.append(asked.url) if asked.url.startswith("http") else None)
        page.goto(study.as_uri())
        yield page
        assert not problems
        browser.close()


def enter(page: Any, rater: str) -> None:
    page.fill("#rater", rater)
    page.keyboard.press("Enter")


def sides(page: Any) -> tuple[str, str]:
    """Names of the candidates on the left and right of the screen."""
    values = page.eval_on_selector_all("#fields fieldset:first-child input", "all => all.map(one => one.value)")
    assert values[1] == TIE
    return values[0], values[2]


def save(page: Any, button: str, path: Path) -> dict[str, Any]:
    with page.expect_download() as download:
        page.click(button)
    download.value.save_as(path)
    assert download.value.suggested_filename.startswith("answers-")
    return json.loads(path.read_text())


def test_a_rater_answers_by_keys_and_clicks_and_the_tally_reads_it(page: Any, study: Path) -> None:
    enter(page, "Zoë 1")
    assert page.inner_text("#place") == "Pair 1 of 3 (0 answered)"
    shown = [sides(page)]
    page.keyboard.press("Enter")
    assert "answer each question" in page.inner_text("#status")
    assert page.evaluate("document.getElementById('status').getBoundingClientRect().bottom < innerHeight")
    for key in "123":  # left, a tie, right
        page.keyboard.press(key)
    page.keyboard.press("Enter")  # the focus is on Next
    assert page.inner_text("#place") == "Pair 2 of 3 (1 answered)"
    page.keyboard.press("Backspace")
    assert page.eval_on_selector_all("#fields :checked", "all => all.map(one => one.value)") == [
        shown[0][0],
        TIE,
        shown[0][1],
    ]
    page.click("#next")
    shown.append(sides(page))
    for number in (1, 2, 3):
        page.click(f"#fields fieldset:nth-child({number}) label:last-child")
    page.click("#next")
    shown.append(sides(page))
    assert len(save(page, "#save", study.with_name("early.json"))["answers"]) == 2
    for key in "222":
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    assert page.inner_text("#end h1") == "Thank you"
    path = study.with_name("answers.json")
    answers = save(page, "#download", path)
    assert answers["rater"] == "Zoë 1"
    assert [(one["left"], one["right"]) for one in answers["answers"]] == shown
    assert [list(one["choices"].values()) for one in answers["answers"]] == [
        [shown[0][0], TIE, shown[0][1]],
        [shown[1][1]] * 3,
        [TIE] * 3,
    ]
    key = read_key(study.with_name("study.key.json"))
    votes = read_votes(key, [path])
    assert len(votes) == 9 and {vote.question for vote in votes} == set(QUESTIONS)
    assert votes[0].winner == key.candidates[shown[0][0]].run


def test_progress_is_kept_by_rater(page: Any) -> None:
    enter(page, "one")
    first = sides(page)
    for key in "111":
        page.keyboard.press(key)
    page.reload()
    enter(page, "one")
    assert page.inner_text("#place") == "Pair 2 of 3 (1 answered)"
    page.keyboard.press("Backspace")
    assert sides(page) == first and page.eval_on_selector_all("#fields :checked", "all => all.length") == 3
    page.reload()
    enter(page, "two")
    assert page.inner_text("#place") == "Pair 1 of 3 (0 answered)"


def test_a_second_tab_loses_no_answer_of_the_first(page: Any) -> None:
    other = page.context.new_page()
    other.goto(page.url)
    enter(page, "one")
    page.keyboard.press("1")
    enter(other, "one")
    for key in "111":
        other.keyboard.press(key)
    page.keyboard.press("1")
    for tab in (page, other):
        tab.reload()
        enter(tab, "one")
        assert tab.inner_text("#place") == "Pair 2 of 3 (1 answered)"


def test_raters_get_other_orders_and_sides(page: Any) -> None:
    seen = set()
    for number in range(12):
        enter(page, f"rater {number}")
        seen.add(sides(page))
        page.reload()
    assert len(seen) > 3  # of six: three pairs, two sides


def test_texts_stay_texts_and_every_control_has_a_name(page: Any) -> None:
    enter(page, "one")
    assert EVIL in page.inner_text("#compare") and page.title() == "Which story is better?"
    assert page.eval_on_selector_all("#compare img", "all => all.every(one => one.complete && one.naturalWidth > 0)")
    for name in ("Language continuity", "Image quality", "Multimodal coherence"):
        group = page.get_by_role("group", name=name)
        assert group.get_by_role("radio").count() == 3
        assert group.get_by_role("radio", name="About the same").count() == 1
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
