"""How many torch threads an engine computes with.

OpenMP (libgomp) gives every thread that computes a team of its own. As soon as all teams together have more threads
than the machine has cores, their members sleep between two operations instead of waiting for a moment, and a step of
small operations takes twice as long. So a team belongs to an engine's thread alone: what loads a model, or looks at a
picture beside the engine, does it by itself.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

import torch

DECIDED_AFTER_S = 0.1
"""Seconds of work before a decision: the kernel's scheduler gives threads pieces of some milliseconds."""
IDLE_CORES = 0.6
"""Idle part of the cores before a team grows."""
MIN_SHARE = 0.8
"""Share of the time that the engine's own thread has a core: with less it shares the core."""


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Let the calling thread compute without a team meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def share(num_cores: int | None = None) -> tuple[int, int]:
    """Threads of a generator and of a decoder in one process, whose teams just fit `num_cores` (default: all).

    A team counts its helpers, so the two may have one more than there are cores. Drawing gains most from threads:
    writing mostly waits for memory.
    """
    num_cores = num_cores or os.cpu_count() or 1
    generator = max(1, num_cores // 3)
    return generator, max(1, num_cores + 1 - generator)


class Team:
    """As many threads for an engine's steps as find a core, from 1 to `max_threads`.

    A member of a team that has no core of its own is waited for by all others, at every operation: beside a busy
    neighbour, two threads on two cores are slower than one, and slow down the neighbour as well.
    """

    def __init__(
        self, max_threads: int, *, read: Callable[[], tuple[float, float, float, float]] | None = None
    ) -> None:
        """`read`: seconds of the clock, of the calling thread, of this process, and of idle cores."""
        self.max_threads = self.num = max_threads
        self.num_cores = os.cpu_count() or 1
        self._read = read or _read_times
        self._sums = [0.0] * 4

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Around a step, in the engine's thread."""
        torch.set_num_threads(self.num)
        if self.max_threads == 1:
            yield
            return
        before = self._read()
        yield
        self._sums = [sum_ + now - then for sum_, now, then in zip(self._sums, self._read(), before, strict=True)]
        if self._sums[0] >= DECIDED_AFTER_S:
            self._decide(*self._sums)
            self._sums = [0.0] * 4

    def _decide(self, seconds: float, thread_s: float, process_s: float, idle_s: float) -> None:
        """Leave to others the cores that they use."""
        idle, own = idle_s / seconds, process_s / seconds
        others = max(0.0, self.num_cores - idle - own)
        wanted = max(1, min(self.max_threads, int(self.num_cores - others + 0.4)))
        if thread_s < MIN_SHARE * seconds:
            wanted = min(wanted, self.num - 1)
        elif wanted > self.num and idle < IDLE_CORES:
            wanted = self.num
        self.num = max(1, wanted)


def _read_times() -> tuple[float, float, float, float]:
    return time.perf_counter(), time.thread_time(), time.process_time(), _idle_s()


def _idle_s() -> float:
    """Seconds that the machine's cores were idle, all together; where it does not say so, all of the time."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            fields = file.readline().split()
        return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return time.perf_counter() * (os.cpu_count() or 1)
