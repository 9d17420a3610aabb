"""What a protocol is: what it asks for a row, and what it has measured of the answers.

    row -> ask -> (key, question) ... -> a system's answers -> collect -> samples -> measure.py

A row is one of `batch_jobs.prepare`, or an item of a benchmark in the same form (items.py). Everything here is a pure
function of the row, so that a run that was killed asks the same questions again.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from minigpt5.errors import InvalidRequest
from minigpt5.evaluation.systems.face import AnswerPart, Question
from minigpt5.model.image_transforms import in_square
from minigpt5.storybook.captions import Facts, facts_of_canonical
from minigpt5.types import DrawSettings, Sampling

TRUE_PX = 512
"""Longest side of a true picture that is compared, as published."""
Row = Mapping[str, Any]
"""id, source, kind, prompt and segments, as ROW_SCHEMA has them."""
Answers = Mapping[str, tuple[AnswerPart, ...]]
"""Answers by the keys of their questions."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all questions of a run share."""

    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    draw: DrawSettings = field(default_factory=DrawSettings)
    reads_pictures: bool = True
    """Without, contexts have no pictures, and questions that would be nothing without them are left out."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One thing to measure. What is None was not drawn, not said or is not known."""

    row: str
    key: str
    groups: tuple[str, ...]
    """Each metric is reported for each of them."""
    asked: str = ""
    """What a report shows beside it."""
    drawn: np.ndarray | None = None
    """(Y, X, 3) uint8, as `true` is."""
    true: np.ndarray | None = None
    pair: tuple[np.ndarray, np.ndarray] | None = None
    """Two pictures of one answer, whose likeness is measured."""
    caption: str = ""
    """What the drawn picture should show."""
    facts: Facts | None = None
    """The facts that it should show; None within: not said."""
    parts: tuple[str | np.ndarray, ...] = ()
    """Texts and pictures of a reply, in their order, where a metric compares that."""
    said: str | None = None
    said_first: str | None = None
    """The part of `said` before the first picture, where the published code's own forms are computed."""
    reference: str | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    """What the protocol has measured itself, by metric."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A protocol, with the metrics that its samples are measured by (minigpt5/evaluation/metrics.py)."""

    name: str
    about: str
    kinds: frozenset[str]
    """Kinds of questions: a system that does not answer one of them is refused."""
    ask: Callable[[Row, Settings], dict[str, Question]]
    """Questions by key. Raises InvalidRequest for a row that it has no questions for."""
    collect: Callable[[Row, Answers], list[Sample]]
    metrics: tuple[str, ...]
    of_rows: tuple[str, ...] = ()
    """Metrics of all samples of a row together, as of_rows.py computes them."""
    sheets: tuple[str, ...] = ()
    """Metrics that best and worst samples are chosen by: the first one that is there."""
    main: tuple[str, ...] = ()
    """Samples of the first of these groups that there is are shown; (): all."""


def seed_of(settings: Settings, row: Row, key: str) -> int:
    """The seed of a question: of its row and key, never of what ran before it. 31 bits."""
    digest = hashlib.sha256(f"{settings.seed}/{row['id']}/{key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True, kw_only=True)
class Step:
    """A text and the picture after it; of a dialogue a turn, whose picture may be missing."""

    text: str
    picture: bytes | None = None
    caption: str = ""
    """What the picture shows, where that is known beside the text."""


def check_kind(row: Row, *kinds: str, protocol: str) -> None:
    """Raises InvalidRequest."""
    if row["kind"] not in kinds:
        raise InvalidRequest(
            "kind", f"kind is {row['kind']!r} but {protocol} asks rows of {' or '.join(kinds)}: prepare such rows"
        )


def steps_of(row: Row) -> list[Step]:
    """Texts with the picture after each; a page without a picture is told with the next one, as in training.

    Raises InvalidRequest where pictures are encoded already.
    """
    steps: list[Step] = []
    words: list[str] = []
    for segment in row["segments"]:
        if segment["text"] is not None:
            words.append(segment["text"])
        else:
            steps.append(Step(text=" ".join(words), picture=_picture(segment), caption=segment["caption"] or ""))
            words = []
    return steps


def turns_of(row: Row) -> list[Step]:
    """The turns of a dialogue. Raises as `steps_of` does."""
    turns: list[Step] = []
    for segment in row["segments"]:
        if segment["text"] is not None:
            turns.append(Step(text=segment["text"]))
        elif turns:
            turns[-1] = Step(text=turns[-1].text, picture=_picture(segment), caption=segment["caption"] or "")
    return turns


def _picture(segment: Mapping[str, Any]) -> bytes:
    if segment["picture"] is None:
        raise InvalidRequest("picture", "a picture is stored in its encoded form alone: use rows of batch_jobs.prepare")
    data: bytes = segment["picture"]
    return data


def true_pixels(picture: bytes) -> np.ndarray:
    """A true picture as training draws it and the published code compares it: in a white square, (Y, X, 3) uint8, at
    most TRUE_PX. Raises BadPicture."""
    square = in_square(picture)
    square.thumbnail((TRUE_PX, TRUE_PX), Image.Resampling.BILINEAR)
    return np.asarray(square)


def pixels_of(picture: Image.Image) -> np.ndarray:
    """(Y, X, 3) uint8."""
    return np.asarray(picture.convert("RGB"))


def facts_of(row: Row, step: Step) -> Facts | None:
    """The facts that a picture of the picture world was drawn from, read from its caption (`canonical_caption`); None
    for other sources."""
    if not str(row["source"]).startswith("storybook") or not step.caption:
        return None
    return facts_of_canonical(step.caption)


def picture_in(answer: Sequence[AnswerPart]) -> np.ndarray | None:
    """The first picture of an answer."""
    return next((pixels_of(part) for part in answer if isinstance(part, Image.Image)), None)


def parts_in(answer: Sequence[AnswerPart]) -> tuple[str | np.ndarray, ...]:
    """The texts and pictures of an answer, in their order."""
    return tuple(part if isinstance(part, str) else pixels_of(part) for part in answer)


def text_in(answer: Sequence[AnswerPart]) -> str:
    """The texts of an answer."""
    return " ".join(part for part in answer if isinstance(part, str))


def text_before_picture(answer: Sequence[AnswerPart]) -> str:
    """The texts of an answer before its first picture."""
    return text_in(list(itertools.takewhile(lambda part: isinstance(part, str), answer)))


def pattern_of(answer: Sequence[AnswerPart]) -> tuple[str, ...]:
    """ "text" and "picture" in the order of an answer."""
    return tuple("text" if isinstance(part, str) else "picture" for part in answer)
