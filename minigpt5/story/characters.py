"""Which characters a page shows: those that its text names."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import regex

from minigpt5.types import Character, InputImage

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""Scripts that put no space between words."""
IN_WORD = r"[\w\p{M}]"


def shown_on(texts: Sequence[str], characters: Sequence[Character]) -> tuple[InputImage, ...]:
    """Pictures of the characters on the last of a story's pages: those that its text names, else those of the page
    before. On the first page, all."""
    shown = tuple(characters)
    for text in texts:
        shown = tuple(one for one in characters if is_named(one.name, text)) or shown
    return tuple(one.image for one in shown)


def is_named(name: str, text: str) -> bool:
    """Whether a text has a name as words of its own, in any case. In scripts that put no space between words it may
    stand anywhere, and in Korean what follows it may be a particle."""
    name, text = (unicodedata.normalize("NFC", one).casefold() for one in (name, text))
    left = "" if regex.match(rf"[{UNSPACED}]", name) else rf"(?<!{IN_WORD})"
    right = "" if regex.search(rf"[{UNSPACED}\p{{Hangul}}]\p{{M}}*$", name) else rf"(?!{IN_WORD})"
    return regex.search(f"{left}{regex.escape(name)}{right}", text) is not None
