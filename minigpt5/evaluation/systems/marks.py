"""How a system that writes text alone says where a picture stands: by marks, which are text too."""

from __future__ import annotations

import re

MARK = " <Draw>"
END_MARK = "</Draw>"
_DESCRIBED = re.compile(r"\s*<Draw>(.*?)(?:</Draw>|$)", flags=re.S)


def describe(caption: str) -> str:
    """A picture as a text between marks."""
    return f"{MARK}{caption}{END_MARK}"


def read_described(text: str) -> list[tuple[str, str | None]]:
    """Texts, each with the description of the picture after it; None after the last, where no picture ends the text.

    Example: read_described(" It was dark. <Draw>a fox at night</Draw>") is [("It was dark.", "a fox at night")].
    """
    found, start = [], 0
    for match in _DESCRIBED.finditer(text):
        found.append((text[start : match.start()].strip(), match[1].strip()))
        start = match.end()
    rest = text[start:].strip()
    return [*found, (rest, None)] if rest or not found else found


def read_marked(text: str) -> list[tuple[str, bool]]:
    """Texts, and whether a picture stands after each.

    Example: read_marked(" One. <Draw> Two.") is [("One.", True), ("Two.", False)].
    """
    *before, last = (part.strip() for part in text.split(MARK.strip()))
    marked = [(part, True) for part in before]
    return [*marked, (last, False)] if last or not marked else marked
