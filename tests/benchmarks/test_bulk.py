"""The kill harness sees what it is there to see: rows that are lost, doubled or changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.kills import KINDS, Round, table, voken_difference, write_input
from tests.batch_jobs.test_illustrate import PROMPTS, illustrate_here, new_output, read_output
from tests.helpers.batch_fakes import jobs_in
from tests.helpers.fakes import make_png


def finished_round(folder: Path) -> tuple[Round, dict[str, list[dict[str, Any]]]]:
    trial = Round(write_input(folder), folder / "out", {})
    illustrate_here(jobs_in(*PROMPTS[:3]), new_output(folder))
    reference = {
        row["id"]: [{key: page[key] for key in ("text", "png", "vokens")} for page in row["pages"]]
        for row in read_output(folder).values()
    }
    return trial, reference


def test_a_whole_output_has_nothing_lost_doubled_or_changed(tmp_path: Path) -> None:
    trial, reference = finished_round(tmp_path)
    trial.look()
    trial.look()
    verdict = trial.verdict(reference)
    keys = ("rows_lost", "rows_doubled", "files_changed", "error_rows", "pages_with_other_text")
    assert [verdict[key] for key in keys] == [0] * 5
    assert (verdict["rows"], verdict["pictures"], verdict["largest_pixel_difference"]) == (3, 8, 0)


def test_what_is_lost_doubled_or_changed_is_counted(tmp_path: Path) -> None:
    trial, reference = finished_round(tmp_path)
    trial.look()
    (part,) = (tmp_path / "out").glob("part-*")
    shutil.copy(part, part.with_name("part-again.parquet"))
    reference["missing"] = []
    reference["fox"][0] = {**reference["fox"][0], "text": "Another."}
    reference["fox"][1] = {**reference["fox"][1], "png": make_png(size=(8, 8))}
    verdict = trial.verdict(reference)
    assert (verdict["rows_lost"], verdict["rows_doubled"]) == (1, 3)
    assert verdict["pages_with_other_text"] == 2 and verdict["largest_pixel_difference"] > 1
    part.write_bytes(part.read_bytes() + b"x")
    trial.look()
    part.unlink()
    trial.look()
    assert trial.num_changed >= 2


def test_the_table_adds_up_what_was_killed(tmp_path: Path) -> None:
    trial, reference = finished_round(tmp_path)
    trial.kills.append({"victim": "driver"})
    rounds = [{"kind": "driver", **trial.verdict(reference)} for _ in range(2)]
    line = next(line for line in table(rounds).splitlines() if line.startswith("driver"))
    assert line.split() == ["driver", "2", "2", "6", "0", "0", "0", "0", "0"]
    assert "driver" in KINDS


def test_vokens_differ_by_their_largest_number(tmp_path: Path) -> None:
    _, reference = finished_round(tmp_path)
    one, other = (reference["fox"][index]["vokens"] for index in (0, 1))
    assert voken_difference(one, one) == 0.0 and voken_difference(one, other) == 1.0
