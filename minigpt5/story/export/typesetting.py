"""Text of any script on the sheets of a PDF: typefaces, lines, and the order of right-to-left text. No torch here.

fpdf2 shapes and embeds the letters. This module breaks the lines (UAX 14), puts the runs of a line into their visual
order (UAX 9) and chooses their typefaces before fpdf2 gets them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import regex
from fpdf import FPDF
from fpdf.bidi import BidiParagraph, auto_detect_base_direction
from fpdf.enums import TextDirection
from fpdf.fonts import TTFFont
from fpdf.line_break import Fragment

from minigpt5.story.export.typefaces import Typeface, choose_typefaces, is_invisible

LEAST_PT = 7
LINE_MM = 0.55
"""Height of a line for each point of its letters."""
NO_GLYPH = "\ufffd"
"""Stands for a character that no typeface has."""
_NO_LETTER = "\u2060"
"""A word joiner. It has no width, and no reader shows it."""
_MEASURED_PT = 100
"""Size at which widths are measured. They grow with the size."""
_OTHER_WEIGHTS = {"fvar", "gvar", "avar", "HVAR", "MVAR", "STAT"}
"""Tables of a variable font that a book has no use for: the font's outlines are those of its regular weight."""


def _classes(names: str) -> str:
    """Make the members of a set, for a regular expression, from the names of Unicode's classes of line breaking."""
    return "".join(rf"\p{{lb={name}}}" for name in names.split())


_WIDE = _classes("ID CJ NS CL EB EM")
_NOT_FIRST = _classes("SP ZW CL CP EX IS SY NS CJ BA HY GL WJ ZWJ CM QU IN PO EM")
_NOT_LAST = _classes("SP OP QU GL WJ ZWJ PR")
_BREAK = regex.compile(
    f"(?<=[{_classes('SP ZW')}])(?=[^{_classes('SP ZW CL CP EX SY')}])"
    f"|(?<=[{_classes('BA HY B2')}])(?=\\p{{L}})"
    f"|(?<=[{_WIDE}])(?=[^{_NOT_FIRST}])"
    f"|(?<=[^{_NOT_LAST}])(?=[{_classes('ID EB')}])",
    regex.V1,
)
"""Where a line may end: after spaces and hyphens, and beside a Chinese character or kana, but not before a closing mark
or after an opening one. Hangul breaks at spaces. These are the rules of UAX 14 that prose needs."""
_CLUSTER = regex.compile(r"\X")


class ShapedPDF(FPDF):
    """A PDF whose text comes in runs of one direction and one typeface."""

    def _parse_chars(
        self, text: str, markdown: bool, *, _initial_emphasis: tuple[bool, bool, bool, bool] | None = None
    ) -> Iterator[Fragment]:
        # fpdf2 would cut a run at each vowel mark of Arabic, for Unicode counts these to no script. A mark that is
        # shaped without its letter lies beside it.
        yield Fragment(text, self._get_current_graphics_state(), self.k)

    def finish(self) -> bytes:
        """Make the file. Each glyph says what it stands for when text is copied or searched: one of several that make
        up a letter says nothing, where a reader would otherwise take its number for a letter."""
        for font in self.fonts.values():
            for glyph, _ in cast(TTFFont, font).subset.items():
                if glyph is not None and glyph.unicode == ():
                    glyph.unicode = (ord(_NO_LETTER),)
        return bytes(self.output())


@dataclass(frozen=True)
class _Piece:
    """A part of a paragraph between two places where a line may end."""

    text: str
    width: float
    """Millimetres for each point of size, without the spaces at the end."""
    space: float
    """Millimetres for each point of size of the spaces at the end."""


@dataclass(frozen=True)
class _Paragraph:
    typeface: Typeface
    """Has most of its characters. The others come from other typefaces."""
    direction: TextDirection
    pieces: tuple[_Piece, ...]


@dataclass(frozen=True)
class _Run:
    start: int
    """Place in the line of its first character."""
    text: str
    direction: TextDirection
    typeface: Typeface


class Typesetter:
    """Writes text onto the sheets of a PDF, with the typefaces that the book's whole `text` needs.

    `language` (BCP 47) chooses among the forms that Chinese characters have.
    """

    def __init__(self, pdf: ShapedPDF, text: str, *, language: str) -> None:
        self._pdf = pdf
        self._typefaces, self.missing = choose_typefaces("".join(_paragraphs(text)), language=language)
        """`missing`: characters of the text that no typeface has. NO_GLYPH stands for them."""
        self._shown = str.maketrans(dict.fromkeys(self.missing, NO_GLYPH))
        self._widths: dict[tuple[str, Typeface], float] = {}
        for typeface in self._typefaces:
            pdf.add_font(typeface.name, fname=typeface.path, collection_font_number=typeface.number)
            tables = cast(TTFFont, pdf.fonts[typeface.name]).ttfont
            tables.recalcBBoxes = False  # takes longer than all the rest, and nothing reads the result
            for tag in _OTHER_WEIGHTS & set(tables.keys()):
                del tables[tag]
        pdf.c_margin = 0  # what a cell would keep free at its sides

    def write(
        self,
        text: str,
        *,
        top_mm: float,
        room_mm: float,
        size_pt: float,
        next_sheet: Callable[[], tuple[float, float]] | None = None,
    ) -> float:
        """Write paragraphs in the middle of the sheet, as large as there is room for, at most `size_pt`; returns where
        they end, in millimetres from the top.

        Lines that do not fit at LEAST_PT go to further sheets: `next_sheet` starts one and returns its top and room.
        Without it they are left out.
        """
        paragraphs = [self._measure(line) for line in _paragraphs(text)]
        while True:
            lines = [(one, line) for one in paragraphs for line in self._lines(one, size_pt)]
            if len(lines) * size_pt * LINE_MM <= room_mm or size_pt <= LEAST_PT:
                break
            size_pt -= 1
        height_mm = size_pt * LINE_MM
        num_left = int(room_mm / height_mm)
        for paragraph, line in lines:
            if num_left <= 0:
                if next_sheet is None:
                    break
                top_mm, room_mm = next_sheet()
                num_left = int(room_mm / height_mm)
            self._draw(paragraph, line, top_mm=top_mm, size_pt=size_pt)
            top_mm += height_mm
            num_left -= 1
        return top_mm

    def _measure(self, text: str) -> _Paragraph:
        text = text.translate(self._shown)
        typeface = max(self._typefaces, key=lambda one: sum(ord(letter) in one.characters for letter in text))
        pieces = tuple(self._piece(part, typeface) for part in _BREAK.split(text) if part)
        return _Paragraph(typeface=typeface, direction=auto_detect_base_direction(text), pieces=pieces)

    def _piece(self, text: str, typeface: Typeface) -> _Piece:
        words = text.rstrip()
        return _Piece(text, self._width(words, typeface), self._width(text[len(words) :], typeface))

    def _width(self, text: str, typeface: Typeface) -> float:
        key = (text, typeface)
        if key not in self._widths:
            self._widths[key] = sum(map(self._run_width, self._runs(text, TextDirection.LTR, typeface)))
        return self._widths[key]

    def _run_width(self, run: _Run) -> float:
        self._pdf.set_text_shaping(True, direction=run.direction)
        self._pdf.set_font(run.typeface.name, size=_MEASURED_PT)
        return self._pdf.get_string_width(run.text) / _MEASURED_PT

    def _runs(self, line: str, base: TextDirection, typeface: Typeface) -> Iterator[_Run]:
        """Split a line into runs from left to right. The letters of each are in the order of reading."""
        characters = BidiParagraph(line, base, preserve_bn_chars=True).get_reordered_characters() if line else ()
        for level, group in groupby(characters, key=lambda one: one.embedding_level):
            letters = sorted(group, key=lambda one: one.character_index)
            direction = TextDirection.RTL if level % 2 else TextDirection.LTR
            start, runs = letters[0].character_index, []
            for text, face in self._parts("".join(one.character for one in letters), typeface):
                runs.append(_Run(start, text, direction, face))
                start += len(text)
            yield from reversed(runs) if level % 2 else runs

    def _parts(self, text: str, typeface: Typeface) -> list[tuple[str, Typeface]]:
        """Split text into the longest parts that one typeface has: `typeface`, or else another."""
        parts = [("", typeface)]
        for cluster in _CLUSTER.findall(text):
            face = self._find(cluster, parts[-1][1], typeface)
            for letter in (cluster,) if face else cluster:
                last, last_face = parts[-1]
                face = self._find(letter, last_face, typeface) or typeface
                parts[-1:] = [(last + letter, face)] if face == last_face else [(last, last_face), (letter, face)]
        return [part for part in parts if part[0]]

    def _find(self, letters: str, last: Typeface, typeface: Typeface) -> Typeface | None:
        """Find what has all of these letters. Spaces and the like stay with the last one."""
        points = {ord(letter) for letter in letters if not is_invisible(letter)}
        candidates = (typeface, *self._typefaces) if points else (last,)
        return next((one for one in candidates if points <= one.characters), None)

    def _lines(self, paragraph: _Paragraph, size_pt: float) -> Iterator[str]:
        """Put as many pieces on each line as it has room for. A piece longer than a line breaks anywhere between two
        characters as readers see them."""
        room = self._pdf.epw / size_pt
        line, width = "", 0.0
        for piece in paragraph.pieces:
            parts = [piece]
            if piece.width > room:
                parts = [self._piece(cluster, paragraph.typeface) for cluster in _CLUSTER.findall(piece.text)]
            for part in parts:
                if line and width + part.width > room:
                    yield line
                    line, width = "", 0.0
                line += part.text
                width += part.width + part.space
        yield line

    def _draw(self, paragraph: _Paragraph, line: str, *, top_mm: float, size_pt: float) -> None:
        line = line.rstrip()
        runs = list(self._runs(line, paragraph.direction, paragraph.typeface))
        widths_mm = [self._run_width(run) * size_pt for run in runs]
        left_mm = self._pdf.l_margin + (self._pdf.epw - sum(widths_mm)) / 2
        lefts_mm = [left_mm + sum(widths_mm[:number]) for number in range(len(runs))]
        # In the file they are in the order of reading: for screen readers, and for what takes the text out of a PDF.
        for run, left_mm in sorted(zip(runs, lefts_mm, strict=True), key=lambda placed: placed[0].start):
            self._pdf.set_text_shaping(True, direction=run.direction)
            self._pdf.set_font(run.typeface.name, size=size_pt)
            self._pdf.set_xy(left_mm, top_mm)
            self._pdf.cell(self._pdf.epw, size_pt * LINE_MM, run.text)


def _paragraphs(text: str) -> list[str]:
    """Split text at its line ends, and leave out what is no text: control characters, halves of surrogate pairs, and
    blank lines beyond the first."""
    lines = unicodedata.normalize("NFC", text.replace("\t", " ")).splitlines()
    kept = ["".join(letter for letter in line if unicodedata.category(letter) not in ("Cc", "Cs")) for line in lines]
    return [line for line, before in zip(kept, ["", *kept], strict=False) if line.strip() or before.strip()]
