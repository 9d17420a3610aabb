"""A story as an EPUB book: what readers need of the container, and that no text breaks it."""

from __future__ import annotations

import io
import shutil
import subprocess
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from minigpt5.story.export.epub import MIMETYPE, describe_picture, to_epub
from minigpt5.types import Page, Picture, Story, Usage

HOSTILE = '</p><script>alert("x")</script> & \x00\x0b\ud800 "quoted" ]]> \U0001f98a'
NAMESPACES = {"opf": "http://www.idpf.org/2007/opf", "x": "http://www.w3.org/1999/xhtml"}
XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
MODIFIED = datetime(2026, 1, 2, 3, 4, 6, tzinfo=UTC)


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (128, 128), "teal").save(file, "PNG")
    return file.getvalue()


def make_blank_story() -> Story:
    """Of pictures alone, whose first page failed."""
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    return Story(id="story_1", prompt=" \x00\n", seed=7, model="storybook", pages=(), usage=usage)


def make_story() -> Story:
    picture = Picture(page=1, png=png(), width=128, height=128, seed=1, denoise_steps=20)
    pages = (
        Page(index=1, text="The fox walks.\n\nIt sees a balloon.", picture=picture),
        Page(index=2, text=HOSTILE, error=HOSTILE),
        Page(index=3, text="", picture=picture),
    )
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    return Story(id="story_1", prompt=HOSTILE, seed=7, model="storybook", pages=pages, usage=usage)


def test_mimetype_is_the_first_entry_stored_uncompressed() -> None:
    book = to_epub(make_story())
    first = zipfile.ZipFile(io.BytesIO(book)).infolist()[0]
    assert (first.filename, first.compress_type, first.extra) == ("mimetype", zipfile.ZIP_STORED, b"")
    # A zip entry's header is 30 bytes and its name: readers look for the type at byte 38.
    assert book[38 : 38 + len(MIMETYPE)] == MIMETYPE.encode()


def test_the_same_story_gives_the_same_bytes() -> None:
    assert to_epub(make_story(), modified=MODIFIED) == to_epub(make_story(), modified=MODIFIED)


def test_every_file_is_listed_and_every_listed_file_is_there() -> None:
    book = zipfile.ZipFile(io.BytesIO(to_epub(make_story())))
    container = ElementTree.fromstring(book.read("META-INF/container.xml"))
    assert [node.get("full-path") for node in container.iter() if node.tag.endswith("rootfile")] == ["EPUB/package.opf"]
    package = ElementTree.fromstring(book.read("EPUB/package.opf"))
    items = {node.get("id"): node for node in package.findall("opf:manifest/opf:item", NAMESPACES)}
    files = {f"EPUB/{node.get('href')}" for node in items.values()}
    assert files == set(book.namelist()) - {"mimetype", "META-INF/container.xml", "EPUB/package.opf"}
    spine = [node.get("idref") for node in package.findall("opf:spine/opf:itemref", NAMESPACES)]
    assert spine == ["nav", "page-1", "page-2", "page-3"] and set(spine) <= set(items)
    assert [name for name, node in items.items() if node.get("properties") == "cover-image"] == ["picture-1"]


def test_text_stays_text_and_pictures_say_what_they_show() -> None:
    book = zipfile.ZipFile(io.BytesIO(to_epub(make_story())))
    pages = [ElementTree.fromstring(book.read(f"EPUB/page-{n}.xhtml")) for n in (1, 2, 3)]
    texts = [page.find(".//x:p[@class='text']", NAMESPACES) for page in pages]
    assert [text.text for text in texts if text is not None] == [
        "The fox walks.\n\nIt sees a balloon.",
        '</p><script>alert("x")</script> &  "quoted" ]]> \U0001f98a',  # without what XML cannot hold
        None,
    ]
    assert not [node for page in pages for node in page.iter() if node.tag.endswith("script")]
    alts = [node.get("alt") for page in pages for node in page.iter() if node.tag.endswith("img")]
    assert alts == ["Picture of page 1: The fox walks. It sees a balloon.", "Picture of page 3"]
    assert book.read("EPUB/picture-1.png") == png()


def test_a_story_without_words_and_pages_has_a_title_and_contents() -> None:
    book = zipfile.ZipFile(io.BytesIO(to_epub(make_blank_story())))
    package = ElementTree.fromstring(book.read("EPUB/package.opf"))
    assert [node.text for node in package.iter() if node.tag.endswith("}title")] == ["A story"]
    contents = ElementTree.fromstring(book.read("EPUB/nav.xhtml"))
    links = [(node.get("href"), node.text) for node in contents.findall(".//x:ol/x:li/x:a", NAMESPACES)]
    assert links == [("nav.xhtml", "This story has no pages")]
    assert [node.text for node in contents.iter() if node.tag.endswith(("}title", "}h1"))] == ["A story"] * 2


def test_a_long_text_is_a_short_description() -> None:
    words = describe_picture(Page(index=1, text="fox " * 200))
    assert words.endswith("fox ...") and len(words) < 300


def test_a_long_text_without_spaces_is_cut_too() -> None:
    words = describe_picture(Page(index=1, text="狐が走る。" * 200))
    assert words.startswith("Picture of page 1: 狐が走る。") and words.endswith(" ...") and len(words) < 300


@pytest.mark.parametrize(
    ("text", "language", "direction"),
    [
        ("The fox and the balloon.", "en", "ltr"),
        ("狐は風船を見つけました。", "ja", "ltr"),
        ("השועל מצא בלון", "he", "rtl"),
        ("وجد الثعلب بالونًا", "und-Arab", "rtl"),
    ],
)
def test_the_book_says_its_language_and_direction(text: str, language: str, direction: str) -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    pages = (Page(index=1, text=text),)
    story = Story(id="story_1", prompt=text, seed=7, model="storybook", pages=pages, usage=usage)
    book = zipfile.ZipFile(io.BytesIO(to_epub(story)))
    package = ElementTree.fromstring(book.read("EPUB/package.opf"))
    assert [node.text for node in package.iter() if node.tag.endswith("}language")] == [language]
    assert (package.get(XML_LANG), package.get("dir")) == (language, direction)
    spine = package.find("opf:spine", NAMESPACES)
    assert spine is not None and spine.get("page-progression-direction") == direction
    for name, place in (("nav", ".//x:h1"), ("page-1", ".//x:p[@class='text']")):
        document = ElementTree.fromstring(book.read(f"EPUB/{name}.xhtml"))
        assert (document.get("lang"), document.get(XML_LANG)) == (language, language)
        node = document.find(place, NAMESPACES)
        assert node is not None and node.get("dir") == "auto"
    assert b"bidi" not in book.read("EPUB/style.css")  # the standard leaves direction to attributes


@pytest.mark.skipif(not shutil.which("epubcheck"), reason="epubcheck is not installed")
@pytest.mark.parametrize("story", [make_story(), make_blank_story()], ids=["pages", "no pages"])
def test_epubcheck_accepts_the_book(tmp_path: Path, story: Story) -> None:
    path = tmp_path / "book.epub"
    path.write_bytes(to_epub(story))
    checker = Path(str(shutil.which("epubcheck")))
    is_jar = checker.read_bytes()[:2] == b"PK"  # Debian's is one that only some kernels run by itself
    command = ["java", "-jar", str(checker)] if is_jar else [str(checker)]
    checked = subprocess.run([*command, "--failonwarnings", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
