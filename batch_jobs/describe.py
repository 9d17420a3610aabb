"""`python -m batch_jobs.describe pictures.jsonl --output DIR`: every picture of a file gets its caption.

A row has an `image` (a path, a URI, a data URL, or bytes in parquet) and, if wanted, an `id` and a `question`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial

from batch_jobs.failpoints import FailpointHook
from batch_jobs.inputs import DESCRIBE_COLUMNS, BadRow, ImageJob, check_image_rows, digest_of, earlier_plan
from batch_jobs.job import (
    Output,
    check_model,
    generator_pool,
    limits,
    new_parser,
    precisions,
    read_table,
    run_command,
    work,
)
from batch_jobs.outputs import DESCRIPTION_SCHEMA
from batch_jobs.pipeline import (
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
from batch_jobs.row_errors import ErrorKind
from batch_jobs.stages import Row, Tell, as_table
from minigpt5.config import ModelConfig
from minigpt5.engine.prompts import check_text

QUESTION = "Describe this image."
"""What the model was trained to be asked."""


def describe(
    rows: list[ImageJob | BadRow], report: Report, *, config: ModelConfig, pool: Pool, limits: Limits
) -> Iterator[Row | None]:
    """Output rows as they come to be: bad rows at once."""
    for bad in rows:
        if isinstance(bad, BadRow):
            yield {"id": bad.id, "timings": {"describe_s": 0.0}, "error": bad.error, "kind": ErrorKind.INPUT}
    jobs = [row for row in rows if isinstance(row, ImageJob)]
    if not jobs:
        return
    connect(pool.min_engines)
    check_capacity(pool.min_engines)
    monitor = RemoteMonitor()
    told = map_with_pool(
        new_dataset(as_table(jobs), name="describe"),
        Tell,
        pool=pool,
        concurrency_per_actor=pool.rows_per_generator,
        watch=monitor,
        sampling=config.sampling,
    )
    for row in finished_rows(told, monitor, limits, report, pools={"generator": pool}):
        yield row and {**row, "timings": {"describe_s": row["seconds"]}}


def main(arguments: list[str] | None = None) -> int:
    return run_command(run, make_parser().parse_args(arguments))


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("describe", __doc__ or "", generators=True, decoders=False)
    parser.add_argument(
        "input",
        help=f"JSON lines, CSV or parquet, or a folder of them, path or URI; columns {', '.join(DESCRIBE_COLUMNS)}",
    )
    parser.add_argument("--question", default=QUESTION, help="of rows without one (default %(default)s)")
    return parser


def run(options: argparse.Namespace, failpoint: FailpointHook) -> Report:
    """Check all that can be checked at once, then work."""
    check_text("--question", options.question)
    model, config = check_model(options.model)
    plan = {
        "job": "describe",
        "input_sha256": digest_of(options.input),
        "model": config.fingerprint,
        "question": options.question,
        **precisions(options),
    }
    make = partial(describe, config=config, pool=generator_pool(options, model), limits=limits(options))
    output = Output.at(
        options.output,
        DESCRIPTION_SCHEMA,
        plan,
        earlier=earlier_plan(options.input),
        flush_s=options.flush_seconds,
        failpoint=failpoint,
    )
    return work(
        _read(options.input, options.question),
        output,
        make,
        max_errors=options.max_errors,
        say=partial(print, flush=True),
    )


def _read(uri: str, question: str) -> Iterator[ImageJob | BadRow]:
    rows = read_table(uri, known=DESCRIBE_COLUMNS, needed=("image",))
    yield from check_image_rows(rows, question=question)


if __name__ == "__main__":
    sys.exit(main())
