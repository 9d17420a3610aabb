"""The overload bench against a front that refuses."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import psutil
import pytest

from benchmarks import overload
from tests.helpers.served import Listening, Served


@pytest.mark.slow
def test_every_answer_is_a_story_or_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overload, "SETTLE_S", 0.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Listening(Served(tmp_path / "stories", max_running=2), port)
    try:
        out = tmp_path / "load.json"
        overload.main([f"http://127.0.0.1:{port}", "--seconds", "2", "--out", str(out), "--pid", str(os.getpid())])
    finally:
        server.stop()
    report = json.loads(out.read_text())
    figures = report["figures"]
    assert set(figures["ends"]) <= {"done", "503"}
    assert figures["ends"]["done"] > 0
    assert figures["accepted_p95_s"] >= figures["accepted_p50_s"] > 0
    assert report["ratios"]["accepted_p95_vs_max_wait"] == figures["accepted_p95_s"] / overload.MAX_WAIT_S
    assert overload.resident_mib([psutil.Process()]) > 10
    assert overload.resident_mib([]) == 0
