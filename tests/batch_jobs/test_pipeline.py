"""What comes out of the actor pools: every row, the gauges on the way, and an end when the reader stops."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from batch_jobs.monitor import Monitor
from batch_jobs.pipeline import Limits, Pool, finished_rows
from batch_jobs.report import Report
from minigpt5.errors import MiniGPT5Error
from tests.helpers.batch_fakes import FakeDecoder

POOLS = {"decoder": Pool(load=FakeDecoder, num_gpus=0.5)}


class Rows:
    """Stands for a data set of Ray Data."""

    def __init__(self, num: int, *, gap_s: float = 0.0, error: Exception | None = None) -> None:
        self.num, self.gap_s, self.error = num, gap_s, error

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        for number in range(self.num):
            time.sleep(self.gap_s)
            yield {"id": str(number), "error": None}
        if self.error:
            raise self.error


class ShownMonitor(Monitor):
    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[int, int]] = []
        self.starting("decoder", "one")
        self.ready("decoder", "one")

    def show(self, done: int, total: int) -> None:
        self.shown.append((done, total))


def run(rows: Rows, monitor: ShownMonitor, report: Report) -> Iterator[dict[str, Any] | None]:
    return finished_rows(rows, monitor, Limits(), report, pools=POOLS, tick_s=0.03)  # type: ignore[arg-type]


def test_gauges_are_set_while_rows_come_faster_than_ticks_and_at_the_end() -> None:
    monitor, report = ShownMonitor(), Report(rows=43, skipped=3)
    num_ticks = 0
    for row in run(Rows(40, gap_s=0.005), monitor, report):
        if row is None:
            num_ticks += 1
        else:
            report.add(row)
    assert num_ticks >= 3 and len(monitor.shown) == num_ticks + 1
    assert 3 < monitor.shown[0][0] < 43 and monitor.shown[-1] == (43, 43)
    assert report.figures.pools["decoder"].engines == 1 and report.gpus == {"decoder": 0.5}


def test_a_reader_that_stops_ends_the_thread_that_waits_for_it() -> None:
    rows = run(Rows(10_000), ShownMonitor(), Report(rows=10_000))
    assert next(rows) is not None
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "finished rows")
    time.sleep(0.1)  # the queue is full by then, and the thread waits
    assert thread.is_alive()
    rows.close()  # type: ignore[attr-defined]
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_what_ray_raises_comes_after_the_rows_before_it() -> None:
    rows = run(Rows(2, error=RuntimeError("the cluster is gone")), ShownMonitor(), Report(rows=3))
    assert [row and row["id"] for row in (next(rows), next(rows))] == ["0", "1"]
    with pytest.raises(RuntimeError, match="the cluster is gone"):
        list(rows)


def test_an_engine_that_cannot_start_says_more_than_ray() -> None:
    monitor = ShownMonitor()
    monitor.cannot_start("decoder", "no memory")
    with pytest.raises(MiniGPT5Error, match="the decoder cannot start: no memory: check --model and the memory"):
        list(run(Rows(0, error=RuntimeError("an actor died")), monitor, Report(rows=1)))
