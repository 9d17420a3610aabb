"""Rows in their place: each once."""

from __future__ import annotations

from pathlib import Path

import pytest

from batch_jobs.inputs import BadRow
from batch_jobs.outputs import STORY_SCHEMA, RowSink, bad_story
from batch_jobs.state import PageStore
from minigpt5.errors import MiniGPT5Error


def test_a_row_is_written_once_where_its_pages_cannot_be_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(story: str) -> None:
        raise OSError("AWS Error ACCESS_DENIED")

    place = str(tmp_path / "out")
    store = PageStore(place, keeps_pictures=False)
    sink = RowSink(place, STORY_SCHEMA, store=store)
    sink.add(bad_story(BadRow(row=0, id="a", prompt="A fox", error="no such picture")))
    monkeypatch.setattr(store, "drop", refuse)
    with pytest.raises(MiniGPT5Error, match="cannot be written"):
        sink.flush()
    sink.flush()  # as a job does at its end
    assert [row["id"] for row in sink.rows()] == ["a"]
