"""The typefaces of PDF books, which packages bring, and those of them that a text needs. No torch here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import regex
from fontTools.ttLib import TTFont

from minigpt5.errors import BaseModelNotFound

# In the order of looking: Noto Sans has Latin, Greek and Cyrillic, and each of its sisters a script of its own. Plex
# comes before Noto Sans Arabic, whose letters and dots are glyphs apart: nobody could search such text. The large
# collection of Chinese, Japanese and Korean letters comes last.
_SCRIPTS = (
    *("Arabic", "Devanagari", "Bengali", "Gurmukhi", "Gujarati", "Oriya", "Tamil", "Telugu", "Kannada", "Malayalam"),
    *("Sinhala", "Thai", "Lao", "Khmer", "Myanmar", "Ethiopic", "Georgian", "Armenian", "Symbols"),
)
_FILES = (
    *(("manimgx_fonts", f"NotoSans{script}[wght].ttf") for script in ("", "Hebrew")),
    ("fontpkg_ibm_plex_sans_arabic", "files/IBMPlexSansArabic-Regular.ttf"),
    *(("manimgx_fonts", f"NotoSans{script}[wght].ttf") for script in _SCRIPTS),
    ("manimgx_fonts", "NotoEmoji[wght].ttf"),
)
"""Package and file of each typeface of one face."""
_COLLECTION = ("noto_cjk_sans_otc", "NotoSansCJK-Regular.ttc")
_NUMBERS = {"ja": 0, "ko": 1}
"""Where in the collection the forms of a language are; 2 for any other: those of Chinese in its simplified script."""

_INVISIBLE = regex.compile(r"[\s\p{Default_Ignorable_Code_Point}]")


@dataclass(frozen=True)
class Typeface:
    path: Path
    number: int = 0
    """Its place in a file that is a collection."""

    @property
    def name(self) -> str:
        return self.path.name.partition("[")[0].lower()

    @cached_property
    def characters(self) -> frozenset[int]:
        """Code points that it has a glyph for."""
        with TTFont(self.path, fontNumber=self.number, lazy=True) as font:
            return frozenset(font.getBestCmap())


def choose_typefaces(characters: Iterable[str], *, language: str) -> tuple[tuple[Typeface, ...], str]:
    """Choose the typefaces that have these characters, Noto Sans first and always. Name the characters that none has.

    `language` (BCP 47) chooses among the forms that Chinese characters have. Raises BaseModelNotFound where a package
    of typefaces is not installed.
    """
    wanted = {ord(letter) for letter in characters if not is_invisible(letter)}
    chosen: list[Typeface] = []
    for typeface in _typefaces(_NUMBERS.get(language, 2)):
        if not chosen or wanted & typeface.characters:
            chosen.append(typeface)
            wanted -= typeface.characters
        if not wanted:
            break
    return tuple(chosen), "".join(map(chr, sorted(wanted)))


@cache
def _typefaces(number: int) -> tuple[Typeface, ...]:
    package, file = _COLLECTION
    return (*(Typeface(_folder(one) / name) for one, name in _FILES), Typeface(_folder(package) / file, number))


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BaseModelNotFound(
            f"the typefaces of PDF books are not installed: run make install ({package.replace('_', '-')}"
            " in requirements-weights.txt)"
        )
    return Path(spec.submodule_search_locations[0])


def is_invisible(letter: str) -> bool:
    """Tell whether a character has no glyph by its nature: spaces, joiners, direction marks, variation selectors."""
    return bool(_INVISIBLE.match(letter))
