"""What Prometheus sees of the engines: their load once a second, and where a picture's time goes."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Protocol

from deployments.observability.metrics import (
    DRAWN_PICTURES,
    MAX_ROWS,
    PAGE_STAGE,
    QUEUED_REQUESTS,
    ROWS,
    RUNNING_REQUESTS,
    STEPS,
    Metric,
)
from deployments.observability.recording import Record, record
from minigpt5.engine.fair_share import Occupancy
from minigpt5.errors import Blocked, FingerprintMismatch, InvalidRequest
from minigpt5.types import DecoderEvent, Picture, Progress

PERIOD_S = 1.0


class Engine(Protocol):
    """What both engines say of themselves."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def occupancy(self) -> Occupancy: ...


def watch(name: str, engine: Engine, values: Mapping[Metric, Callable[[], float]]) -> None:
    """Record an engine's load every second, as long as its process lives. `values`: what only this engine says of
    itself, by metric; those of counters only grow."""
    last: dict[Metric, float] = {}

    def report(metric: Metric, value: float, **labels: str) -> None:
        if metric.kind == "counter":  # a counter takes what has been added
            last[metric], value = value, value - last.get(metric, 0.0)
        record(metric, value, **labels)

    def report_all() -> None:
        occupancy = engine.occupancy
        report(RUNNING_REQUESTS, engine.num_running, engine=name)
        report(QUEUED_REQUESTS, engine.num_waiting, engine=name)
        report(STEPS, occupancy.num_steps, engine=name)
        report(ROWS, occupancy.num_rows, engine=name)
        report(MAX_ROWS, occupancy.max_rows, engine=name)
        for metric, read in values.items():
            report(metric, read())

    def report_for_ever() -> None:
        while True:
            report_all()
            time.sleep(PERIOD_S)

    threading.Thread(target=report_for_ever, name=f"{name}-metrics", daemon=True).start()


async def observe_picture(
    events: AsyncIterator[DecoderEvent], *, record: Record = record, clock: Callable[[], float] = time.monotonic
) -> AsyncGenerator[DecoderEvent, None]:
    """Pass a picture's events on; record where its time goes, and how it ended."""
    since, has_begun = clock(), False
    try:
        async for event in events:
            now = clock()
            if isinstance(event, Progress) and not has_begun:
                record(PAGE_STAGE, now - since, stage="queue")
                since, has_begun = now, True
            if isinstance(event, Progress) and event.step == event.steps:
                record(PAGE_STAGE, now - since, stage="denoise")
                since = now
            if isinstance(event, Picture):
                if has_begun:
                    record(PAGE_STAGE, now - since, stage="encode")
                record(DRAWN_PICTURES, 1, result="drawn" if has_begun else "cached")
            yield event
    except (FingerprintMismatch, InvalidRequest):  # none was begun: it is asked for again, or refused
        raise
    except Blocked:
        record(DRAWN_PICTURES, 1, result="blocked")
        raise
    except Exception:
        record(DRAWN_PICTURES, 1, result="failed")
        raise
