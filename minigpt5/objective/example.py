"""A training example."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from minigpt5.model.prompt import Segment, Tokens


@dataclass(frozen=True, kw_only=True)
class Example:
    """A training sequence with the pictures that it reads and those that it draws, both in reading order."""

    segments: list[Segment]
    tokens: Tokens | None = None
    """The segments as the language model reads them, where a data worker has tokenised them."""
    read: list[np.ndarray]
    """uint8 (side, side, 3) each, of any sizes, or the vision encoder's features of it, float16 (F, E)."""
    shown: list[str] = field(default_factory=list)
    """What each read picture shows, where that is known."""
    drawn: list[np.ndarray]
    """uint8 (side, side, 3) each, or the VAE's moments of it, float16 (2 C, Y, X): mean, then log variance."""
    captions: list[str]
    """What each drawn picture shows, for the text encoder."""
    contrasts: list[list[str]] = field(default_factory=list)
    """For each drawn picture, what it does not show: its caption with one fact changed. As many for each, or none."""
    prompt: str = ""
    """What a user would type to get the story, where that is known."""
    is_caption: bool = False
    """A bare caption and its picture, nothing else: a frozen body need not carry gradients through its text."""
