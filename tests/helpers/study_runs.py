"""Bulk runs by hand, in the schema of batch_jobs, for tests of the human study."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from batch_jobs.outputs import STORY_SCHEMA


def make_png(colour: tuple[int, int, int], size: int = 64) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()


def make_row(
    id: str, texts: Sequence[str], colour: tuple[int, int, int] = (200, 80, 40), **more: Any
) -> dict[str, Any]:
    pages = [{"index": index, "text": text, "png": make_png(colour)} for index, text in enumerate(texts, 1)]
    return {"id": id, "prompt": f"Story {id}", "seed": 1, "pages": pages, **more}


def write_run(folder: Path, *parts: Sequence[Mapping[str, Any]]) -> Path:
    """Write one file for each of `parts`."""
    folder.mkdir()
    for number, rows in enumerate(parts):
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=STORY_SCHEMA)
        parquet.write_table(table, folder / f"part-{number}.parquet")
    return folder
