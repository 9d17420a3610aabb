"""What the machine itself can do, beside the figures of the engines: arithmetic and memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

SIDE = 2048
"""Of the matrices that are multiplied."""
READ_BYTES = 2**29
"""More than any cache holds."""
REPEATS = 5
BUDGET_S = 10.0
"""Of the calls of one figure; a call that has begun ends."""


def measure_peak(*, side: int = SIDE, read_bytes: int = READ_BYTES) -> dict[str, float]:
    """GFLOP/s by precision and GB/s with this process's torch threads, each the best of several calls."""
    figures = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        matrix_SS = torch.randn(side, side).to(dtype)
        figures[f"{name}_gflops_per_s"] = 2 * side**3 / _best_s(lambda m=matrix_SS: m @ m) / 1e9
    source = torch.ones(read_bytes // 4)
    target = torch.empty_like(source)
    figures["read_gb_per_s"] = read_bytes / _best_s(source.sum) / 1e9
    figures["copy_gb_per_s"] = 2 * read_bytes / _best_s(lambda: target.copy_(source)) / 1e9  # read and written
    return figures


def _best_s(work: Callable[[], object]) -> float:
    """The first call warms up, and counts where it is all that fits: without bfloat16 in hardware one product takes
    longer than everything else here."""
    seconds: list[float] = []
    while len(seconds) <= REPEATS and sum(seconds) < BUDGET_S:
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
