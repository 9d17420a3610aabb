"""Pages in any order -> whole stories -> a parquet data set that grows while the job runs.

A file is put in place when it is whole, so that after any crash the data set holds stories that are finished and
nothing else: a later run asks for the ids in it and leaves those out.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

import pyarrow as pa
from pyarrow import ArrowException, dataset, fs, parquet

from batch_jobs.inputs import BadRow, StoryJob, open_uri
from batch_jobs.stages import CLOSING_PAGE, Row
from minigpt5.errors import StorageError

PAGE = pa.struct(
    {
        "index": pa.int32(),
        "text": pa.string(),
        "png": pa.binary(),
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
        "error": pa.string(),
        "seconds": pa.float64(),  # what the engines worked on the story, writing and drawing added up
    }
)
FLUSH_BYTES = 32 * 2**20
"""A file of this size is worth a file of its own, on object stores too."""
FLUSH_S = 30.0
"""A crash costs no more than the stories of this time."""


@dataclass
class Gathered:
    """What has arrived of one story."""

    job: StoryJob
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
        """A row of STORY_SCHEMA. Its error is its own, else that of its first page without a picture."""
        assert self.closing is not None
        pages = [self.pages[index] for index in sorted(self.pages)]
        failed = (f"page {page['page']} has no picture: {page['error']}" for page in pages if page["error"])
        return {
            "id": self.job.id,
            "prompt": self.job.prompt,
            "seed": self.job.seed,
            "pages": [{"index": page["page"], **{name: page[name] for name in PAGE.names[1:]}} for page in pages],
            "error": self.closing["error"] or next(failed, None),
            "seconds": self.closing["seconds"] + sum(page["seconds"] for page in pages),
        }


def bad_story(row: BadRow) -> Row:
    """The output row of an input row that cannot become a story."""
    return {"id": row.id, "prompt": row.prompt, "seed": None, "pages": [], "error": row.error, "seconds": 0.0}


class StorySink:
    """A parquet data set under a folder or URI.

    Example: sink = StorySink("s3://bucket/stories"); sink.add(story); sink.flush()
    """

    def __init__(self, uri: str) -> None:
        """Raises StorageError where `uri` cannot be written."""
        self.uri = uri
        self._files, self._folder = open_uri(uri)
        self._rows: list[Row] = []
        self._num_bytes = 0
        self._flushed_at = time.monotonic()
        try:
            self._files.create_dir(self._folder, recursive=True)
        except (OSError, ArrowException) as error:
            raise self._failure("cannot be written", error) from error

    def written_ids(self) -> set[str]:
        """Ids of the stories that earlier runs finished. Raises StorageError where other data lies there."""
        try:
            found = self._files.get_file_info(fs.FileSelector(self._folder))
            paths = [info.path for info in found if info.base_name.startswith("part-")]
            if not paths:
                return set()
            table = dataset.dataset(paths, filesystem=self._files, schema=STORY_SCHEMA).to_table(columns=["id"])
        except (OSError, ArrowException) as error:
            raise self._failure("cannot be read", error) from error
        return set(table["id"].to_pylist())

    def add(self, story: Row) -> None:
        self._rows.append(story)
        self._num_bytes += sum(len(page["png"] or b"") + len(page["vokens"] or b"") for page in story["pages"])
        if self._num_bytes >= FLUSH_BYTES or time.monotonic() - self._flushed_at >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Put what was added in place as one more file."""
        self._flushed_at = time.monotonic()
        if not self._rows:
            return
        name = f"part-{secrets.token_hex(8)}.parquet"
        # Readers of parquet data sets pass over names that begin with a dot.
        written, final = f"{self._folder}/.{name}", f"{self._folder}/{name}"
        try:
            table = pa.Table.from_pylist(self._rows, schema=STORY_SCHEMA)
            parquet.write_table(table, written, filesystem=self._files, compression="zstd")
            self._files.move(written, final)
        except (OSError, ArrowException) as error:
            raise self._failure("cannot be written", error) from error
        self._rows, self._num_bytes = [], 0

    def _failure(self, what: str, error: Exception) -> StorageError:
        return StorageError(f"output {self.uri} {what} ({error}): name another folder or URI, or give it permission")
