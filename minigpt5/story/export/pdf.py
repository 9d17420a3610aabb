"""Story -> PDF book: a title page, then a square sheet for each page, its picture above its text. No torch here."""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime

from minigpt5.story.export.epub import describe_picture, title_of
from minigpt5.story.export.language import language_of
from minigpt5.story.export.typesetting import NO_GLYPH, ShapedPDF, Typesetter
from minigpt5.types import Page, Story

SIDE_MM, MARGIN_MM, PICTURE_MM = 210.0, 20.0, 115.0
BOTTOM_MM, GAP_MM = 180.0, 8.0
"""Text ends above the one; the other is between a picture, its text and the foot of the sheet."""
TITLE_PT, TEXT_PT, NOTE_PT, FOOT_PT = 24, 16, 10, 9
INK, FAINT = (46, 42, 37), (138, 129, 120)
MAX_NAMED = 12
"""Characters without a typeface that the book names; it counts the others."""
_NO_TEXT = re.compile(r"[\x00-\x1f\ud800-\udfff]")


def to_pdf(story: Story, *, modified: datetime | None = None) -> bytes:
    """The book as one file, tagged: pictures carry their page's text as description. `modified` (default: now) is the
    only thing in it that is not the story's. The title page names the characters that no typeface has. Raises
    BaseModelNotFound where the typefaces' packages are not installed."""
    book = _Book(story)
    book.pdf.set_creation_date((modified or datetime.now(UTC)).astimezone(UTC))
    book.draw_title()
    for page in story.pages:
        book.draw(page)
    return book.pdf.finish()


class _Book:
    """A PDF in the making: what its sheets have in common."""

    def __init__(self, story: Story) -> None:
        self.story = story
        self.title = title_of(story)
        self.pdf = ShapedPDF(format=(SIDE_MM, SIDE_MM))
        self.pdf.set_margins(MARGIN_MM, MARGIN_MM)
        self.pdf.set_auto_page_break(False)
        self.pdf.set_title(_NO_TEXT.sub(" ", self.title))
        self.pdf.set_author(story.model)
        language = language_of(story)
        self.pdf.set_lang(language)
        texts = [self.title, story.model, *(text for page in story.pages for text in (page.text, page.error or ""))]
        self.typesetter = Typesetter(self.pdf, "\n".join(texts), language=language)

    def draw_title(self) -> None:
        foot = f"{self.story.model}, seed {self.story.seed}"
        self._start(f"{foot}\n{self._missing()}")
        self._write(self.title, foot=foot, top_mm=SIDE_MM * 0.38, size_pt=TITLE_PT)

    def draw(self, page: Page) -> None:
        foot, top_mm = str(page.index), MARGIN_MM
        self._start(foot)
        if page.picture:
            self.pdf.image(
                io.BytesIO(page.picture.png),
                x=(SIDE_MM - PICTURE_MM) / 2,
                y=MARGIN_MM,
                w=PICTURE_MM,
                h=PICTURE_MM,
                keep_aspect_ratio=True,
                alt_text=_NO_TEXT.sub("?", describe_picture(page)),
            )
            top_mm += PICTURE_MM + GAP_MM
        elif page.error:
            top_mm = self._write(f"(no picture: {page.error})", foot=foot, top_mm=top_mm, size_pt=NOTE_PT) + GAP_MM
        self._write(page.text, foot=foot, top_mm=top_mm, size_pt=TEXT_PT)

    def _start(self, foot: str) -> None:
        """Start a sheet with these lines at its foot."""
        self.pdf.add_page()
        self.pdf.set_text_color(*FAINT)
        self.typesetter.write(foot, top_mm=BOTTOM_MM + GAP_MM, room_mm=MARGIN_MM - GAP_MM, size_pt=FOOT_PT)
        self.pdf.set_text_color(*INK)

    def _write(self, text: str, *, foot: str, top_mm: float, size_pt: float) -> float:
        """Write text from `top_mm` on, onto further sheets too; returns where it ends."""

        def next_sheet() -> tuple[float, float]:
            self._start(foot)
            return MARGIN_MM, BOTTOM_MM - MARGIN_MM

        room_mm = BOTTOM_MM - top_mm
        return self.typesetter.write(text, top_mm=top_mm, room_mm=room_mm, size_pt=size_pt, next_sheet=next_sheet)

    def _missing(self) -> str:
        missing = self.typesetter.missing
        if not missing:
            return ""
        named = ", ".join(f"U+{ord(letter):04X}" for letter in missing[:MAX_NAMED])
        others = f" and {len(missing) - MAX_NAMED} others" if len(missing) > MAX_NAMED else ""
        return f"{NO_GLYPH} stands for characters that no typeface here has: {named}{others}"
