"""`python -m batch_jobs.redraw STORIES --output DIR --steps 50`: draws the pictures of an illustrated data set again.

STORIES is what `batch_jobs.illustrate` wrote. Its texts stay, its stored vokens are drawn with the settings that are
given here; the language model is not asked.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import get_args

import pyarrow as pa
import ray.data
from pyarrow import ArrowException, dataset, fs, parquet

from batch_jobs.failpoints import FailpointHook
from batch_jobs.inputs import check_seed, earlier_plan
from batch_jobs.job import Output, check_model, decoder_pool, limits, new_parser, precisions, run_command, work
from batch_jobs.outputs import STORY_SCHEMA, Gathered
from batch_jobs.pipeline import (
    ROWS_PER_DECODER,
    Limits,
    Pool,
    RemoteMonitor,
    check_capacity,
    connect,
    finished_rows,
    map_with_pool,
)
from batch_jobs.report import Report
from batch_jobs.row_errors import ErrorKind
from batch_jobs.stages import CLOSING_PAGE, DRAW_COLUMNS, PAGE_SCHEMA, Draw, Row
from minigpt5.errors import MiniGPT5Error, StorageError
from minigpt5.model.decoders.noise import SAMPLERS
from minigpt5.storage import open_place
from minigpt5.story.stream import page_seed
from minigpt5.story.voken_file import unpack
from minigpt5.types import Consistency, DrawSettings

COLUMNS = [
    *("id", "prompt", "seed", "error", "kind"),
    *(f"pages.list.element.{name}" for name in ("index", "text", "vokens", "seed", "error")),
]
"""All that a job reads of the data set. Most of its bytes are pictures, which are not among them."""


@dataclass(frozen=True, kw_only=True)
class StoredStory:
    """A row of the data set, without its pages."""

    id: str
    prompt: str
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """A file of the data set -> the pages of its stories, each with the settings that it gets, and closing rows."""

    uri: str
    ids: frozenset[str]
    """Stories that are to be drawn."""
    settings: DrawSettings
    seed: int | None
    """Seed of all stories; None: each picture keeps its own."""
    consistency: Consistency = "off"

    def tables(self, files: pa.Table) -> Iterator[pa.Table]:
        """Each page by itself, so that all decoders share a story's."""
        filesystem, _ = open_place(self.uri)
        for path in files["path"].to_pylist():
            for story in _stories(path, filesystem):
                if story["id"] in self.ids:
                    yield from (pa.Table.from_pylist([row], schema=PAGE_SCHEMA) for row in self.pages(story))

    def pages(self, story: Row) -> Iterator[Row]:
        drawn = dataclasses.asdict(self.settings)
        reference: Row = {}
        for page in story["pages"]:
            seed = page["seed"] if self.seed is None else page_seed(self.seed, page["index"])
            texts = {"text": page["text"], "vokens": page["vokens"]}
            yield {"id": story["id"], "page": page["index"], "seed": seed, **texts, **drawn, **reference}
            if self.consistency == "story" and not reference and page["vokens"]:
                reference = {"reference": page["vokens"], "reference_seed": seed}
        error = None if error_kind(story).is_of_a_picture else story["error"]
        closing = {"page": CLOSING_PAGE, "num_pages": len(story["pages"]), "seconds": 0.0}
        yield {"id": story["id"], **closing, "error": error, "kind": ErrorKind.EARLIER_JOB if error else None}


def error_kind(story: Row) -> ErrorKind:
    """The kind of a story's error. Data sets of version 0.1 do not store it: there, an error of a page is its
    picture's."""
    if kind := story.get("kind"):
        return ErrorKind(kind)
    return ErrorKind.DRAWING if any(page["error"] for page in story["pages"]) else ErrorKind.WRITING


def redraw(
    stories: list[StoredStory],
    report: Report,
    *,
    uri: str,
    settings: DrawSettings,
    seed: int | None,
    consistency: Consistency,
    pool: Pool,
    limits: Limits,
    output: Output,
) -> Iterator[Row | None]:
    """Output rows as they come to be."""
    connect(pool.min_engines)
    check_capacity(pool.min_engines)
    monitor = RemoteMonitor()
    gathered = {story.id: Gathered(story.id, story.prompt, story.seed if seed is None else seed) for story in stories}
    files = ray.data.from_arrow(pa.table({"path": parts(uri)}), override_num_blocks=len(parts(uri)))
    files.context.target_max_block_size = 1
    files.context.enable_progress_bars = False
    files.set_name("redraw")
    fetch = Fetch(uri=uri, ids=frozenset(gathered), settings=settings, seed=seed, consistency=consistency)
    pages = files.map_batches(fetch.tables, batch_size=None, batch_format="pyarrow", num_cpus=0.25)
    drawn = map_with_pool(
        pages,
        Draw,
        pool=pool,
        concurrency_per_actor=ROWS_PER_DECODER,
        store=output.store,
        watch=monitor,
        failpoint=output.failpoint,
    )
    for row in finished_rows(drawn, monitor, limits, report, pools={"decoder": pool}):
        if row is None:
            yield None
        elif gathered[row["id"]].add(row):
            yield gathered.pop(row["id"]).story()


def parts(uri: str) -> list[str]:
    """The data set's files. Raises StorageError where there are none."""
    try:
        filesystem, folder = open_place(uri)
        found = filesystem.get_file_info(fs.FileSelector(folder))
    except (OSError, ArrowException) as error:
        raise StorageError(f"{uri} cannot be read ({error}): name the output of batch_jobs.illustrate") from error
    paths = sorted(info.path for info in found if info.base_name.startswith("part-"))
    if not paths:
        raise StorageError(f"{uri} holds no stories: name the output of batch_jobs.illustrate")
    return paths


def _stories(path: str, filesystem: fs.FileSystem) -> Iterator[Row]:
    """Rows of a file, without their pictures."""
    for batch in parquet.ParquetFile(path, filesystem=filesystem).iter_batches(16, columns=COLUMNS):
        yield from batch.to_pylist()


def digest_of_stories(uri: str) -> str:
    """Hash all that a job reads of the data set, texts and vokens among it: a second run must get the same. Pictures
    are neither read nor hashed. Raises StorageError."""
    filesystem, _ = open_place(uri)
    digest = hashlib.sha256()
    try:
        for path in parts(uri):
            for story in _stories(path, filesystem):
                digest.update(json.dumps(story, default=lambda data: hashlib.sha256(data).hexdigest()).encode())
    except (OSError, ArrowException) as error:
        raise StorageError(f"{uri} cannot be read ({error}): name the output of batch_jobs.illustrate") from error
    return digest.hexdigest()


def read_stories(uri: str, *, fingerprint: str) -> Iterator[StoredStory]:
    """Raises StorageError, also where two rows have the same id, and MiniGPT5Error where another model's vokens are
    stored."""
    filesystem, _ = open_place(uri)
    try:
        table = dataset.dataset(parts(uri), filesystem=filesystem).to_table(["id", "prompt", "seed"])
        vokens = _first_vokens(uri)
    except (OSError, ArrowException) as error:
        raise StorageError(f"{uri} cannot be read ({error}): name the output of batch_jobs.illustrate") from error
    twice = next((id for id, count in Counter(table["id"].to_pylist()).items() if count > 1), None)
    if twice is not None:
        raise StorageError(f"{uri} has two rows with the id {twice!r}: remove one of them")
    if vokens and unpack(vokens, page=1).fingerprint != fingerprint:
        raise MiniGPT5Error(f"the vokens of {uri} are another model's: name with --model the one that wrote them")
    yield from (StoredStory(**row) for row in table.to_pylist())


def _first_vokens(uri: str) -> bytes | None:
    """Those of the first page that has any; its picture and those of other pages are not read."""
    filesystem, _ = open_place(uri)
    for path in parts(uri):
        file = parquet.ParquetFile(path, filesystem=filesystem)
        for batch in file.iter_batches(16, columns=["pages.list.element.vokens"]):
            for row in batch.to_pylist():
                if found := next((page["vokens"] for page in row["pages"] if page["vokens"]), None):
                    return found
    return None


def main(arguments: list[str] | None = None) -> int:
    return run_command(run, make_parser().parse_args(arguments))


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("redraw", __doc__ or "", generators=False, decoders=True)
    parser.add_argument("input", help="output of batch_jobs.illustrate, path or URI")
    parser.add_argument("--pictures", choices=("rows", "files"), default="rows", help="as in batch_jobs.illustrate")
    parser.add_argument("--seed", type=int, help="of all stories, 0 or more (default: each picture keeps its own)")
    parser.add_argument("--steps", type=int, help="denoising steps, 1 to 100 (default: the model's)")
    parser.add_argument("--guidance-scale", type=float, help="1 to 20 (default: the model's)")
    parser.add_argument("--scheduler", choices=tuple(SAMPLERS), help="(default: the model's)")
    parser.add_argument("--width", type=int, help="pixels (default: the model's)")
    parser.add_argument("--height", type=int, help="pixels (default: the model's)")
    parser.add_argument("--style", help="one of the model's style adapters (default: the model's)")
    parser.add_argument(
        "--consistency",
        choices=get_args(Consistency),
        help="story: pages are drawn with the first one beside them (default: the model's)",
    )
    return parser


def run(options: argparse.Namespace, failpoint: FailpointHook) -> Report:
    """Check all that can be checked at once, then work."""
    check_seed(options.seed)
    model, config = check_model(options.model)
    asked = {name: getattr(options, name) for name in DRAW_COLUMNS}
    chosen = config.draw_settings({name: value for name, value in asked.items() if value is not None})
    if not (1 <= chosen.steps <= 100 and 1 <= chosen.guidance_scale <= 20):
        raise MiniGPT5Error(
            f"--steps is {chosen.steps} and --guidance-scale {chosen.guidance_scale:g} but must be from 1 to 100 and "
            "from 1 to 20"
        )
    plan = {
        "job": "redraw",
        "input_sha256": digest_of_stories(options.input),
        "model": config.fingerprint,
        "pictures": options.pictures,
        "steps": chosen.steps,
        "guidance_scale": chosen.guidance_scale,
        "scheduler": chosen.scheduler,
        "seed": options.seed,
        **precisions(options),
    }
    if chosen.width or chosen.height:  # a job of version 0.2 names no size
        plan |= {"width": chosen.width, "height": chosen.height}
    if chosen.style:  # nor a style
        plan |= {"style": chosen.style}
    if (consistency := config.consistency_of(options.consistency)) != "off":  # nor consistency
        plan |= {"consistency": consistency}
    if config.is_resampled(chosen):
        print(f"pictures are drawn in the model's own size, {config.drawn_px}x{config.drawn_px}, and resampled")
    keeps = options.pictures == "files"
    output = Output.at(
        options.output,
        STORY_SCHEMA,
        plan,
        earlier=earlier_plan(options.input),
        keeps_pictures=keeps,
        flush_s=options.flush_seconds,
        failpoint=failpoint,
    )
    make = partial(
        redraw,
        uri=options.input,
        settings=chosen,
        seed=options.seed,
        consistency=consistency,
        pool=decoder_pool(options, model),
        limits=limits(options),
        output=output,
    )
    stories = read_stories(options.input, fingerprint=config.fingerprint)
    return work(stories, output, make, max_errors=options.max_errors, say=partial(print, flush=True))


if __name__ == "__main__":
    sys.exit(main())
