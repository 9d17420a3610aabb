"""Story -> the language tag (BCP 47) of its books: no more than its letters tell."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from minigpt5.types import Story

# A letter's Unicode name begins with its script. A script of one language names it; of another the tag says that
# the language is undetermined, and which script it is.
_TAGS = {
    "CJK": "zh",
    "KANA": "ja",
    "HANGUL": "ko",
    "GREEK": "el",
    "HEBREW": "he",
    "THAI": "th",
    "ARMENIAN": "hy",
    "GEORGIAN": "ka",
    "TAMIL": "ta",
    "LATIN": "und-Latn",
    "CYRILLIC": "und-Cyrl",
    "ARABIC": "und-Arab",
    "DEVANAGARI": "und-Deva",
    "BENGALI": "und-Beng",
}
_RIGHT_TO_LEFT = frozenset({"he", "und-Arab"})
_ENGLISH = frozenset({"the", "and", "with", "that", "this", "they", "she", "his", "from", "were"})
"""Frequent words of English that other languages in Latin letters hardly have."""
_LEAST_ENGLISH = 0.03
"""Share of an English text's words that are in _ENGLISH, at least."""
_LEAST_KANA = 0.1
"""Share of a Japanese text's letters that are kana, at least; the others are Chinese characters."""


def language_of(story: Story) -> str:
    """Tell the language of a story, such as "en", "ja" or "und-Cyrl"; "und" where it has no letters."""
    text = "\n".join((story.prompt, *(page.text for page in story.pages)))
    scripts: Counter[str] = Counter()
    for letter, count in Counter(text).items():
        if letter.isalpha():
            scripts[_script(letter)] += count
    if scripts["KANA"] > _LEAST_KANA * scripts["CJK"]:
        scripts["KANA"] += scripts.pop("CJK", 0)
    script = max(scripts, key=scripts.__getitem__, default="")
    if script == "LATIN" and _is_english(text):
        return "en"
    return _TAGS.get(script, "und")


def is_right_to_left(language: str) -> bool:
    """Tell whether the pages of a book in this language follow one another from right to left."""
    return language in _RIGHT_TO_LEFT


def _script(letter: str) -> str:
    script = unicodedata.name(letter, "").partition(" ")[0]
    return "KANA" if script in ("HIRAGANA", "KATAKANA") else script


def _is_english(text: str) -> bool:
    words = re.findall("[a-z]+", text.lower())
    return sum(word in _ENGLISH for word in words) > _LEAST_ENGLISH * len(words)
