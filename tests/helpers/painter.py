"""A system without a model: what it says and paints is a function of the question, so that figures can be worked out by
hand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from minigpt5.errors import InvalidRequest
from minigpt5.evaluation.systems.face import AnswerPart, Question
from minigpt5.types import PromptPart

REFUSED = "refuse this"
BREAKS = "break at this"


class Painter:
    """Repeats the last text. A reply has a picture where that text asks to see or to draw something."""

    name = "painter"
    kinds = frozenset({"picture", "text", "pages", "reply"})

    def __init__(self) -> None:
        self.asked: list[Question] = []

    def answer(self, questions: Sequence[Question]) -> list[tuple[AnswerPart, ...]]:
        self.asked += questions
        return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> tuple[AnswerPart, ...]:
        words = last_text(question.context)
        if words == REFUSED:
            raise InvalidRequest("context", "this is refused")
        if words == BREAKS:
            raise RuntimeError("out of paint")
        if question.wants == "picture":
            return (paint(words),)
        if question.wants == "text":
            return (words,)
        if question.wants == "pages":
            return tuple(
                part for page in range(question.pages) for part in (f"{words} {page}", paint(f"{words} {page}"))
            )
        return (words, paint(words)) if "see" in words or "draw" in words else (words,)


def last_text(context: Sequence[PromptPart]) -> str:
    return [part for part in context if isinstance(part, str)][-1]


def paint(words: str) -> Image.Image:
    """Noise that depends on the words alone."""
    seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "big")
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8))
