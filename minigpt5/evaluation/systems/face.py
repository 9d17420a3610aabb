"""What a protocol asks, and what a system answers: our model or a rival.

A system is one model folder. Protocols know this face alone, so that all systems read the same rows and are measured by
the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from PIL import Image

from minigpt5.types import DrawSettings, PromptPart, Sampling

AnswerPart = str | Image.Image
Wants = Literal["picture", "text", "pages", "reply"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What comes before, and what is asked for."""

    context: tuple[PromptPart, ...]
    """Texts and pictures in their order; for a reply with the roles of who says them."""
    wants: Wants
    """"picture": one picture for the last text of the context. "text": the text that follows. "pages": `pages` texts,
    each with a picture. "reply": an answer as in a chat; the system decides whether to draw."""
    pages: int = 1
    """Of a reply: the most pictures."""
    is_page: bool = False
    """For "picture" and "text": the text is a page of a story. A page without any context is asked for as one, and not
    as a bare caption. A system that knows no difference may ignore it."""
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    draw: DrawSettings = field(default_factory=DrawSettings)


class System(Protocol):
    """Answers in the order of the questions. What a system cannot do at all it refuses before it begins."""

    name: str
    kinds: frozenset[str]
    """What questions may want of it."""

    def answer(self, questions: Sequence[Question]) -> list[tuple[AnswerPart, ...]]:
        """Raises InvalidRequest where a question is not of its `kinds` or does not fit the model."""
        ...
