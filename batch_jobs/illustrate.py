"""`python -m batch_jobs.illustrate prompts.jsonl --output DIR`: every row of a file becomes an illustrated story.

A row with a `prompt` is written and drawn; a row with `pages_text` is a finished story: its text stays as it is and
each page gets its picture. A row without a seed gets one from its prompt, so that every run makes the same stories,
and the same as a server for that seed. A second run does what the first has left, from the page where it stopped.

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python -m batch_jobs.illustrate s3://bucket/prompts.jsonl --output s3://bucket/stories
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from batch_jobs import books
from batch_jobs.failpoints import FailpointHook
from batch_jobs.inputs import COLUMNS, BadRow, StoryJob, check_rows, digest_of, earlier_plan
from batch_jobs.job import (
    Output,
    check_model,
    decoder_pool,
    generator_pool,
    limits,
    new_parser,
    precisions,
    read_table,
    run_command,
    work,
)
from batch_jobs.outputs import STORY_SCHEMA, Gathered, bad_story
from batch_jobs.pipeline import (
    ROWS_PER_DECODER,
    Limits,
    Pool,
    RemoteMonitor,
    check_capacity,
    connect,
    finished_rows,
    map_with_pool,
    new_dataset,
)
from batch_jobs.report import Report
from batch_jobs.stages import Draw, Row, Write, as_table
from minigpt5.config import ModelConfig

MakePages = Callable[[list[StoryJob], Report], Iterable[Row | None]]


@dataclass(frozen=True, kw_only=True)
class Engines:
    """Both pools, and when they have failed."""

    generator: Pool
    decoder: Pool
    limits: Limits = Limits()


def illustrate(
    rows: Iterable[StoryJob | BadRow],
    output: Output,
    *,
    make_pages: MakePages,
    max_errors: int | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """Write and draw all rows that `output` does not hold yet. `make_pages` gives the rows of a job's pages, the
    closing one included, in any order; it is asked only where there is a story to write."""
    return work(rows, output, partial(_stories, make_pages=make_pages), max_errors=max_errors, say=say)


def _stories(rows: list[StoryJob | BadRow], report: Report, *, make_pages: MakePages) -> Iterator[Row | None]:
    """Output rows as they come to be: bad rows at once, stories when their last page is drawn."""
    yield from (bad_story(row) for row in rows if isinstance(row, BadRow))
    jobs = [row for row in rows if isinstance(row, StoryJob)]
    if not jobs:
        return
    gathered = {job.id: Gathered(job.id, job.prompt, job.seed) for job in jobs}
    for row in make_pages(jobs, report):
        story = gathered.get(row["id"]) if row else None
        if row is None:
            yield None
        elif story and story.add(row):
            del gathered[row["id"]]
            yield story.story()


def make_pages_on_ray(
    jobs: list[StoryJob], report: Report, *, config: ModelConfig, engines: Engines, output: Output
) -> Iterator[Row | None]:
    """The pipeline: jobs -> written pages -> drawn pages, in the order in which they are finished."""
    num_engines = engines.generator.min_engines + engines.decoder.min_engines
    connect(num_engines)
    check_capacity(num_engines)
    monitor = RemoteMonitor()
    common: dict[str, Any] = {"store": output.store, "watch": monitor, "failpoint": output.failpoint}
    written = map_with_pool(
        new_dataset(as_table(jobs), name="illustrate"),
        Write,
        pool=engines.generator,
        concurrency_per_actor=engines.generator.rows_per_generator,
        sampling=config.sampling,
        **common,
    )
    drawn = map_with_pool(written, Draw, pool=engines.decoder, concurrency_per_actor=ROWS_PER_DECODER, **common)
    pools = {"generator": engines.generator, "decoder": engines.decoder}
    yield from finished_rows(drawn, monitor, engines.limits, report, pools=pools)


def main(arguments: list[str] | None = None) -> int:
    return run_command(run, make_parser().parse_args(arguments))


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("illustrate", __doc__ or "", generators=True, decoders=True)
    parser.add_argument(
        "input", help=f"JSON lines, CSV or parquet, or a folder of them, path or URI; columns {', '.join(COLUMNS)}"
    )
    parser.add_argument(
        "--pictures",
        choices=("rows", "files"),
        default="rows",
        help="in the rows, or files that rows name (default rows)",
    )
    parser.add_argument(
        "--books", action="store_true", help="an HTML and an EPUB book of each story and an index page, too"
    )
    return parser


def run(options: argparse.Namespace, failpoint: FailpointHook) -> Report:
    """Check all that can be checked at once, then work."""
    model, config = check_model(options.model)
    plan = {
        "job": "illustrate",
        "input_sha256": digest_of(options.input),
        "model": config.fingerprint,
        "pictures": options.pictures,
        **precisions(options),
    }
    engines = Engines(
        generator=generator_pool(options, model), decoder=decoder_pool(options, model), limits=limits(options)
    )
    output = Output.at(
        options.output,
        STORY_SCHEMA,
        plan,
        earlier=earlier_plan(options.input),
        keeps_pictures=options.pictures == "files",
        flush_s=options.flush_seconds,
        failpoint=failpoint,
    )
    report = illustrate(
        _read(options.input, config),
        output,
        make_pages=partial(make_pages_on_ray, config=config, engines=engines, output=output),
        max_errors=options.max_errors,
        say=partial(print, flush=True),
    )
    if options.books:
        print(f"books: {books.write_books(output.sink, model=config.name)}")
    return report


def _read(uri: str, config: ModelConfig) -> Iterator[StoryJob | BadRow]:
    yield from check_rows(read_table(uri, known=COLUMNS, needed=("prompt", "pages_text")), config)


if __name__ == "__main__":
    sys.exit(main())
