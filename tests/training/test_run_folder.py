"""Logs of a run: appended to on this machine, in parts on an object store."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import pytest

from minigpt5.errors import TrainingError
from training import run_folder
from training.report import read_lines, write_report
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


def test_a_line_that_a_full_disk_cut_costs_itself_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"step": step, "elapsed_s": 1.0, "loss": 1.0}) + "\n" for step in range(1, 5)]
    folder.append("log.jsonl", lines[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(lines[0]) + 9, hard))  # the kernel refuses to write on
    try:
        with pytest.raises(TrainingError, match="make room"):
            folder.append("log.jsonl", lines[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    again = RunFolder(tmp_path)
    for line in lines[2:]:
        again.append("log.jsonl", line)
    assert again.read_log("log.jsonl").decode() == lines[0] + lines[1][:9] + "\n" + "".join(lines[2:])
    assert [line["step"] for line in read_lines(again)] == [1, 3, 4]
    assert write_report(again) == "report.html"


def test_a_report_skips_what_an_earlier_version_left_of_a_cut_line(tmp_path: Path) -> None:
    """It wrote the next line right behind."""
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n{"ste{"step": 2}\n7\n\xff\n{"step": 3}\n')
    assert read_lines(RunFolder(tmp_path)) == [{"step": 1, "loss": 2.0}, {"step": 3}]
