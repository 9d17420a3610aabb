"""A story as an HTML storybook: nothing that a story says becomes markup, and nothing is fetched."""

from __future__ import annotations

import base64
import os
import re
import resource
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minigpt5.errors import StorageError
from minigpt5.story.export.book_file import check_place
from minigpt5.story.export.html import save, to_html, to_html_fragment
from minigpt5.types import Page, Picture, Story, Usage

PNG = b"\x89PNG\r\n\x1a\n and its pixels"
HOSTILE = '</article><script>alert("x")</script><img src=x onerror=alert(1)> & "quoted" \'single\''


def make_story(*pages: Page, prompt: str = "A fox who finds a balloon") -> Story:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    return Story(id="story_1", prompt=prompt, seed=7, model="storybook", pages=pages, usage=usage)


def drawn(index: int, text: str) -> Page:
    picture = Picture(page=index, png=PNG, width=128, height=128, seed=1, denoise_steps=20)
    return Page(index=index, text=text, picture=picture)


class Reader(HTMLParser):
    """The tags of a document with their attributes, and its text outside of styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    failed = Page(index=2, text=HOSTILE, error=HOSTILE)
    path = save(make_story(drawn(1, HOSTILE), failed, prompt=HOSTILE), str(tmp_path / "story.html"))
    reader = Reader(Path(path).read_text())
    assert [tag for tag, _ in reader.tags].count("img") == 1
    assert "script" not in [tag for tag, _ in reader.tags]
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]
    assert reader.text.count(HOSTILE) == 5  # title, heading, two pages, an error


def test_pictures_are_in_the_file_and_nothing_is_fetched(tmp_path: Path) -> None:
    path = save(make_story(drawn(1, "The fox walks."), drawn(2, "It flies.")), str(tmp_path / "story.html"))
    reader = Reader(Path(path).read_text())
    sources = [attributes["src"] for tag, attributes in reader.tags if tag == "img"]
    assert sources == [f"data:image/png;base64,{base64.b64encode(PNG).decode()}"] * 2
    assert not [name for _, attributes in reader.tags for name in attributes if name == "href"]
    assert "url(" not in Path(path).read_text()


def test_a_failed_picture_keeps_its_page_and_says_why() -> None:
    html = to_html_fragment(make_story(drawn(1, "One."), Page(index=2, text="Two.", error="out of memory")))
    assert "Two." in html
    assert "out of memory" in html


def test_text_of_any_language_survives(tmp_path: Path) -> None:
    text = "\u72d0\u72f8 \u0644\u064a\u0644 \U0001f98a"
    path = save(make_story(drawn(1, text)), str(tmp_path / "story.html"))
    assert text in Path(path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "language"), [("The fox and the owl.", "en"), ("狐は風船を見つけました。", "ja"), ("השועל מצא בלון", "he")]
)
def test_each_text_has_its_own_direction_and_the_book_its_language(text: str, language: str) -> None:
    failed = Page(index=2, text=text, error=text)
    reader = Reader(to_html(make_story(drawn(1, text), failed, prompt=text)))
    tags = {tag: attributes for tag, attributes in reader.tags}
    assert tags["html"]["lang"] == tags["article"]["lang"] == language
    texts = [attributes for tag, attributes in reader.tags if tag == "h1" or attributes.get("class") == "text"]
    assert [attributes["dir"] for attributes in texts] == ["auto"] * 3
    assert "bdi" in tags  # the reason of a missing picture stands in an English sentence


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_a_story_without_words_has_a_title(prompt: str) -> None:
    html = to_html(make_story(prompt=prompt))
    assert "<title>A story</title>" in html and '<h1 dir="auto">A story</h1>' in html


def test_a_notebook_shows_the_same_story() -> None:
    story = make_story(drawn(1, "One."))
    assert story._repr_html_() == to_html_fragment(story)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no folder .*nowhere"):
        save(make_story(), str(tmp_path / "nowhere" / "story.html"))


@pytest.mark.parametrize("name", ["", ".", "..", "books", "x.txt", "story.docx", "story"])
def test_a_name_that_is_no_books_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    with pytest.raises(StorageError, match=f"^'{re.escape(name)}' must end in one of .html, .epub, .pdf"):
        save(make_story(drawn(1, "One.")), name)
    assert [path.name for path in tmp_path.iterdir()] == ["books"]


def test_the_longest_name_can_be_written_and_a_longer_one_is_refused_at_once(tmp_path: Path) -> None:
    longest = "x" * 250 + ".html"
    assert Path(save(make_story(drawn(1, "One.")), str(tmp_path / longest))).read_text().startswith("<!doctype")
    with pytest.raises(StorageError, match="File name too long"):
        check_place(tmp_path / f"x{longest}")
    assert [path.name for path in tmp_path.iterdir()] == [longest]


def test_a_full_disk_keeps_the_earlier_book(tmp_path: Path) -> None:
    path = tmp_path / "story.html"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # the kernel refuses to write on, as on a full disk
    try:
        with pytest.raises(StorageError, match="cannot be written .File too large"):
            save(make_story(drawn(1, "New.")), str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("story.html", "old")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match=f"folder {tmp_path} is read-only"):
        check_place(tmp_path / "story.html")
    tmp_path.chmod(0o700)


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "story.html").mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        save(make_story(drawn(1, "One.")), str(tmp_path / "story.html"))
    assert [path.name for path in tmp_path.iterdir()] == ["story.html"]


def test_the_name_of_a_file_says_what_it_is(tmp_path: Path) -> None:
    path = make_story(drawn(1, "One.")).save(str(tmp_path / "story.epub"))
    assert Path(path).read_bytes().startswith(b"PK")


def test_an_old_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "story.html"
    path.write_text("old")
    make_story(drawn(1, "New.")).save(str(path))
    assert "New." in path.read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["story.html"]
