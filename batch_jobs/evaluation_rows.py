"""What a protocol reads: rows of `batch_jobs.prepare`, or the item file of a benchmark, by blocks of some rows.

A block is what one task reads: a row group of a parquet file, or some items. Ids are read first, pictures when their
row's turn has come.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import pyarrow as pa
from pyarrow import ArrowException, fs, parquet

from batch_jobs.dataset_readers import Source
from batch_jobs.inputs import digest_of
from minigpt5.errors import InvalidRequest, StorageError
from minigpt5.evaluation.protocols.items import MAX_FILE_BYTES, Item, parse_items, to_row
from minigpt5.objective.stored_example import SEGMENT
from minigpt5.storage import open_place

BLOCK_ITEMS = 16
SEGMENT_FIELDS = ("text", "speaker", "picture", "caption")
EVALUATION_ROW = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        "kind": pa.string(),
        "prompt": pa.string(),
        "segments": pa.list_(pa.struct([SEGMENT.field(name) for name in SEGMENT_FIELDS])),
        "golden": pa.list_(pa.struct({"text": pa.string()})),  # of a benchmark's item; null is a picture
        "item": pa.string(),  # the benchmark's own JSON
        "problem": pa.string(),  # why the row cannot be asked
    }
)
TEXTS = ["id", "prompt", "segments.list.element.text", "segments.list.element.caption"]
"""Columns that take no time to read."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """A file, and which of its row groups or runs of items."""

    file: str
    number: int


class RowSource(Protocol):
    """Rows at a place. Cheap to send to another process."""

    def digest(self) -> str:
        """What tells this data from other data."""
        ...

    def index(self) -> dict[str, Block]:
        """Every id with its block, in order; a second row of an id is left out. Raises StorageError."""
        ...

    def load(self, block: Block) -> list[Row]:
        """Rows of EVALUATION_ROW. Raises StorageError."""
        ...


def open_rows(uri: str) -> RowSource:
    """Prepared rows where `uri` is the output of `batch_jobs.prepare` or its folder of parquet files, else the items of
    a file. Raises StorageError, InvalidRequest."""
    files, path = open_place(uri)
    if files.get_file_info(path).type == fs.FileType.File:
        return ItemFile(uri=uri)
    for folder in (f"{path}/rows", path):
        found = files.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        names = sorted(info.path for info in found if info.path.endswith(".parquet"))
        if names:
            return PreparedRows(uri=uri, files=tuple(names))
    raise StorageError(f"{uri} holds no rows: name the output of batch_jobs.prepare, or the item file of a benchmark")


@dataclass(frozen=True, kw_only=True)
class PreparedRows:
    uri: str
    files: tuple[str, ...]

    def digest(self) -> str:
        """Of its files' names and sizes, and of all ids and texts: a folder that is copied is the same data. Pictures
        are not read for it, which would take as long as the job."""
        files, _ = open_place(self.uri)
        found = hashlib.sha256()
        for info in files.get_file_info(list(self.files)):
            found.update(repr((info.base_name, info.size)).encode())
            file = self._open(info.path)
            for number in range(file.num_row_groups):
                found.update(json.dumps(self._read(file, info.path, number, TEXTS).to_pylist()).encode())
        return found.hexdigest()

    def index(self) -> dict[str, Block]:
        found: dict[str, Block] = {}
        for name in self.files:
            file = self._open(name)
            for number in range(file.num_row_groups):
                for row_id in self._read(file, name, number, ["id"])["id"].to_pylist():
                    found.setdefault(row_id, Block(name, number))
        return found

    def load(self, block: Block) -> list[Row]:
        columns = ["id", "source", "kind", "prompt", *(f"segments.list.element.{name}" for name in SEGMENT_FIELDS)]
        rows = self._read(self._open(block.file), block.file, block.number, columns).to_pylist()
        return [{**row, "golden": None, "item": None, "problem": None} for row in rows]

    def _open(self, name: str) -> parquet.ParquetFile:
        files, _ = open_place(self.uri)
        try:
            return parquet.ParquetFile(name, filesystem=files)
        except (OSError, ArrowException) as error:
            raise StorageError(f"{name} cannot be read ({error}): prepare the rows again") from error

    def _read(self, file: parquet.ParquetFile, name: str, number: int, columns: list[str]) -> pa.Table:
        try:
            table = file.read_row_group(number, columns=columns)
        except (OSError, ArrowException) as error:
            raise StorageError(f"{name} cannot be read ({error}): prepare the rows again") from error
        if missing := {column.partition(".")[0] for column in columns} - set(table.column_names):
            raise StorageError(f"{name} has no {', '.join(sorted(missing))}: name the output of batch_jobs.prepare")
        return table


@dataclass(frozen=True, kw_only=True)
class ItemFile:
    uri: str

    def digest(self) -> str:
        return digest_of(self.uri)

    def index(self) -> dict[str, Block]:
        found: dict[str, Block] = {}
        for number, item in enumerate(_items(self.uri)):
            found.setdefault(item.id, Block(self.uri, number // BLOCK_ITEMS))
        return found

    def load(self, block: Block) -> list[Row]:
        source, start = Source(self.uri), block.number * BLOCK_ITEMS
        return [self._row(item, source) for item in _items(self.uri)[start : start + BLOCK_ITEMS]]

    def _row(self, item: Item, source: Source) -> Row:
        try:
            return {**to_row(item, source.read), "problem": None}
        except InvalidRequest as problem:
            empty = dict.fromkeys(EVALUATION_ROW.names)
            return {**empty, "id": item.id, "source": item.form, "kind": "question", "problem": str(problem)}


@lru_cache(maxsize=1)
def _items(uri: str) -> list[Item]:
    """Parsed once in a process, for all of its blocks."""
    source = Source(uri)
    with source.open(source.name) as file:
        return parse_items(file.read(MAX_FILE_BYTES + 1), name=source.name)


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Blocks -> their rows, one by one, so that all engines share them."""

    source: RowSource

    def tables(self, blocks: pa.Table) -> Iterator[pa.Table]:
        for block in blocks.to_pylist():
            yield from (
                pa.Table.from_pylist([row], schema=EVALUATION_ROW)
                for row in chosen(self.source.load(Block(block["file"], block["number"])), block["ids"])
            )


def chosen(rows: list[Row], ids: Collection[str]) -> Iterator[Row]:
    """The rows of these ids, each once."""
    left = set(ids)
    for row in rows:
        if row["id"] in left:
            left.remove(row["id"])
            yield row


def blocks_of(index: Mapping[str, Block], ids: Collection[str]) -> pa.Table:
    """Blocks with those of `ids` that lie in them, as `Fetch` reads them."""
    wanted: dict[Block, list[str]] = {}
    for row_id in ids:
        wanted.setdefault(index[row_id], []).append(row_id)
    rows = [{"file": block.file, "number": block.number, "ids": own} for block, own in wanted.items()]
    return pa.Table.from_pylist(rows)


class RowReader:
    """Rows by their ids, a block at a time in memory."""

    def __init__(self, source: RowSource, index: Mapping[str, Block]) -> None:
        self.source, self.index = source, index
        self._block: Block | None = None
        self._rows: dict[str, Row] = {}

    def __getitem__(self, row_id: str) -> Row:
        block = self.index[row_id]
        if block != self._block:
            self._block, self._rows = block, {}
            for row in self.source.load(block):
                self._rows.setdefault(row["id"], row)
        return self._rows[row_id]
