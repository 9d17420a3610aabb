"""Story -> PDF book: a title page, then a square sheet for each page, its picture above its text. No torch here."""

from __future__ import annotations

import importlib.util
import io
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from fpdf import FPDF
from fpdf.enums import MethodReturnValue
from fpdf.fonts import TTFFont

from minigpt5.errors import BaseModelNotFound
from minigpt5.story.export.epub import describe_picture
from minigpt5.types import Page, Story

SIDE_MM, MARGIN_MM, PICTURE_MM = 210.0, 20.0, 115.0
TEXT_PT, LEAST_PT = 16, 7
LINE_MM = 0.55
"""Height of a line for each point of its letters."""
_NO_TEXT = re.compile(r"[\x00-\x1f\ud800-\udfff]")
INK, FAINT = (46, 42, 37), (138, 129, 120)


def to_pdf(story: Story, *, modified: datetime | None = None) -> bytes:
    """The book as one file, tagged: pictures carry their page's text as description. `modified` (default: now) is the
    only thing in it that is not the story's. Characters that the typeface lacks become "?". Raises BaseModelNotFound
    where the typeface's package is not installed."""
    pdf = FPDF(format=(SIDE_MM, SIDE_MM))
    pdf.set_creation_date((modified or datetime.now(UTC)).astimezone(UTC))
    pdf.set_margins(MARGIN_MM, MARGIN_MM)
    pdf.set_auto_page_break(False)
    pdf.add_font("Roboto", fname=_typeface())
    known = set(cast(TTFFont, pdf.fonts["roboto"]).cmap)
    title = _printable(story.prompt, known) or "A story"
    pdf.set_title(title)
    pdf.set_lang("en")
    pdf.set_author(story.model)
    pdf.add_page()
    _write(pdf, title, top_mm=SIDE_MM * 0.38, room_mm=SIDE_MM * 0.4, size_pt=24)
    pdf.set_y(SIDE_MM - MARGIN_MM)
    pdf.set_font("Roboto", size=9)
    pdf.set_text_color(*FAINT)
    pdf.cell(0, 5, _printable(f"{story.model}, seed {story.seed}", known), align="C")
    for page in story.pages:
        pdf.add_page()
        _draw(pdf, page, known)
    return bytes(pdf.output())


def _draw(pdf: FPDF, page: Page, known: set[int]) -> None:
    top_mm = MARGIN_MM
    if page.picture:
        pdf.image(
            io.BytesIO(page.picture.png),
            x=(SIDE_MM - PICTURE_MM) / 2,
            y=MARGIN_MM,
            w=PICTURE_MM,
            h=PICTURE_MM,
            keep_aspect_ratio=True,
            alt_text=_NO_TEXT.sub("?", describe_picture(page)),
        )
        top_mm += PICTURE_MM + 8
    elif page.error:
        _write(pdf, _printable(f"(no picture: {page.error})", known), top_mm=MARGIN_MM, room_mm=30, size_pt=10)
        top_mm += 32
    _write(pdf, _printable(page.text, known), top_mm=top_mm, room_mm=SIDE_MM - MARGIN_MM - 10 - top_mm, size_pt=TEXT_PT)
    pdf.set_y(SIDE_MM - MARGIN_MM)
    pdf.set_font("Roboto", size=9)
    pdf.set_text_color(*FAINT)
    pdf.cell(0, 5, str(page.index), align="C")


def _write(pdf: FPDF, text: str, *, top_mm: float, room_mm: float, size_pt: float) -> None:
    """A paragraph in the middle, as large as there is room for."""
    pdf.set_text_color(*INK)
    pdf.set_xy(MARGIN_MM, top_mm)
    while True:
        pdf.set_font("Roboto", size=size_pt)
        height_mm = pdf.multi_cell(0, size_pt * LINE_MM, text, align="C", dry_run=True, output=MethodReturnValue.HEIGHT)
        if cast(float, height_mm) <= room_mm or size_pt <= LEAST_PT:
            break
        size_pt -= 1
    pdf.multi_cell(0, size_pt * LINE_MM, text, align="C")


def _printable(text: str, known: set[int]) -> str:
    return "".join(letter if ord(letter) in known or letter == "\n" else "?" for letter in text)


def _typeface() -> Path:
    spec = importlib.util.find_spec("font_roboto")
    if spec is None or not spec.submodule_search_locations:
        raise BaseModelNotFound("the typeface of PDF books is not installed: run make install (font-roboto==0.0.1)")
    return Path(spec.submodule_search_locations[0]) / "files" / "Roboto-Regular.ttf"
