"""The frame of every bulk job: what is already there, what is to do, and the output that loses nothing on the way.

It runs in the cluster of $RAY_ADDRESS, which `ray job submit` sets, else in one of its own on this machine. A cluster
with token authentication is asked with the token of $RAY_AUTH_TOKEN or ~/.ray/auth_token.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, get_args

import pyarrow as pa
from ray.exceptions import RayError

from batch_jobs import failpoints
from batch_jobs.failpoints import FailpointHook, no_failpoint
from batch_jobs.inputs import RawRow, read_rows
from batch_jobs.outputs import FLUSH_S, RowSink
from batch_jobs.pipeline import Limits, Pool
from batch_jobs.report import Report
from batch_jobs.row_errors import ErrorKind
from batch_jobs.stages import Decoder, Generator, Row
from batch_jobs.state import JobState, PageStore
from minigpt5.commands import check_default_model, check_kept
from minigpt5.config import ModelConfig, default_model_folder
from minigpt5.engine.load import load_engine
from minigpt5.engine.vllm.settings import VLLM_PYTHON, VllmSettings
from minigpt5.errors import MiniGPT5Error, StorageError
from minigpt5.limits import default_limits
from minigpt5.model.folder_config import check_folder
from minigpt5.model.locate import check_bases, locate, shared_name
from minigpt5.story.stream import describe
from minigpt5.types import DecoderBackend, Precision, TextPrecision

REPORT_S = 5.0


class HasId(Protocol):
    @property
    def id(self) -> str: ...


@dataclass(kw_only=True)
class Output:
    """Where a job puts its rows, and what it keeps beside them."""

    sink: RowSink
    state: JobState
    store: PageStore
    plan: dict[str, Any]
    """What makes this job this job: a second run must have the same."""
    earlier: dict[str, Any] = field(default_factory=dict)
    """What an earlier version noted in the place of some values of the plan."""
    failpoint: FailpointHook = no_failpoint

    @classmethod
    def at(
        cls,
        uri: str,
        schema: pa.Schema,
        plan: dict[str, Any],
        *,
        earlier: dict[str, Any] | None = None,
        keeps_pictures: bool = False,
        flush_s: float = FLUSH_S,
        failpoint: FailpointHook = no_failpoint,
    ) -> Output:
        check_kept(uri, option="--output")
        state, store = JobState(uri), PageStore(uri, keeps_pictures=keeps_pictures)
        sink = RowSink(uri, schema, store=store, flush_s=flush_s, check=state.check_owner, failpoint=failpoint)
        return cls(sink=sink, state=state, store=store, plan=plan, earlier=earlier or {}, failpoint=failpoint)

    def check_unused(self) -> None:
        """Raise MiniGPT5Error where rows, pages, pictures or books lie here. For a job that begins: it would take those
        of another job for its own, because it knows them by the ids of their rows."""
        left = [*([self.sink.uri] if self.sink.written() else []), *self.store.left_over()]
        if left:
            raise MiniGPT5Error(
                f"{', '.join(left)}: files of an earlier job lie there, but {self.state.output}.state/manifest.json, "
                "which says what job that was, does not: move or delete them, or name another output"
            )


def work(
    items: Iterable[HasId],
    output: Output,
    make: Callable[[list[Any], Report], Iterable[Row | None]],
    *,
    max_errors: int | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """Do all items that `output` does not hold yet. `make` gives finished rows, in any order, and None now and then.

    A job that an earlier run finished is left alone: `Report.skipped` is all of it. A row that met a failing store is
    not put into the output, and the job is not finished. Raises MiniGPT5Error where the output is another job's, or
    holds what another one left, and what `items` raises.
    """
    if output.state.is_finished(output.plan, earlier=output.earlier):
        manifest = output.state.manifest() or {}
        return Report(rows=manifest["rows"], skipped=manifest["rows"])
    items = list(items)  # before anything is written: an input that cannot be read leaves the output free
    if output.state.manifest() is None:
        output.check_unused()
    was_begun = output.state.take(output.plan)
    try:
        done = output.sink.written()
        if was_begun:
            output.failpoint("recovering")
            output.sink.sweep()
            kept = output.store.drop_all_but({item.id for item in items} - done.keys())
            say(f"going on: {len(done)} of {len(items)} rows are there, {kept} more are begun")
        new = [item for item in items if item.id not in done]
        report = Report(rows=len(items), skipped=len(items) - len(new))
        _take_in(make(new, report) if new else (), output, report, max_errors=max_errors, say=say)
        if report.stopped_at is None and not report.left:
            errors = sum(error is not None for error in output.sink.written().values())
            output.state.finish({**report.counts(), "done": len(items), "errors": errors, "skipped": report.skipped})
            output.store.drop_all_but(set())
        return report
    finally:
        with contextlib.suppress(OSError):
            output.state.release()


def _take_in(
    rows: Iterable[Row | None], output: Output, report: Report, *, max_errors: int | None, say: Callable[[str], None]
) -> None:
    """Rows into the sink, with a line now and then."""
    started = said = time.monotonic()
    try:
        for row in rows:
            output.state.heartbeat()
            if row is not None and row.get("kind") == ErrorKind.STORAGE:
                report.leave(row)
            elif row is not None:
                output.sink.add(row)
                report.add(row)
            output.sink.tick()
            report.seconds = time.monotonic() - started
            if max_errors is not None and report.errors + report.left > max_errors:
                report.stopped_at = report.errors + report.left
                break
            if time.monotonic() - said >= REPORT_S:
                said = time.monotonic()
                say(report.progress())
    finally:
        output.sink.flush()


def load_generator(
    folder: str,
    num_threads: int,
    num_gpus: float = 0.0,
    vllm: VllmSettings | None = None,
    precision: TextPrecision | None = None,
) -> Generator:
    """A generator on the GPU that Ray gives its actor, else on the CPU: without one it may see those of others. With
    `vllm`, vLLM writes; where its own process is gone, the actor ends too."""
    device = "cuda" if num_gpus else "cpu"
    limits = default_limits(device, gpu_share=min(1.0, num_gpus or 1.0))
    return load_engine(
        folder,
        num_threads=num_threads,
        device=device,
        limits=limits,
        precision=precision,
        vllm=vllm,
        on_death=lambda: os._exit(1),
    )


def load_decoder(
    folder: str,
    num_threads: int,
    num_gpus: float = 0.0,
    precision: Precision | None = None,
    backend: DecoderBackend = "auto",
) -> Decoder:
    """As `load_generator`."""
    from minigpt5.engine.decoder import DiffusionDecoder

    device = "cuda" if num_gpus else "cpu"
    return DiffusionDecoder.from_pretrained(
        folder, num_threads=num_threads, device=device, precision=precision, backend=backend
    )


def check_model(folder: str) -> tuple[str, ModelConfig]:
    """Return the model's name for the engines and its config, after a look whether all that it needs is here."""
    local = locate(folder)
    check_default_model(local)
    config = check_folder(local)
    check_bases(local, config)
    return shared_name(folder), config


def precisions(options: argparse.Namespace) -> dict[str, str]:
    """Those that are set, as part of a job's plan: half of the rows in another precision would be another job."""
    values = vars(options)
    return {name: values[name] for name in ("generator_precision", "decoder_precision") if values.get(name)}


def generator_pool(options: argparse.Namespace, model: str) -> Pool:
    min_engines, max_engines = options.generators
    num_engines = max_engines + getattr(options, "decoders", (0, 0))[1]
    num_threads = max(1, (os.cpu_count() or 1) // num_engines)
    if options.vllm and options.generator_precision:
        raise MiniGPT5Error(
            f"--generator-precision is {options.generator_precision} but vLLM computes in the precision of the "
            "exported folder: leave it out"
        )
    vllm = VllmSettings(folder=os.path.abspath(options.vllm), python=options.vllm_python) if options.vllm else None
    return Pool(
        load=partial(load_generator, model, num_threads, options.generator_gpus, vllm, options.generator_precision),
        min_engines=min_engines,
        max_engines=max_engines,
        num_gpus=options.generator_gpus,
        python=os.path.abspath(options.vllm_python) if options.vllm else "",
    )


def decoder_pool(options: argparse.Namespace, model: str) -> Pool:
    min_engines, max_engines = options.decoders
    # Drawing gains most from threads; the decoder gives back those whose cores others need (engine/threads.py).
    num_threads = max(1, (os.cpu_count() or 1) // max_engines)
    load = partial(
        load_decoder, model, num_threads, options.decoder_gpus, options.decoder_precision, options.decoder_backend
    )
    return Pool(load=load, min_engines=min_engines, max_engines=max_engines, num_gpus=options.decoder_gpus)


def limits(options: argparse.Namespace) -> Limits:
    return Limits(max_deaths=options.max_restarts, start_timeout_s=options.start_timeout)


def new_parser(name: str, about: str, *, generators: bool, decoders: bool) -> argparse.ArgumentParser:
    """The options that jobs share."""
    parser = argparse.ArgumentParser(
        prog=f"python -m batch_jobs.{name}", description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", required=True, help="folder or URI of the parquet data set; state lies beside it")
    parser.add_argument("--model", default=str(default_model_folder()), help="model folder (default %(default)s)")
    for is_asked, pool, what in ((generators, "generator", "write and read"), (decoders, "decoder", "draw")):
        if is_asked:
            parser.add_argument(
                f"--{pool}s",
                type=pool_size,
                default=(1, 1),
                metavar="N|MIN:MAX",
                help=f"actors that {what} (default 1)",
            )
            parser.add_argument(f"--{pool}-gpus", type=float, default=0.0, help="GPUs of each of them (default 0)")
    if decoders:
        parser.add_argument(
            "--decoder-precision",
            choices=get_args(Precision),
            help="of the denoiser and the VAE (default float32, on a GPU bfloat16)",
        )
        parser.add_argument(
            "--decoder-backend",
            choices=get_args(DecoderBackend),
            default="auto",
            help="what computes them (default: OpenVINO, on a GPU eager)",
        )
    if generators:
        parser.add_argument(
            "--generator-precision",
            choices=get_args(TextPrecision),
            help="of the language model (default: the faster of float32 and int4, on a GPU bfloat16)",
        )
        parser.add_argument("--vllm", metavar="FOLDER", help="vLLM writes, with what was exported of the model")
        parser.add_argument(
            "--vllm-python", default=str(VLLM_PYTHON), metavar="PATH", help="its interpreter (default %(default)s)"
        )
    parser.add_argument("--max-errors", type=int, help="give up when more rows than this fail (default: never)")
    parser.add_argument("--max-restarts", type=int, default=20, help="give up after more engine deaths (default 20)")
    parser.add_argument(
        "--start-timeout", type=float, default=600.0, help="seconds until engines are ready (default 600)"
    )
    parser.add_argument(
        "--flush-seconds", type=float, default=FLUSH_S, help="rows reach the output in (default %(default)g)"
    )
    return parser


def pool_size(text: str) -> tuple[int, int]:
    """Read N, or MIN:MAX of a pool that grows."""
    minimum, _, maximum = text.partition(":")
    sizes = int(minimum), int(maximum or minimum)
    if not 1 <= sizes[0] <= sizes[1]:
        raise argparse.ArgumentTypeError(f"{text} but must be 1 or more, or MIN:MAX")
    return sizes


def read_table(uri: str, *, known: tuple[str, ...], needed: tuple[str, ...]) -> list[RawRow]:
    """All rows of an input; columns that are not `known` are told on stderr.

    Raises StorageError where there is no row, or none of the columns of which a row needs one.
    """
    rows = list(read_rows(uri))
    if not rows:
        raise StorageError(f"{uri} has no rows: was it written to its end?")
    columns = {str(name) for row in rows for name in row.values}
    if columns and not columns & set(needed):
        there = ", ".join(map(repr, sorted(columns)))
        raise StorageError(
            f"{uri} has the columns {there:.400} and no {' or '.join(needed)}: rename the one that holds it (commas "
            "separate the columns of a CSV file)"
        )
    if unknown := sorted(columns - set(known)):
        print(f"columns without a meaning here, ignored: {', '.join(unknown)}", file=sys.stderr)
    return rows


def run_command(run: Callable[[argparse.Namespace, FailpointHook], Report], options: argparse.Namespace) -> int:
    """A job as a command: its report, or its error in one line. The exit code: 2 for what the caller can put right."""
    try:
        report = run(options, failpoints.from_environment())
    except MiniGPT5Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RayError as error:
        print(f"error: Ray gave up: {describe(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what is stored stays, and the same command goes on from there", file=sys.stderr)
        return 130
    print(f"{report}\noutput: {options.output}", flush=True)
    if report.stopped_at is not None:
        print(f"error: gave up after {report.stopped_at} errors, see --max-errors", file=sys.stderr)
        return 1
    if report.left:
        print(
            f"error: {report.left} rows are left, because a store failed ({report.left_because}): the same command "
            "does them",
            file=sys.stderr,
        )
        return 1
    return 0
