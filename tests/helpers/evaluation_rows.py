"""Rows as `batch_jobs.prepare` stores them, written by hand."""

from __future__ import annotations

from typing import Any

from tests.helpers.fakes import make_png

EMPTY = {"text": None, "speaker": None, "picture": None, "caption": None}
PNG = make_png()


def row(
    kind: str, *parts: str | bytes, source: str = "test", prompt: str | None = None, row_id: str = "a"
) -> dict[str, Any]:
    """Texts, and pictures as bytes; a text after "#" is the caption of the picture before it."""
    segments: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, bytes):
            segments.append({**EMPTY, "picture": part})
        elif part.startswith("#"):
            segments[-1]["caption"] = part[1:]
        else:
            segments.append({**EMPTY, "text": part})
    common = {"golden": None, "item": None, "problem": None}
    return {"id": row_id, "source": source, "kind": kind, "prompt": prompt, "segments": segments, **common}


def story_row(num_steps: int, **options: Any) -> dict[str, Any]:
    """ "t1", its picture, "t2", and so on; pictures differ."""
    parts: list[str | bytes] = []
    for number in range(1, num_steps + 1):
        parts += [f"t{number}", make_png((number, 0, 0))]
    return row("story", *parts, **options)
