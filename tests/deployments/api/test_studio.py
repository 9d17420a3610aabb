"""The studio in a headless Chromium, against a server over fake engines. Skipped where there is no Chromium."""

from __future__ import annotations

import asyncio
import io
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image

from deployments.api.routes import create_api
from deployments.auth import Keys, add_key, load_keys
from tests.helpers.fakes import FakeDecoder, FakeGenerator
from tests.helpers.served import CONFIG, Served, under

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[browser]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here"),
    pytest.mark.timeout(180),
]


def _make_webp() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 80, 40)).save(file, "WEBP")
    return file.getvalue()


WEBP = _make_webp()


class Studio:
    """A server that can be stopped and started again on its port and storage."""

    def __init__(
        self, storage: Path, *, key: str = "", keys: Keys | None = None, prefix: str = "", is_known: bool = True
    ) -> None:
        """`is_known`: the prefix is Serve's, and none that a proxy takes away."""
        self.storage, self.key, self.keys, self.prefix, self.is_known = storage, key, keys, prefix, is_known
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}{prefix}"
        self.start()

    def start(self, **decoder: Any) -> None:
        generator = FakeGenerator(delay_s=0.03)
        self.served = Served(
            self.storage,
            generator=generator,
            decoder=FakeDecoder(**decoder),
            keys=self.keys,
            example_pictures={1: WEBP},
        )
        app = under(self.prefix, create_api(self.served.front), is_known=self.is_known)
        config = uvicorn.Config(app, port=self.port, log_level="error", lifespan="on")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()))
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()


PREFIXES = {"by Serve": True, "by a proxy": False}


@pytest.fixture(params=["open", "with keys"])
def studio(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Studio]:
    key, is_known = "", PREFIXES.get(request.param, True)
    if request.param != "open":
        key = add_key(tmp_path / "keys.json", "alice", per_minute=60, concurrent=8)
    keys = load_keys(str(tmp_path / "keys.json")) if key else None
    prefix = "/some/app" if request.param in PREFIXES else ""
    studio = Studio(tmp_path, key=key, keys=keys, prefix=prefix, is_known=is_known)
    yield studio
    studio.stop()


@pytest.fixture
def page(studio: Studio) -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if "Content Security" in line.text else None)
        page.goto(f"{studio.url}/")
        if studio.key:
            log_in(page, studio.key)
        yield page
        assert not problems
        browser.close()


def log_in(page: Any, key: str) -> None:
    page.fill("#key", key)
    page.keyboard.press("Enter")
    page.wait_for_selector("#login", state="hidden")


def tell(page: Any, pages: int = 2, prompt: str = "A fox") -> None:
    page.fill("#prompt", prompt)
    page.fill("#pages", str(pages))
    if not page.is_visible("#seed"):
        page.click("#show-settings")
    page.fill("#seed", "7")
    page.click("#begin")


def until(page: Any, condition: str) -> None:
    """Playwright's own way to wait evaluates a string in the page, which the page's policy forbids."""
    deadline = time.monotonic() + 30
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.02)


def texts(page: Any) -> list[str]:
    return [element.inner_text() for element in page.query_selector_all(".page .text")]


def wait_until_finished(page: Any) -> None:
    page.wait_for_selector("#after:not([hidden])", timeout=30_000)


def test_a_story_of_many_pages_has_a_strip_that_leads_to_each(page: Any) -> None:
    tell(page, pages=2)
    wait_until_finished(page)
    assert not page.is_visible("#strip")
    page.click(".brand")
    page.wait_for_selector("#greeting:not([hidden])")
    assert page.get_attribute("#pages", "max") == "64"
    tell(page, pages=40)
    page.wait_for_selector("#after:not([hidden])", timeout=90_000)
    stops = page.query_selector_all("#strip a")
    assert [stop.inner_text().strip() for stop in stops] == [str(number) for number in range(1, 41)]
    assert all(stop.query_selector("img:not([hidden])") for stop in stops)
    stops[32].click()
    until(page, "document.querySelector('#strip [aria-current]')?.textContent.trim() === '33'")
    top, strip = (page.query_selector(found).bounding_box() for found in ("[aria-label='Page 33']", "#strip"))
    assert strip["y"] == 0 and strip["height"] < top["y"] < 450
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    until(page, "document.querySelector('#strip [aria-current]').getBoundingClientRect().left < innerWidth")
    page.click("#strip a:nth-child(34)")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Page 34"


def test_the_first_screen_greets_with_examples_and_the_latest_stories(page: Any) -> None:
    page.wait_for_selector("#examples .card")
    assert "MiniGPT-5 on Ray" in page.inner_text(".brand")
    assert page.inner_text("#model") == CONFIG.name and page.inner_text("#summary") == CONFIG.summary
    assert not page.is_visible("#about") and not page.is_visible("#latest")
    page.click("#more-about > summary")
    assert page.inner_text("#about") == CONFIG.about.partition("\n")[2]
    assert [card.inner_text() for card in page.query_selector_all("#examples .card")] == list(CONFIG.examples)
    until(page, "document.querySelector('#examples img').naturalWidth === 8")
    assert len(page.query_selector_all("#examples img")) == 1
    page.click("#examples li:nth-child(2) button")
    wait_until_finished(page)
    assert page.inner_text("#title") == CONFIG.examples[1] and len(texts(page)) == 4
    assert not page.is_visible("#greeting") and not page.is_visible("#examples")
    page.click(".brand")
    page.wait_for_selector("#latest .card img")
    assert page.inner_text("#latest .card") == CONFIG.examples[1]
    page.click("#latest .card")
    wait_until_finished(page)
    page.go_back()
    page.wait_for_selector("#greeting:not([hidden])")


def test_the_address_of_a_deleted_story_greets_and_says_so(page: Any, studio: Studio) -> None:
    page.goto("about:blank")
    page.goto(f"{studio.url}/#story_gone")
    page.wait_for_selector("#greeting:not([hidden])")
    until(page, "document.querySelector('#status.error')?.textContent.includes('story_gone')")


def test_a_story_is_told_and_can_be_read_as_a_book(page: Any) -> None:
    tell(page)
    page.wait_for_selector(".text.arriving")
    wait_until_finished(page)
    assert texts(page) == ["Page 1 of 7.", "Page 2 of 7."]
    assert page.get_attribute(".page img", "alt") == "Picture of page 1: Page 1 of 7."
    until(page, "[...document.querySelectorAll('figure > img')].every(i => i.naturalWidth > 0)")
    page.click("#read")
    assert page.inner_text("#book-text") == "Page 1 of 7."
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#book-text") == "Page 2 of 7."
    page.keyboard.press("Escape")
    assert not page.is_visible("#book")


def test_a_page_is_edited_drawn_again_and_its_pictures_compared(page: Any) -> None:
    tell(page)
    wait_until_finished(page)
    first = page.get_attribute(".page img", "src")
    page.click("button[aria-label='Draw page 1 again']")
    page.wait_for_selector(".variants button:nth-child(2)[aria-pressed=true]")
    assert page.get_attribute(".page img", "src") != first
    page.click("button[aria-label='Settings of page 1']")
    page.fill(".again input[name=seed]", "5")
    page.keyboard.press("Enter")
    page.wait_for_selector(".variants button:nth-child(3)[aria-pressed=true][title^='seed 5, ']")
    page.click(".variants button:nth-child(1)")
    page.wait_for_selector(".variants button:nth-child(1)[aria-pressed=true]")
    page.click("button[aria-label='Edit page 2']")
    page.fill(".page:nth-of-type(2) textarea", "A dragon comes.")
    page.click(".page:nth-of-type(2) .change .main")
    until(page, "document.querySelectorAll('.page .text')[1].textContent === 'A dragon comes.'")


def test_pages_are_drawn_again_one_after_the_other_when_the_story_is_finished(page: Any) -> None:
    tell(page, pages=4)
    page.click("button[aria-label='Draw page 1 again']")
    page.click("button[aria-label='Draw page 2 again']")
    assert not page.is_visible("#after")
    for number in (1, 2):
        page.wait_for_selector(f".page:nth-of-type({number}) .variants button:nth-child(2)[aria-pressed=true]")
    assert "error" not in (page.get_attribute("#status", "class") or "")


def test_a_page_without_a_picture_is_drawn_with_one_click(page: Any, studio: Studio) -> None:
    studio.stop()
    studio.start(fails_on_page=1)
    tell(page, pages=1)
    wait_until_finished(page)
    assert "the decoder broke" in page.inner_text(".missing")
    studio.served.decoder.fails_on_page = None
    page.click("button[aria-label='Draw page 1 again']")
    until(page, "document.querySelector('figure > img').naturalWidth > 0")
    assert not page.is_visible(".missing")


def test_a_story_goes_on(page: Any) -> None:
    tell(page)
    wait_until_finished(page)
    page.click("#go-on")
    page.wait_for_selector(".page:nth-of-type(3) .tools:not([hidden])")
    wait_until_finished(page)
    assert texts(page) == [f"Page {n} of 7." for n in (1, 2, 3)]


def test_a_lost_server_is_waited_for_and_nothing_is_missed(page: Any, studio: Studio) -> None:
    tell(page, pages=6)
    until(page, "document.querySelectorAll('.page .tools:not([hidden])').length >= 2")
    studio.stop()
    until(page, "document.querySelector('#status').textContent.includes('connection is lost')")
    studio.start()
    wait_until_finished(page)
    assert texts(page) == [f"Page {n} of 7." for n in range(1, 7)]


def test_a_session_that_ends_during_a_story_asks_for_the_key_and_goes_on(page: Any, studio: Studio) -> None:
    if not studio.key:
        pytest.skip("no key is asked for")
    tell(page, pages=6)
    until(page, "document.querySelectorAll('.page .tools:not([hidden])').length >= 2")
    page.click("button[aria-label='Draw page 1 again']")
    studio.stop()
    page.context.clear_cookies()
    studio.start()
    page.wait_for_selector("#login[open]")
    log_in(page, studio.key)
    wait_until_finished(page)
    assert texts(page) == [f"Page {n} of 7." for n in range(1, 7)]
    page.wait_for_selector(".page:nth-of-type(1) .variants button:nth-child(2)[aria-pressed=true]")


def test_what_fails_is_said_where_it_failed(page: Any, studio: Studio) -> None:
    studio.stop()
    studio.start(fails_on_page=2)
    tell(page, pages=3)
    wait_until_finished(page)
    assert "the decoder broke" in page.inner_text(".page:nth-of-type(2) .missing")
    page.fill("#prompt", "word " * 200)
    page.click("#begin")
    page.wait_for_selector("#status.error")
    assert "the window is 100" in page.inner_text("#status")


def test_earlier_stories_are_found_again(page: Any) -> None:
    tell(page, prompt="A fox")
    wait_until_finished(page)
    tell(page, prompt="An owl")
    until(page, "document.querySelector('#title').textContent === 'An owl'")
    wait_until_finished(page)
    page.click("#show-history")
    page.wait_for_selector("#stories li:nth-child(2)")
    page.click("#stories li:nth-child(2) .card")
    until(page, "document.querySelector('#title').textContent === 'A fox'")
    page.reload()
    until(page, "document.querySelector('#title').textContent === 'A fox'")


def test_a_story_is_stopped(page: Any) -> None:
    tell(page, pages=9)
    page.wait_for_selector(".page:nth-of-type(2)")
    page.click("#stop")
    until(page, "document.querySelector('#status').textContent === 'Stopped.'")
    assert 0 < len(texts(page)) < 9


def test_a_wrong_key_is_told_so_and_a_session_lasts(page: Any, studio: Studio) -> None:
    if not studio.key:
        pytest.skip("no key is asked for")
    page.context.clear_cookies()
    page.goto(f"{studio.url}/")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#login-error').textContent.includes('no key')")
    log_in(page, studio.key)
    page.reload()
    tell(page)
    wait_until_finished(page)


def count_pictures(page: Any) -> int:
    return page.evaluate("[...document.querySelectorAll('.page img')].filter(e => e.naturalWidth).length")


@pytest.mark.parametrize("studio", ["open", "with keys", *PREFIXES], indirect=True)
def test_a_story_is_taken_home_and_shared(page: Any, studio: Studio) -> None:
    until(page, "document.querySelector('#examples img')?.naturalWidth > 0")
    tell(page)
    wait_until_finished(page)
    until(page, "document.querySelectorAll('.page img').length >= 2")
    assert count_pictures(page) >= 2
    page.reload()
    wait_until_finished(page)
    assert page.evaluate("location.href").startswith(f"{studio.url}/#story_")
    assert count_pictures(page) >= 2
    for name, start in (("epub", b"PK"), ("pdf", b"%PDF")):
        with page.expect_download() as download:
            page.click(f"#as-{name}")
        assert download.value.suggested_filename.endswith(f".{name}")
        assert Path(download.value.path()).read_bytes().startswith(start)
    html = page.request.get(page.evaluate("document.querySelector('#as-html').href"))
    assert html.ok and "Page 2 of 7." in html.text()


NARROW = "document.documentElement.scrollWidth > innerWidth"
UNNAMED = """[...document.querySelectorAll('button, input, textarea, select, summary')].filter(e => e.offsetParent
    && !(e.innerText || e.getAttribute('aria-label') || e.labels?.length)).map(e => e.outerHTML)"""
SMALL = """[...document.querySelectorAll('button, input, textarea, select, summary, .brand, #after a')].filter(e => {
    const {width, height} = e.getBoundingClientRect(), isTyped = e.matches('input, textarea, select');
    return e.offsetParent && (Math.min(width, height) < 44 || isTyped && parseFloat(getComputedStyle(e).fontSize) < 16);
}).map(e => e.outerHTML)"""


def test_a_phone_shows_all_of_it_with_names_and_large_enough_to_hit(page: Any) -> None:
    def validate_screen() -> None:
        assert not page.evaluate(NARROW)
        assert page.evaluate(UNNAMED) == [] and page.evaluate(SMALL) == []

    page.set_viewport_size({"width": 360, "height": 740})
    page.wait_for_selector("#examples .card")
    page.click("#show-settings")
    validate_screen()
    tell(page, prompt="Donaudampfschifffahrtsgesellschaftskapitaensmuetzenabzeichen" * 2)
    wait_until_finished(page)
    page.click("button[aria-label='Settings of page 1']")
    page.click("button[aria-label='Edit page 2']")
    validate_screen()
    page.click("#show-history")
    page.wait_for_selector("#stories .card")
    validate_screen()


def test_it_needs_no_mouse(page: Any) -> None:
    def press(*keys: str) -> None:
        for key in keys:
            page.keyboard.press(key)

    def focused() -> str:
        return page.evaluate("(e => e.id || e.getAttribute('aria-label') || e.className)(document.activeElement)")

    page.wait_for_selector("#examples .card")
    until(page, "document.activeElement.id === 'prompt'")
    page.keyboard.type("A fox")
    press("Shift+Enter")
    page.keyboard.type("and a bear")
    assert page.input_value("#prompt") == "A fox\nand a bear" and not page.is_visible("#story")
    press("Enter")
    wait_until_finished(page)
    page.focus("#show-history")
    press("Enter")
    page.wait_for_selector("#stories .card")
    press("Escape")
    assert not page.is_visible("#history") and focused() == "show-history"
    page.focus("button[aria-label='Draw page 1 again']")
    press("Tab")
    assert focused() == "Settings of page 1"
    press("Enter")
    assert page.is_visible(".again") and page.evaluate("document.activeElement.name") == "seed"
    press("Escape")
    assert not page.is_visible(".again") and focused() == "Settings of page 1"
    press("Shift+Tab", "Enter")
    page.wait_for_selector(".variants button:nth-child(2)[aria-pressed=true]")
    until(page, "document.activeElement.className === 'redraw'")
    page.focus("#begin")
    press("Space")
    until(page, "document.activeElement.id === 'stop'")
    press("Space")
    until(page, "document.querySelector('#status').textContent === 'Stopped.'")
    assert focused() == "begin"


def test_the_skip_link_reaches_the_story(page: Any) -> None:
    tell(page)
    wait_until_finished(page)
    address = page.url
    page.focus("#skip")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "story" and page.url == address
