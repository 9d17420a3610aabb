"""PDF books: they open, have their text, their pictures and what stands for them."""

from __future__ import annotations

import io
from datetime import UTC, datetime

from pypdf import PdfReader

from minigpt5.story.export.pdf import to_pdf
from minigpt5.types import Page, Picture, Story, Usage
from tests.helpers.fakes import make_png


def picture(page: int) -> Picture:
    return Picture(page=page, png=make_png(size=(64, 64)), width=64, height=64, seed=1, denoise_steps=1)


def story(*pages: Page, prompt: str = "A fox & a <balloon>") -> Story:
    usage = Usage(prompt_tokens=0, completion_tokens=0)
    return Story(id="story_1", prompt=prompt, seed=7, model="storybook", pages=pages, usage=usage)


def read(book: bytes) -> PdfReader:
    return PdfReader(io.BytesIO(book), strict=True)


def test_a_book_has_its_pages_texts_and_pictures() -> None:
    pages = (
        Page(index=1, text="The fox walked far.", picture=picture(1)),
        Page(index=2, text="Füchse schlafen – “nachts”.", error="no ink"),
    )
    reader = read(to_pdf(story(*pages)))
    assert len(reader.pages) == 3
    assert reader.metadata and reader.metadata.title == "A fox & a <balloon>"
    texts = [page.extract_text() for page in reader.pages]
    assert "A fox & a <balloon>" in texts[0] and "seed 7" in texts[0]
    assert "The fox walked far." in texts[1]
    assert "Füchse schlafen – “nachts”." in texts[2] and "no ink" in texts[2]
    assert [len(page.images) for page in reader.pages] == [0, 1, 0]


def test_a_picture_is_described() -> None:
    book = to_pdf(story(Page(index=1, text="The fox walked far.", picture=picture(1))))
    root = read(book).trailer["/Root"]
    assert root["/Lang"] == "en"
    [figure] = [kid.get_object() for kid in root["/StructTreeRoot"]["/K"][0].get_object()["/K"]]
    assert figure["/Alt"] == "Picture of page 1: The fox walked far."


def test_long_and_strange_texts_fit() -> None:
    words = " ".join(["long"] * 900)
    for text in (words, "x" * 3000, "狐と風船", "\x00\x07a\ud800b", ""):
        reader = read(to_pdf(story(Page(index=1, text=text, picture=picture(1)), prompt=text)))
        assert len(reader.pages) == 2
    assert "???" in read(to_pdf(story(Page(index=1, text="狐と風船")))).pages[1].extract_text()


def test_only_the_moment_is_not_the_storys() -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    pages = [Page(index=1, text="The fox.", picture=picture(1))]
    assert to_pdf(story(*pages), modified=moment) == to_pdf(story(*pages), modified=moment)
