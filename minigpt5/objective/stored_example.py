"""The rows of a training data set as they are stored: one parquet schema for every source, checked when it is written.

A row is text and pictures in the order in which they are read:

    caption    a text, then its picture (CC3M, stamps)
    story      pages, each a text and then its picture, which may be missing on some (VIST, campaigns)
    dialogue   turns of two speakers, "Human" first, a picture after the texts that have one (MMDialog)
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pyarrow as pa
from PIL import Image

from minigpt5.errors import BadPicture, MiniGPT5Error, StorageError
from minigpt5.pictures import open_picture
from minigpt5.storage import is_final

Kind = Literal["caption", "story", "dialogue"]
SPEAKERS = ("Human", "Assistant")
SEGMENT = pa.struct(
    {
        "text": pa.string(),  # of a text segment
        "speaker": pa.string(),  # of a dialogue's text
        "picture": pa.binary(),  # of a picture segment: a file that open_picture reads
        "caption": pa.string(),  # of a picture: what it shows, where that is known
        "moments": pa.binary(),  # of a picture: the VAE's mean and log variance, float16 (2 C, Y, X); see precompute.py
        "features": pa.binary(),  # of a picture: the vision encoder's, float16 (F, E)
    }
)
ROW_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        "kind": pa.string(),
        "prompt": pa.string(),  # what a user would type to get a story, where that is known
        "segments": pa.list_(SEGMENT),
    },
    metadata={"minigpt5": "training rows, 1"},
)
REJECT_SCHEMA = pa.schema({"id": pa.string(), "source": pa.string(), "reason": pa.string()})
MAX_TEXT = 4_000
"""Characters of one text."""
MAX_SEGMENTS = 128
MAX_STORED_PIXELS = 2**20
"""Larger pictures are stored smaller: models draw 512 px."""
MAX_STORED_BYTES = 2**22
"""Larger files are stored as PNG without loss: the rest of an animation, or bits beyond the eighth."""
JPEG_QUALITY = 95


class BadRow(MiniGPT5Error):
    """A row that cannot be trained on; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A text or a picture of a row. A picture is bytes, or the place where they are."""

    text: str = ""
    speaker: str = ""
    picture: bytes | str | None = None
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A row as a layout names it, before its pictures are read."""

    id: str
    kind: Kind
    segments: tuple[Segment, ...]
    prompt: str = ""
    problem: str = ""
    """Why it cannot be a row, where the layout knows already."""


def to_row(item: Item, *, source: str, read: Callable[[str], bytes]) -> dict[str, Any]:
    """A row of ROW_SCHEMA, its pictures read by their places and checked. Raises BadRow."""
    if item.problem:
        raise BadRow(item.problem)
    segments = tuple(segment for segment in item.segments if segment.text.strip() or segment.picture is not None)
    _check_form(item.kind, segments)
    return {
        "id": item.id,
        "source": source,
        "kind": item.kind,
        "prompt": as_unicode(item.prompt.strip()) or None,
        "segments": [_to_segment(segment, read) for segment in segments],
    }


def as_unicode(text: str) -> str:
    """The text with "?" for each half of a surrogate pair, which no file can hold in UTF-8."""
    return text.encode(errors="replace").decode()


def _check_form(kind: Kind, segments: Sequence[Segment]) -> None:
    texts = [segment for segment in segments if segment.picture is None]
    num_pictures = len(segments) - len(texts)
    if kind not in get_args(Kind):
        raise BadRow(f"kind is {kind!r} but must be one of {', '.join(get_args(Kind))}")
    if not texts:
        raise BadRow("empty text")
    if any(words != as_unicode(words) for segment in segments for words in (segment.text, segment.caption)):
        raise BadRow("half of a surrogate pair: write it as UTF-8")
    if not num_pictures:
        raise BadRow("no picture")
    if len(segments) > MAX_SEGMENTS:
        raise BadRow(f"{len(segments)} segments, at most {MAX_SEGMENTS} are taken")
    if longest := next((segment for segment in texts if len(segment.text) > MAX_TEXT), None):
        raise BadRow(f"a text of {len(longest.text)} characters, at most {MAX_TEXT} are taken")
    if segments[0].picture is not None:
        raise BadRow("it begins with a picture: a picture comes after its text")
    if any(None not in (one.picture, two.picture) for one, two in itertools.pairwise(segments)):
        raise BadRow("two pictures without a text between them")
    if kind == "caption" and len(segments) != 2:
        raise BadRow(f"a caption with {len(texts)} texts and {num_pictures} pictures, it must have one of each")
    if kind == "dialogue":
        if len(texts) < 2:
            raise BadRow("a dialogue with a single turn")
        for number, segment in enumerate(texts):
            expected = SPEAKERS[number % 2]
            if segment.speaker != expected:
                raise BadRow(f"turn {number + 1} is {segment.speaker or 'nobody'}'s but must be {expected}'s")


def _to_segment(segment: Segment, read: Callable[[str], bytes]) -> dict[str, Any]:
    empty = dict.fromkeys(field.name for field in SEGMENT)
    if segment.picture is None:
        return empty | {"text": segment.text.strip(), "speaker": segment.speaker or None}
    where = segment.picture if isinstance(segment.picture, str) else ""
    try:
        data = read(where) if where else segment.picture
    except FileNotFoundError:
        raise BadRow(f"missing file: {where}") from None
    except (OSError, ValueError) as error:
        if not is_final(error):
            raise StorageError(f"{where} cannot be read now ({error}): run the same command again") from error
        raise BadRow(f"unreadable file: {where}: {error}") from None
    assert isinstance(data, bytes)
    return empty | {"picture": check_picture(data, name=where or "picture"), "caption": segment.caption or None}


def check_picture(data: bytes, *, name: str) -> bytes:
    """Return a picture file that is known to decode, of bounded size: `data` itself unless that is larger.

    Raises BadRow.
    """
    try:
        picture = open_picture(data, name=name)
    except BadPicture as error:
        raise BadRow(f"bad picture: {error}") from None
    num_pixels = picture.width * picture.height
    if num_pixels <= MAX_STORED_PIXELS and len(data) <= MAX_STORED_BYTES:
        return data
    kind = "PNG"
    if num_pixels > MAX_STORED_PIXELS:
        scale = (MAX_STORED_PIXELS / num_pixels) ** 0.5
        width, height = (max(1, int(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        kind = "JPEG" if data.startswith(b"\xff\xd8") else "PNG"
    file = io.BytesIO()
    picture.save(file, kind, quality=JPEG_QUALITY)
    return file.getvalue()
