"""How long a replica takes for one page's text or one picture: what the autoscaling policy plans with."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator

from deployments.stories.admission import SPEED_UP

NUM_REMEMBERED = 64
"""After so many items what was measured counts by half."""


class StageClock:
    """Counts the time in which a replica had work, as the time that the same work takes a full batch.

    A batch of twice as many does `speed_up` times as much in a second, up to `batch` requests; more wait.
    """

    def __init__(self, batch: int, *, speed_up: float = SPEED_UP, clock: Callable[[], float] = time.monotonic) -> None:
        self.batch, self.num_running = batch, 0
        self._exponent, self._clock = math.log2(speed_up), clock
        self._spent_s = self._num_done = 0.0
        self._counted_at = clock()

    def begin(self) -> None:
        """A request takes part from now on."""
        self._count(1)

    def end(self) -> None:
        """A request takes part no longer, whether it is done or not."""
        self._count(-1)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """A request takes part within the context."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def finish_item(self) -> None:
        """A page's text, or a picture, is done."""
        self._count(0)
        self._num_done += 1
        if self._num_done >= NUM_REMEMBERED:
            self._spent_s, self._num_done = self._spent_s / 2, self._num_done / 2

    @property
    def item_s(self) -> float:
        """Seconds of an item in a full batch; 0: none is done yet."""
        return self._spent_s / self._num_done if self._num_done else 0.0

    @property
    def speed(self) -> float:
        """Speed with the requests that run, as a share of a full batch's."""
        return float(self.busy**self._exponent) if self.num_running else 0.0

    @property
    def busy(self) -> float:
        """Share of the batch that is taken."""
        return min(self.num_running, self.batch) / self.batch

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place in the batch."""
        return max(0, self.num_running - self.batch)

    def _count(self, change: int) -> None:
        now = self._clock()
        self._spent_s += (now - self._counted_at) * self.speed
        self._counted_at = now
        self.num_running += change
