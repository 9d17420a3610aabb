"""Where stored rows lie, and the order in which a run uses them: a pure function of the seed.

The index holds numbers for each row group and none for each row, so that its size and the cost of a row depend little
on the number of rows. An epoch's order shuffles the groups, and then the rows within windows of some groups, so that a
reader needs few groups at a time.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyarrow import fs, parquet

from minigpt5.errors import TrainingError
from minigpt5.objective.stored_example import ROW_SCHEMA

WINDOW_GROUPS = 8
VALIDATION_SHARE = 50
"""One row of so many is never trained on: those whose id's hash says so."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A row by its group, and by its number among those of the group that are trained on, or that are not."""

    group: int
    number: int


@dataclass(frozen=True, kw_only=True, eq=False)
class RowIndex:
    """The row groups of a data set, and how many of each one's rows a run uses."""

    paths: list[str]
    first_groups: np.ndarray
    """The number of each file's first group."""
    sizes: np.ndarray
    """Rows of each group that are used."""

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def group_at(self, group: int) -> tuple[str, int]:
        """The file of a group, and its number there."""
        file = int(np.searchsorted(self.first_groups, group, side="right")) - 1
        return self.paths[file], group - int(self.first_groups[file])


def index_rows(files: fs.FileSystem, paths: list[str]) -> tuple[RowIndex, RowIndex]:
    """Read the ids of all rows once, a file at a time: the rows that are trained on, and those that never are.

    Raises TrainingError where a file holds other rows.
    """
    first_groups, training, validation = [], list[int](), list[int]()
    for path in paths:
        first_groups.append(len(training))
        for size, num_held_out in _count_held_out(files, path):
            training.append(size - num_held_out)
            validation.append(num_held_out)
    starts = np.array(first_groups, np.int64)
    return (
        RowIndex(paths=paths, first_groups=starts, sizes=np.array(training, np.int32)),
        RowIndex(paths=paths, first_groups=starts, sizes=np.array(validation, np.int32)),
    )


def _count_held_out(files: fs.FileSystem, path: str) -> list[tuple[int, int]]:
    """Rows of each group of a file, and how many of them are never trained on. Raises TrainingError."""
    with files.open_input_file(path) as file:
        reader = parquet.ParquetFile(file)
        if not set(ROW_SCHEMA.names) <= set(reader.schema_arrow.names):
            raise TrainingError(f"{path} has no training rows: make them with python -m batch_jobs.prepare")
        ids = reader.read(columns=["id"])["id"]
        sizes = [reader.metadata.row_group(number).num_rows for number in range(reader.num_row_groups)]
    starts = np.cumsum([0, *sizes])
    return [
        (size, int(is_validation(ids.slice(int(start), size)).sum()))
        for start, size in zip(starts[:-1], sizes, strict=True)
    ]


def is_validation(ids: pa.ChunkedArray) -> np.ndarray:
    """Which rows are never trained on."""
    hashes = [hashlib.sha256(one.encode()).digest() for one in ids.to_pylist()]
    starts = np.frombuffer(b"".join(hashes), ">u4").reshape(-1, 8)[:, 0]
    return starts % VALIDATION_SHARE == 0


class RowOrder:
    """The order of all epochs. A window's order is made when its first row is asked for."""

    def __init__(self, sizes: np.ndarray, seed: int) -> None:
        """`sizes`: rows of each group."""
        self.sizes, self.seed = sizes, seed
        self.num_rows = int(sizes.sum())
        self._epoch = functools.lru_cache(maxsize=1)(self._new_epoch)
        self._window = functools.lru_cache(maxsize=2)(self._new_window)

    def place_at(self, position: int) -> Place:
        """The row at a position, counted over epochs."""
        epoch, at = divmod(position, self.num_rows)
        _, ends = self._epoch(epoch)
        window = int(np.searchsorted(ends, at, side="right"))
        groups, numbers = self._window(epoch, window)
        at -= int(ends[window - 1]) if window else 0
        return Place(group=int(groups[at]), number=int(numbers[at]))

    def _new_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The groups in their order, and where each window of them ends."""
        groups = np.random.default_rng([self.seed, epoch]).permutation(len(self.sizes))
        ends = np.cumsum(self.sizes[groups], dtype=np.int64)
        return groups, np.append(ends[WINDOW_GROUPS - 1 : -1 : WINDOW_GROUPS], ends[-1])

    def _new_window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The group of each row of a window, and the row's number in it."""
        order, _ = self._epoch(epoch)
        groups = order[window * WINDOW_GROUPS : (window + 1) * WINDOW_GROUPS]
        sizes = self.sizes[groups]
        shuffled = np.random.default_rng([self.seed, epoch, window]).permutation(int(sizes.sum()))
        numbers = np.concatenate([np.arange(size) for size in sizes])
        return np.repeat(groups, sizes)[shuffled], numbers[shuffled]
