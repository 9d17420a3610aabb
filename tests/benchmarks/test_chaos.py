"""The readers, the verdict and the small disk of the bench that breaks a cluster."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chaos
from benchmarks.chaos import NotHere, Trial, fill, small_disk
from benchmarks.followed import Reader, finished_pictures, verdict
from minigpt5.story.store import StoryStore
from tests.helpers.fakes import FakeGenerator
from tests.helpers.processes import find_free_port
from tests.helpers.served import Listening, Served


def told(url: str, number: int) -> Reader:
    """A reader of a story that has ended."""
    reader = Reader(url, {"prompt": f"A fox {number}", "pages": 2, "seed": number}, key=f"key-{number}")
    reader.post()
    reader.start()
    reader.join(30)
    return reader


def test_stories_outlive_a_front_and_none_is_lost_or_doubled(tmp_path: Path) -> None:
    port = find_free_port()
    fronts = [Listening(Served(tmp_path, generator=FakeGenerator(delay_s=0.1), max_running=8), port)]

    def strike(trial: Trial) -> dict[str, Any]:
        fronts[0].stop()
        trial.mark()
        trial.note_pictures()
        fronts.append(Listening(Served(tmp_path, max_running=8), port))
        return {"more": 1}

    try:
        url, store = f"http://127.0.0.1:{port}", StoryStore(str(tmp_path))
        row = Trial(url, store, "front", 1, num=6, gap_s=0.3).run(strike)
    finally:
        fronts[-1].stop()
    assert row["accepted"] == row["finished"] == 6 and row["more"] == 1
    assert row["refused"] == row["unanswered"] == row["lost"] == row["doubled"] == row["damaged"] == 0
    assert row["in_flight"] > 0 and row["streams_lost"] > 0
    assert 0 < row["next_page_s"] < 30


def test_a_story_that_was_begun_twice_is_counted(tmp_path: Path) -> None:
    port = find_free_port()
    front = Listening(Served(tmp_path, max_running=8), port)

    def strike(trial: Trial) -> dict[str, Any]:
        Reader(url, trial.readers[0].body, key="another key").post()
        Reader(url, {"prompt": "A story of somebody else", "pages": 1}, key="a third key").post()
        return {}

    try:
        url = f"http://127.0.0.1:{port}"
        row = Trial(url, StoryStore(str(tmp_path)), "front", 1, num=2, gap_s=0.3).run(strike)
    finally:
        front.stop()
    assert row["lost"] == 0 and row["doubled"] == 1


def test_what_is_missing_or_changed_or_told_otherwise_is_counted(tmp_path: Path) -> None:
    port = find_free_port()
    front = Listening(Served(tmp_path), port)
    try:
        url, store = f"http://127.0.0.1:{port}", StoryStore(str(tmp_path))
        readers = [told(url, number) for number in range(2)]
        before = finished_pictures(store, [reader.story_id for reader in readers])
        good = verdict(readers, store, before)
        assert good["pictures_finished_before"] == 4
        assert sum(good[name] for name in ("lost", "pages_missing", "pages_twice", "pictures_changed")) == 0
        folder = tmp_path / "stories" / readers[0].story_id
        (folder / "pages/1/picture.png").write_bytes(b"another")
        (folder / "pages/2/page.json").unlink()
        state = json.loads((folder / "story.json").read_text())
        (folder / "story.json").write_text(json.dumps({**state, "status": "failed", "error": "x"}))
        readers[1].texts[1] = "another text"
        readers[1].events.append(("page", 2, 0.0))
        found = verdict(readers, store, before)
    finally:
        front.stop()
    assert found["lost"] == found["pages_missing"] == found["pages_twice"] == found["pages_told_otherwise"] == 1
    assert found["pictures_changed"] == 2


def test_a_refused_story_is_counted_so(tmp_path: Path) -> None:
    port = find_free_port()
    generator = FakeGenerator()
    front = Listening(Served(tmp_path, generator=generator, max_running=1), port)
    generator.gate.clear()
    try:
        readers = [Reader(f"http://127.0.0.1:{port}", {"prompt": "A fox", "pages": 1}, key=key) for key in "ab"]
        for reader in readers:
            reader.post()
        assert [reader.status for reader in readers] == [202, 503]
        assert readers[0].is_under_way and not readers[1].is_accepted
    finally:
        front.stop()


def test_the_small_disk_fills_up(tmp_path: Path) -> None:
    try:
        with small_disk(tmp_path) as disk:
            fill(disk / "ballast")
            assert os.statvfs(disk).f_bavail == 0
            with pytest.raises(OSError, match="No space left"):
                (disk / "file").write_bytes(b"x")
            (disk / "ballast").unlink()
            (disk / "file").write_bytes(b"x")
    except NotHere as reason:
        pytest.skip(str(reason))
    assert not (tmp_path / "file").exists()


def test_rows_without_a_trial_count_nowhere(tmp_path: Path) -> None:
    row = {"scenario": "nothing", "lost": 1, "doubled": 2, "damaged": 0, "next_page_s": 3.0}
    head, disk = {**row, "scenario": "head", "next_page_s": 70.0}, {"scenario": "disk-full", "reason": "no mount"}
    chaos.save({"nothing": row, "head": head, "disk-full": disk}, tmp_path / "chaos.json")
    report = json.loads((tmp_path / "chaos.json").read_text())
    assert report["ratios"] == {
        "lost": 2,
        "doubled": 4,
        "damaged": 0,
        "recovery_s_max": 3.0,
        "head_recovery_s": 70.0,
        "memory_after_overload": None,
    }
    rows = {row["scenario"]: row for row in report["figures"]["scenarios"]}
    assert list(rows) == list(chaos.SCENARIOS)
    assert (rows["nothing"], rows["head"], rows["disk-full"]) == (row, head, disk)
    assert rows["proxy"] == {"scenario": "proxy", "reason": "not run"}


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_generator_of_a_cluster_dies(tmp_path: Path) -> None:
    out = tmp_path / "chaos.json"
    chaos.main(["--only", "generator", "--out", str(out)])
    [row] = [row for row in json.loads(out.read_text())["figures"]["scenarios"] if "reason" not in row]
    assert row["of"] == 2 and row["in_flight"] > 0
    assert row["accepted"] == row["finished"] > 0
    assert row["lost"] == row["doubled"] == row["damaged"] == 0
