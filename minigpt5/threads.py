"""Who computes with how many torch threads.

OpenMP (libgomp) gives every thread that computes a team of its own. As soon as all teams together have more threads
than the machine has cores, their members sleep between two operations instead of waiting for a moment, and a step of
small operations takes twice as long. So a team belongs to an engine's thread alone: what loads a model, or looks at a
picture beside the engine, does it by itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch


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
