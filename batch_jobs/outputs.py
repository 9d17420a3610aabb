"""Pages in any order -> whole stories -> a parquet data set that grows while the job runs.

A file is put in place when it is whole, so that after any crash the data set holds rows that are finished and
nothing else: a later run asks for the ids in it and leaves those out. Pictures are read from where the decoders stored
them when the file is written, so that a job holds none of those that are finished.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa
from pyarrow import ArrowException, dataset, fs, parquet

from batch_jobs.failpoints import FailpointHook, no_failpoint
from batch_jobs.inputs import BadRow
from batch_jobs.row_errors import ErrorKind
from batch_jobs.stages import CLOSING_PAGE, Row
from batch_jobs.state import PageStore
from minigpt5.errors import StorageError
from minigpt5.storage import open_folder, unusable, write_whole

PAGE = pa.struct(
    {
        "index": pa.int32(),
        "text": pa.string(),
        "png": pa.binary(),  # null where `uri` says where it lies
        "uri": pa.string(),
        "vokens": pa.binary(),  # safetensors
        "seed": pa.int64(),
        "error": pa.string(),
    }
)
STORY_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "prompt": pa.string(),
        "seed": pa.int64(),
        "pages": pa.list_(PAGE),
        # What the engines worked on the story: pictures that share a batch count their whole time each.
        "timings": pa.struct({"write_s": pa.float64(), "draw_s": pa.float64()}),
        "error": pa.string(),
        "kind": pa.string(),  # of the error: see batch_jobs.stages.ErrorKind; null in data sets of version 0.1
    }
)
DESCRIPTION_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "image": pa.string(),  # its place; null where the input row held the picture itself
        "question": pa.string(),
        "caption": pa.string(),
        "timings": pa.struct({"describe_s": pa.float64()}),
        "error": pa.string(),
    }
)
FLUSH_BYTES = 32 * 2**20
"""A file of this size is worth a file of its own, on object stores too."""
FLUSH_S = 30.0
"""A row is in the data set at most so long after it was finished. A crash costs none: its pages are stored."""
PICTURE_BYTES = 32 * 2**10
"""What a picture is reckoned at before it is read."""


@dataclass
class Gathered:
    """What has arrived of one story."""

    id: str
    prompt: str
    seed: int | None
    pages: dict[int, Row] = field(default_factory=dict)
    closing: Row | None = None

    def add(self, row: Row) -> bool:
        """Take a row in; whether the story is whole now."""
        if row["page"] == CLOSING_PAGE:
            self.closing = row
        else:
            self.pages[row["page"]] = row
        return self.closing is not None and len(self.pages) == self.closing["num_pages"]

    def story(self) -> Row:
        """A row of STORY_SCHEMA, but for its pictures. Its error is its own, else of its first page without one; that
        of a store comes before all others, for it leaves the story to the next run."""
        assert self.closing is not None
        pages = [self.pages[index] for index in sorted(self.pages)]
        parts = [self.closing, *pages]
        failed = sorted(
            (part for part in parts if part["error"]), key=lambda part: part.get("kind") != ErrorKind.STORAGE
        )
        error, kind = (_reason(failed[0]), failed[0].get("kind")) if failed else (None, None)
        return {
            "id": self.id,
            "prompt": self.prompt,
            "seed": self.seed,
            "pages": [{"index": page["page"], **page} for page in pages],
            "timings": {
                "write_s": self.closing["seconds"],
                "draw_s": sum(page["seconds"] or 0.0 for page in pages),
            },
            "error": error,
            "kind": kind,
        }


def _reason(failed: Row) -> str:
    """Why a story has an error, by its closing row or a page."""
    if failed["page"] == CLOSING_PAGE:
        return str(failed["error"])
    return f"page {failed['page']} has no picture: {failed['error']}"


def bad_story(row: BadRow) -> Row:
    """The output row of an input row that cannot become a story."""
    timings = {"write_s": 0.0, "draw_s": 0.0}
    return {
        "id": row.id,
        "prompt": row.prompt,
        "pages": [],
        "timings": timings,
        "error": row.error,
        "kind": ErrorKind.INPUT,
    }


class RowSink:
    """A parquet data set under a folder or URI, of rows that have an `id`.

    Example: sink = RowSink("s3://bucket/stories", STORY_SCHEMA, store=store); sink.add(story); sink.flush()
    """

    def __init__(
        self,
        uri: str,
        schema: pa.Schema,
        *,
        store: PageStore,
        flush_s: float = FLUSH_S,
        check: Callable[[], None] = lambda: None,
        failpoint: FailpointHook = no_failpoint,
    ) -> None:
        """`check` raises where nothing may be written any more. Raises StorageError where `uri` cannot be written."""
        self.uri, self.schema, self.store = uri, schema, store
        self._flush_s, self._check, self._failpoint = flush_s, check, failpoint
        self._files, self._folder = open_folder(uri)
        self._rows: list[Row] = []
        self._num_bytes = 0
        self._flushed_at = time.monotonic()

    def written(self) -> dict[str, str | None]:
        """Ids of the rows that earlier runs finished, with their errors. Raises StorageError where other data lies
        there."""
        try:
            paths = self._paths()
            if not paths:
                return {}
            data = dataset.dataset(paths, filesystem=self._files, schema=self.schema)
            table = data.to_table(["id", "error"])
        except (OSError, ArrowException) as error:
            raise self._failure("cannot be read", error) from error
        return dict(zip(table["id"].to_pylist(), table["error"].to_pylist(), strict=True))

    def rows(self) -> Iterator[Row]:
        """All rows in place, one file at a time in memory."""
        for path in self._paths():
            yield from parquet.read_table(path, filesystem=self._files, schema=self.schema).to_pylist()

    def add(self, row: Row) -> None:
        self._rows.append(row)
        self._num_bytes += row.get("size_bytes") or 0
        self._num_bytes += sum(PICTURE_BYTES + len(page["vokens"] or b"") for page in row.get("pages", []))
        if self._num_bytes >= FLUSH_BYTES:
            self.flush()
        self.tick()

    def tick(self) -> None:
        """Flush where it is time."""
        if time.monotonic() - self._flushed_at >= self._flush_s:
            self.flush()

    def flush(self) -> None:
        """Put what was added in place as one more file, then let go of what was stored for it."""
        self._flushed_at = time.monotonic()
        if not self._rows:
            return
        try:
            table = pa.Table.from_pylist([self._with_pictures(row) for row in self._rows], schema=self.schema)
            content = pa.BufferOutputStream()
            parquet.write_table(table, content, compression="zstd")
            name = f"part-{secrets.token_hex(8)}.parquet"
            write_whole(self._files, f"{self._folder}/{name}", content.getvalue(), check=self._check_owner)
            rows, self._rows, self._num_bytes = self._rows, [], 0  # whatever follows, they are written once
            self._failpoint("part-written")
            for row in rows:
                self.store.drop(row["id"])
        except (OSError, ArrowException) as error:
            raise self._failure("cannot be written", error) from error

    def _check_owner(self) -> None:
        self._failpoint("part-hidden")
        self._check()

    def sweep(self) -> None:
        """Delete what a run that was killed had begun to write."""
        for info in self._files.get_file_info(fs.FileSelector(self._folder)):
            if info.base_name.startswith(".part-"):
                self._files.delete_file(info.path)

    def _with_pictures(self, row: Row) -> Row:
        return (
            {**row, "pages": [self._with_picture(row["id"], page) for page in row["pages"]]} if "pages" in row else row
        )

    def _with_picture(self, story: str, page: Row) -> Row:
        if not page["has_picture"]:
            return page
        if self.store.keeps_pictures:
            return {**page, "uri": self.store.picture_uri(story, page["index"])}
        png = self.store.load_picture(story, page["index"])
        if png is None:
            raise self._failure("has lost a picture", FileNotFoundError(f"page {page['index']} of {story!r}"))
        return {**page, "png": png}

    def _paths(self) -> list[str]:
        found = self._files.get_file_info(fs.FileSelector(self._folder))
        return sorted(info.path for info in found if info.base_name.startswith("part-"))

    def _failure(self, what: str, error: Exception) -> StorageError:
        return unusable(f"output {self.uri}", what, error)
