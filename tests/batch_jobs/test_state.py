"""Who owns a job's output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batch_jobs import state
from batch_jobs.state import JobState
from minigpt5.errors import MiniGPT5Error


def test_an_owner_that_was_replaced_while_the_store_did_not_answer_puts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole = state.write_whole

    def answer_late(*arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(state, "write_whole", write_whole)
        monkeypatch.setattr(state, "_is_alive", lambda owner, read_again: False)
        second.take({})
        write_whole(*arguments, **options)

    first, second = JobState(str(tmp_path / "out")), JobState(str(tmp_path / "out"))
    first.take({})
    monkeypatch.setattr(state, "HEARTBEAT_S", 0.0)
    monkeypatch.setattr(state, "write_whole", answer_late)
    with pytest.raises(MiniGPT5Error, match="was taken over by process"):
        first.heartbeat()
    second.heartbeat()  # it is the owner still


def test_a_store_that_does_not_answer_is_an_error_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("no space left on device")

    job = JobState(str(tmp_path / "out"))
    job.take({})
    monkeypatch.setattr(state, "HEARTBEAT_S", 0.0)
    monkeypatch.setattr(state, "write_whole", fail)
    with pytest.raises(MiniGPT5Error, match="out cannot be written .no space left on device."):
        job.heartbeat()
