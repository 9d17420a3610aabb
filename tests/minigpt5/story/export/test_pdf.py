"""PDF books: they open, have their text in every script, their pictures and what stands for them."""

from __future__ import annotations

import io
import re
import unicodedata
from datetime import UTC, datetime

import pytest
from fontTools.ttLib import TTFont
from pypdf import PageObject, PdfReader

from minigpt5.errors import BaseModelNotFound
from minigpt5.story.export import typefaces
from minigpt5.story.export.pdf import to_pdf
from minigpt5.story.export.typesetting import NO_GLYPH
from minigpt5.types import Page, Picture, Story, Usage
from tests.helpers.fakes import make_png

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


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


SCRIPTS = {
    "chinese": ("NotoSansCJKSC", "从前有一只小狐狸，它在雪地里找到了一个红气球。"),
    "japanese": ("NotoSansCJKJP", "狐は雪の中で「赤い風船」を見つけ、balloonと呼びました。"),
    "korean": ("NotoSansCJKKR", "여우가 눈 속에서 빨간 풍선을 찾았어요. 狐"),
    "russian": ("NotoSans", "Лиса нашла в снегу красный шарик."),
    "greek": ("NotoSans", "Η αλεπού βρήκε ένα κόκκινο μπαλόνι."),
    "hebrew": ("NotoSansHebrew", "השועל מצא 3 בלונים אדומים (בשלג) ואמר hello world לינשוף."),
    "arabic": ("IBMPlexSansArabic", "وجد الثعلب 12 بالونا في الثلج ومشى إلى الغابة"),
    "thai": ("NotoSansThai", "สุนัขจิ้งจอกพบลูกโป่งสีแดง"),
    "emoji": ("NotoEmoji", "The fox 🦊 and the balloon 🎈"),
    "decomposed": ("NotoSans", "Der Fu\u0308chse Cafe\u0301"),
    "a mark that the letter's font lacks": ("NotoSansCJKSC", "狐\u0335, ש\u0308"),
    "joiners, selectors, fillers": ("NotoEmoji", "❤\ufe0f x\u034f\u3164\u200d\u00ady"),
    "hebrew and arabic in english": ("NotoSansHebrew", 'The fox said "שלום 3 חברים" and "مرحبا 12 صديق" to all.'),
}
"""A font that the text needs, and the text."""
UNSEEN = dict.fromkeys((0, 0xAD, 0x34F, 0x200D, 0x2060, 0x3164, 0xFE0F))
"""What pypdf adds, as it reads codes of two bytes as two letters, and what has no glyph."""


def letters(text: str) -> str:
    """The text without UNSEEN, and without spaces, which pypdf guesses."""
    return "".join(unicodedata.normalize("NFC", text).translate(UNSEEN).split())


def fonts(book: bytes) -> dict[str, TTFont | None]:
    """Names of the embedded fonts; what they hold where they are TrueType."""
    found: dict[str, TTFont | None] = {}
    for page in read(book).pages:
        for font in page["/Resources"]["/Font"].values():
            name = font["/BaseFont"].removeprefix("/MPDFAA+")
            data = font["/DescendantFonts"][0].get_object()["/FontDescriptor"].get("/FontFile2")
            found[name] = TTFont(io.BytesIO(data.get_object().get_data())) if data else None
    return found


def places(page: PageObject) -> list[tuple[str, float, float]]:
    """Pieces of text with the place of their left end, in points from the lower left."""
    found: list[tuple[str, float, float]] = []
    page.extract_text(visitor_text=lambda text, _, tm, *__: found.append((text.strip(), tm[4], tm[5])))
    return [place for place in found if place[0]]


@pytest.mark.parametrize(("font", "text"), SCRIPTS.values(), ids=SCRIPTS)
def test_text_of_every_script_is_there_in_the_order_of_reading(font: str, text: str) -> None:
    book = to_pdf(story(Page(index=1, text=text, picture=picture(1)), prompt=text))
    title, page = (letters(sheet.extract_text()) for sheet in read(book).pages)
    assert letters(text) in title and letters(text) in page
    assert "no typeface" not in title and NO_GLYPH not in page
    assert any(name.startswith(font) for name in fonts(book))
    assert len(book) < 40_000  # no whole font is in it


@pytest.mark.parametrize(
    ("text", "from_left"),
    [
        ("hello עולם שלום", ["hello", "עולם שלום"]),
        ("שלום hello עולם", ["עולם", "hello", "שלום"]),
        ("said שלום 3 חברים to", ["said", "חברים", "3", "שלום", "to"]),
        ("وجد 12 بالونا", ["بالونا", "12", "وجد"]),
    ],
)
def test_hebrew_arabic_and_numbers_stand_where_readers_expect_them(text: str, from_left: list[str]) -> None:
    [_, sheet] = read(to_pdf(story(Page(index=1, text=text)))).pages
    found = [words for words, _, y in sorted(places(sheet), key=lambda place: place[1]) if y > 100]
    assert found == from_left


def test_arabic_letters_join_and_their_vowel_marks_stay_with_them() -> None:
    book = to_pdf(story(Page(index=1, text="ثعلبُ 1")))
    font = fonts(book)["IBMPlexSansArabic"]
    assert font and {"uniFE9B", "uniFECC", "uniFEE0", "uniFE90"} <= set(font.getGlyphOrder())  # three forms
    content = read(book).pages[1].get_contents()
    assert content is not None
    moves = re.findall(rb"1 0 0 1 ([\d.]+) ([\d.]+) Tm", content.get_data())
    starts = re.findall(rb"BT ([\d.]+) ([\d.]+) Td", content.get_data())
    assert float(moves[0][0]) > float(starts[1][0]) + 5  # the mark is over its letter, not at the space beside it


def test_an_english_book_has_one_font_of_one_weight() -> None:
    book = to_pdf(story(Page(index=1, text="The fox walks.", picture=picture(1))))
    found = fonts(book)
    assert list(found) == ["NotoSans"] and found["NotoSans"]
    assert not {"gvar", "fvar"} & set(found["NotoSans"].keys())


def test_no_line_of_japanese_begins_with_a_closing_mark_or_ends_with_an_opening_one() -> None:
    [_, sheet] = read(to_pdf(story(Page(index=1, text="「きょう」は、「あめ」だ。っ！（ゆき）、" * 12)))).pages
    lines = [letters(line) for line in sheet.extract_text().split("\n")][1:]
    assert len(lines) > 4
    assert not [line for line in lines if line[0] in "」、。っょう！）" and line[0] not in "う"]
    assert not [line for line in lines if line[-1] in "「（"]


LONG = {
    "words": " ".join(f"word{number}" for number in range(1000)),
    "one word": "".join(chr(97 + number % 26) for number in range(6_000)),
    "chinese": "狐狸找到气球，" * 600,
    "arabic": "وجد الثعلب بالونا " * 600,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_long_text_goes_on_to_further_sheets_and_never_leaves_one(text: str) -> None:
    reader = read(to_pdf(story(Page(index=1, text=text, picture=picture(1)))))
    assert len(reader.pages) > 2
    assert letters(text) == "".join(letters(sheet.extract_text()).removeprefix("1") for sheet in reader.pages[1:])
    side = float(reader.pages[0].mediabox.width)
    found = [place for sheet in reader.pages for place in places(sheet)]
    assert all(0 < x < side and 0 < y < side for _, x, y in found)


def test_strange_texts_are_books() -> None:
    for text in ("\x00\x07a\ud800b", "", "\n" * 16_000, "\u202e\u2067a ש\u2069" * 50, "a" + "\u0301" * 3000, "\u200b"):
        assert len(read(to_pdf(story(Page(index=1, text=text, picture=picture(1)), prompt=text))).pages) == 2


def test_a_character_that_no_typeface_has_is_named_once() -> None:
    runes = "".join(chr(0x16A0 + number) for number in range(14))
    reader = read(to_pdf(story(Page(index=1, text=f"The fox {runes[:2]} walks."), Page(index=2, text=runes))))
    texts = [page.extract_text() for page in reader.pages]
    assert f"The fox {NO_GLYPH * 2} walks." in texts[1]
    assert f"{NO_GLYPH} stands for characters that no typeface here has: U+16A0, U+16A1, " in texts[0]
    assert texts[0].endswith("U+16AB and 2 others") or "U+16AB and 2 others\n" in texts[0]
    assert "U+16A0" not in texts[1] + texts[2]


def test_a_missing_package_of_typefaces_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typefaces.importlib.util, "find_spec", lambda name: None)
    typefaces._typefaces.cache_clear()
    with pytest.raises(BaseModelNotFound, match=r"run make install \(manimgx-fonts in requirements-weights.txt\)"):
        to_pdf(story())


def test_only_the_moment_is_not_the_storys() -> None:
    pages = [Page(index=1, text="The fox, 狐, שועל.", picture=picture(1))]
    assert to_pdf(story(*pages), modified=MOMENT) == to_pdf(story(*pages), modified=MOMENT)
