"""Rows by their id -> batches by their step: the same rows in a plain process and in a Ray Data pipeline."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np

from training.loop import Batch

Row = Callable[[int], Batch]


def collate(rows: list[Batch], row_ids: list[int]) -> Batch:
    """Arrays of equal shape are stacked, everything else becomes a list."""
    batch: Batch = {"row_ids": row_ids}
    for key in rows[0]:
        values = [row[key] for row in rows]
        batch[key] = np.stack(values) if isinstance(values[0], np.ndarray) else values
    return batch


def local_batches(row: Row, batch_size: int) -> Callable[[int], Iterator[Batch]]:
    """Batches made by a thread of this process, a few ahead. Row ids go on without end."""

    def batches(step: int) -> Iterator[Batch]:
        ahead: queue.Queue[Batch | Exception] = queue.Queue(maxsize=4)

        def produce() -> None:
            start = step * batch_size
            try:
                while True:
                    ids = list(range(start, start + batch_size))
                    ahead.put(collate([row(i) for i in ids], ids))
                    start += batch_size
            except Exception as failure:
                ahead.put(failure)

        threading.Thread(target=produce, daemon=True).start()
        while True:
            batch = ahead.get()
            if isinstance(batch, Exception):
                raise batch
            yield batch

    return batches
