"""Logs of a run: appended to on this machine, in parts on an object store."""

from __future__ import annotations

from pathlib import Path

import pytest

from training import run_folder
from training.run_folder import RunFolder

LINES = [f'{{"step": {number}}}\n' for number in range(300)]


def test_a_local_log_is_one_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for line in LINES:
        folder.append("log.jsonl", line)
    assert (tmp_path / "log.jsonl").read_text() == "".join(LINES) == folder.read_log("log.jsonl").decode()
    assert folder.names() == ["log.jsonl"]


def test_a_line_of_a_log_on_a_store_costs_one_part_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "PART_BYTES", 200)
    folder, sizes = RunFolder("mock:///run"), list[int]()
    write = folder.write

    def counted(name: str, data: bytes) -> None:
        sizes.append(len(data))
        write(name, data)

    monkeypatch.setattr(folder, "write", counted)
    for line in LINES:
        folder.append("log.jsonl", line)
    assert folder.read_log("log.jsonl").decode() == "".join(LINES)
    assert len(sizes) == len(LINES) and max(sizes) < 200 + len(LINES[-1])
    names = folder.names()
    assert len(names) > 10 and {"log.jsonl", "log.jsonl.1"} < set(names)


def test_a_run_that_resumes_goes_on_with_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "PART_BYTES", 200)
    first = RunFolder("mock:///run")
    first.write("log.jsonl", "".join(LINES[:100]).encode())  # as an earlier version wrote it, of any size
    for line in LINES[100:105]:
        first.append("log.jsonl", line)
    again = RunFolder("mock:///run")
    again._files = first._files  # it lives in memory
    for line in LINES[105:]:
        again.append("log.jsonl", line)
    assert again.read_log("log.jsonl").decode() == "".join(LINES)
    assert again.read("log.jsonl") == "".join(LINES[:100]).encode()


def test_there_may_be_no_log_yet() -> None:
    assert RunFolder("mock:///run").read_log("log.jsonl") == b""
