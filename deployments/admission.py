"""How much runs at once: one bound for every front, far below Serve's own limits, so that reads always pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

RETRY_AFTER_S = 5


class Overloaded(Exception):
    """No place is free; ask again after `RETRY_AFTER_S`."""


class Admission:
    """Counts the stories and picture requests that run."""

    def __init__(self, max_running: int) -> None:
        self.max_running = max_running
        self.num_running = 0

    @property
    def is_full(self) -> bool:
        return self.num_running >= self.max_running

    def enter(self) -> None:
        """Take a place; `leave` gives it back. Raises Overloaded."""
        if self.is_full:
            raise Overloaded(
                f"{self.num_running} requests are running and the limit is {self.max_running}: "
                f"try again in {RETRY_AFTER_S} s"
            )
        self.num_running += 1

    def leave(self) -> None:
        self.num_running -= 1

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        self.enter()
        try:
            yield
        finally:
            self.leave()
