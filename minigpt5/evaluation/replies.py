"""Of replies with pictures: whether one was drawn where it should be, and the pattern of texts and pictures."""

from __future__ import annotations

from collections.abc import Sequence


def drawing(drew: bool, should: bool) -> dict[str, float]:
    """What one turn says of drawing: its mean over all turns is the precision or the recall. A turn without a drawn
    picture says nothing of precision, and one without a true picture nothing of recall."""
    values = {}
    if drew:
        values["draw_precision"] = float(should)
    if should:
        values["draw_recall"] = float(drew)
    return values


def missing(pattern: Sequence[str]) -> dict[str, float]:
    """Whether an answer lacks pictures or texts: OpenING's No-Image and No-Text, as shares of answers."""
    return {"no_picture": float("picture" not in pattern), "no_text": float("text" not in pattern)}


def structure(pattern: Sequence[str], expected: Sequence[str]) -> float:
    """1 where an answer has the asked pattern of "text" and "picture" exactly, else 0: the structural level of
    ISG-Bench (arXiv 2411.17188), which needs no judge. Texts that follow each other are one: annotators' steps without
    a picture are texts of their own, and an answer has one text between two pictures."""
    return float(_joined(pattern) == _joined(expected))


def _joined(pattern: Sequence[str]) -> list[str]:
    return [part for before, part in zip(("", *pattern), pattern, strict=False) if (before, part) != ("text", "text")]
