"""`python -m batch_jobs.illustrate prompts.jsonl --output DIR`: every prompt of a file becomes an illustrated story.

Two pools of actors on Ray Data, one that writes and one that draws; pages go from one to the other as they are
written, and each story is stored when it is whole. A second run does what the first has left. A row without a seed
gets one from its prompt, so that every run makes the same stories, and the same as a server for that seed.

It runs in the cluster of $RAY_ADDRESS, which `ray job submit` sets, else in one of its own on this machine. A cluster
with token authentication is asked with the token of $RAY_AUTH_TOKEN or ~/.ray/auth_token:

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 -- \\
        python -m batch_jobs.illustrate s3://bucket/prompts.jsonl --output s3://bucket/stories
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError

from batch_jobs.inputs import COLUMNS, BadRow, StoryJob, check_rows, read_rows
from batch_jobs.outputs import Gathered, StorySink, bad_story
from batch_jobs.stages import Decoder, Draw, Generator, Row, Write
from minigpt5.base_models import resolve
from minigpt5.config import ModelConfig, default_model_folder
from minigpt5.errors import MiniGPT5Error
from minigpt5.flow import describe
from minigpt5.model_folder import check_folder

ENGINE_CPUS = 0.5
"""What an engine asks of Ray: on two cores both pools and a spare actor find a place."""
STORIES_AT_ONCE = 4
"""Stories that one generator has open: its pages keep the decoders busy while a story ends."""
PICTURES_AT_ONCE = 8
"""Pictures that one decoder has open: it draws those that wait together in one batch."""
MAX_BLOCKS = 4096
"""Blocks of a job's input: one story each, up to this many."""
REPORT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Engines:
    """How each pool is made. The callables run in the actors."""

    load_generator: Callable[[], Generator]
    load_decoder: Callable[[], Decoder]
    num_generators: int = 1
    num_decoders: int = 1


@dataclass
class Report:
    """What a run did."""

    rows: int = 0
    skipped: int = 0
    """Rows that an earlier run has finished."""
    stories: int = 0
    errors: int = 0
    pictures: int = 0
    seconds: float = 0.0
    stopped_at: int | None = None
    """The number of errors at which the run gave up."""

    def add(self, story: Row) -> None:
        self.errors += story["error"] is not None
        self.stories += bool(story["pages"])
        self.pictures += sum(page["png"] is not None for page in story["pages"])

    def __str__(self) -> str:
        rate = self.stories / self.seconds if self.seconds else 0.0
        return (
            f"{self.rows} rows, {self.skipped} already there, {self.errors} errors, {self.pictures} pictures, "
            f"{self.stories} stories in {self.seconds:.1f} s: {rate:.2f} stories/s"
        )


def illustrate(
    rows: Iterable[StoryJob | BadRow],
    sink: StorySink,
    *,
    make_pages: Callable[[list[StoryJob]], Iterable[Row]],
    max_errors: int | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """Write and draw all rows that `sink` does not hold yet. `make_pages` gives the rows of a job's pages, the closing
    one included, in any order; it is asked only where there is a story to write."""
    done = sink.written_ids()
    rows = list(rows)
    new = [row for row in rows if row.id not in done]
    report = Report(rows=len(rows), skipped=len(rows) - len(new))
    started = said = time.monotonic()
    try:
        for story in _stories(new, make_pages):
            sink.add(story)
            report.add(story)
            report.seconds = time.monotonic() - started
            if max_errors is not None and report.errors > max_errors:
                report.stopped_at = report.errors
                break
            if time.monotonic() - said >= REPORT_S:
                said = time.monotonic()
                say(str(report))
    finally:
        sink.flush()
    return report


def _stories(rows: list[StoryJob | BadRow], make_pages: Callable[[list[StoryJob]], Iterable[Row]]) -> Iterator[Row]:
    """Output rows as they come to be: bad rows at once, stories when their last page is drawn."""
    yield from (bad_story(row) for row in rows if isinstance(row, BadRow))
    jobs = [row for row in rows if isinstance(row, StoryJob)]
    if not jobs:
        return
    gathered = {job.id: Gathered(job) for job in jobs}
    for row in make_pages(jobs):
        story = gathered.get(row["id"])
        if story and story.add(row):
            del gathered[row["id"]]
            yield story.story()


def make_pages_on_ray(jobs: list[StoryJob], *, config: ModelConfig, engines: Engines) -> Iterable[Row]:
    """The pipeline: jobs -> written pages -> drawn pages, in the order in which they are finished."""
    connect(engines.num_generators + engines.num_decoders)
    table = pa.Table.from_pylist([asdict(job) for job in jobs])
    stories = ray.data.from_arrow(table, override_num_blocks=min(len(jobs), MAX_BLOCKS))
    stories.context.target_max_block_size = 1  # a block for each page: it is drawn while the next one is written
    stories.context.enable_progress_bars = False
    written = stories.map_batches(
        Write,
        fn_constructor_args=(engines.load_generator, config.sampling),
        compute=_pool(engines.num_generators, STORIES_AT_ONCE),
        num_cpus=ENGINE_CPUS,
        batch_size=None,
        batch_format="pyarrow",
    )
    drawn = written.map_batches(
        Draw,
        fn_constructor_args=(engines.load_decoder, config.draw.scheduler),
        compute=_pool(engines.num_decoders, PICTURES_AT_ONCE),
        num_cpus=ENGINE_CPUS,
        batch_size=None,
        batch_format="pyarrow",
    )
    return drawn.iter_rows()


def _pool(size: int, num_at_once: int) -> ActorPoolStrategy:
    """Actors that take several rows at once, each row on its own thread, and hold no further ones back."""
    return ActorPoolStrategy(
        size=size,
        max_concurrent_calls_per_actor=num_at_once,
        max_tasks_in_flight_per_actor=num_at_once,
        enable_true_multi_threading=True,
    )


def load_generator(folder: str, num_threads: int) -> Generator:
    from minigpt5.generator import VokenGenerator

    return VokenGenerator.from_pretrained(folder, num_threads=num_threads)


def load_decoder(folder: str, num_threads: int) -> Decoder:
    from minigpt5.decoder import DiffusionDecoder

    return DiffusionDecoder.from_pretrained(folder, num_threads=num_threads)


def connect(num_engines: int) -> None:
    """Join the cluster of $RAY_ADDRESS, else start one here with logical CPUs to spare; once in a process."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of a coming change
    if ray.is_initialized():
        pass
    elif os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    else:
        spare = int(num_engines * ENGINE_CPUS) + 2
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, spare),
            object_store_memory=512 * 2**20,  # pages pass through, they do not stay
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    asked, there = num_engines * ENGINE_CPUS, ray.cluster_resources().get("CPU", 0)
    if asked > there:
        raise MiniGPT5Error(
            f"{num_engines} engines need {asked:g} CPUs but the cluster has {there:g}: ask for fewer --generators and "
            "--decoders, or add nodes"
        )


def main(arguments: list[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    try:
        report = run(options)
    except MiniGPT5Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RayError as error:
        print(f"error: Ray gave up: {describe(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what is stored stays, and the same command goes on from there", file=sys.stderr)
        return 130
    print(f"{report}\noutput: {options.output}")
    if report.stopped_at is not None:
        print(f"error: gave up after {report.stopped_at} errors, see --max-errors", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m batch_jobs.illustrate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("prompts", help=f"JSON lines, CSV or parquet, path or URI; columns {', '.join(COLUMNS)}")
    parser.add_argument("--output", required=True, help="folder or URI of the parquet data set")
    parser.add_argument("--model", default=str(default_model_folder()), help="model folder (default %(default)s)")
    parser.add_argument("--generators", type=positive, default=1, help="actors that write (default %(default)s)")
    parser.add_argument("--decoders", type=positive, default=1, help="actors that draw (default %(default)s)")
    parser.add_argument("--max-errors", type=int, help="give up when more rows than this fail (default: never)")
    return parser


def run(options: argparse.Namespace) -> Report:
    """Check all that can be checked at once, then work."""
    model = str(Path(options.model).expanduser().absolute())
    config = check_folder(model)
    for base_model in (config.language_model, config.vision.encoder):
        resolve(base_model)
    rows = list(read_rows(options.prompts))
    unknown = sorted({str(name) for row in rows for name in row.values} - set(COLUMNS))
    if unknown:
        print(f"columns without a meaning here, ignored: {', '.join(unknown)}", file=sys.stderr)
    num_threads = max(1, (os.cpu_count() or 1) // (options.generators + options.decoders))
    engines = Engines(
        load_generator=partial(load_generator, model, num_threads),
        load_decoder=partial(load_decoder, model, num_threads),
        num_generators=options.generators,
        num_decoders=options.decoders,
    )
    return illustrate(
        check_rows(rows, draw=config.draw),
        StorySink(options.output),
        make_pages=partial(make_pages_on_ray, config=config, engines=engines),
        max_errors=options.max_errors,
        say=partial(print, flush=True),
    )


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} but must be 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
