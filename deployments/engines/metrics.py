"""What Prometheus sees, through ray.serve.metrics: how busy the engines are, and how long stories take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from ray.serve.metrics import Counter, Gauge, Histogram

from minigpt5.types import Picture, SlotOpened, StoryEvent, TextDelta

PERIOD_S = 1.0
SECONDS = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500]
"""Upper ends of the histograms' parts."""


class Engine(Protocol):
    """What both engines say of themselves."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def queued_cost(self) -> float: ...


def watch(name: str, engine: Engine, totals: Mapping[str, Callable[[], float]]) -> None:
    """Report an engine's load every second, as long as its process lives; `totals` only grow, and become counters."""
    in_flight = Gauge("minigpt5_requests_in_flight", description="Requests inside an engine.", tag_keys=("engine",))
    queue_cost = Gauge(
        "minigpt5_queue_cost",
        description="Work that an engine's requests still need: tokens, or UNet samples.",
        tag_keys=("engine",),
    )
    counters = {total: Counter(total, description=f"Of the {name}, since it started.") for total in totals}
    counted = dict.fromkeys(totals, 0.0)

    def report() -> None:
        while True:
            in_flight.set(engine.num_running + engine.num_waiting, tags={"engine": name})
            queue_cost.set(engine.queued_cost, tags={"engine": name})
            for total, counter in counters.items():
                if (value := totals[total]()) > counted[total]:
                    counter.inc(value - counted[total])
                    counted[total] = value
            time.sleep(PERIOD_S)

    threading.Thread(target=report, name=f"{name}-metrics", daemon=True).start()


class StoryTimes:
    """The histograms of a front."""

    def __init__(self) -> None:
        self.first_text = Histogram(
            "minigpt5_time_to_first_text_seconds",
            description="From a story's acceptance to its first text.",
            boundaries=SECONDS,
        )
        self.first_picture = Histogram(
            "minigpt5_time_to_first_picture_seconds",
            description="From a story's acceptance to its first picture.",
            boundaries=SECONDS,
        )
        self.page = Histogram(
            "minigpt5_page_seconds",
            description='Of a page: "text" from the page before to its picture\'s slot, "picture" from there on.',
            boundaries=SECONDS,
            tag_keys=("stage",),
        )

    def start(self, clock: Callable[[], float] = time.monotonic) -> StoryClock:
        return StoryClock(self, clock)


class StoryClock:
    """Times one story by its events."""

    def __init__(self, times: StoryTimes, clock: Callable[[], float]) -> None:
        self._times, self._clock = times, clock
        self._started_at = self._text_at = clock()
        self._opened_at: dict[int, float] = {}
        self._has_text = self._has_picture = False

    def observe(self, event: StoryEvent) -> None:
        now = self._clock()
        if isinstance(event, TextDelta) and not self._has_text:
            self._has_text = True
            self._times.first_text.observe(now - self._started_at)
        elif isinstance(event, SlotOpened):
            self._times.page.observe(now - self._text_at, tags={"stage": "text"})
            self._opened_at[event.page] = self._text_at = now
        elif isinstance(event, Picture):
            if not self._has_picture:
                self._has_picture = True
                self._times.first_picture.observe(now - self._started_at)
            self._times.page.observe(now - self._opened_at[event.page], tags={"stage": "picture"})
