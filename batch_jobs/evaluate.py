"""`python -m batch_jobs.evaluate PROTOCOL --model FOLDER --data ROWS --out DIR`: how good a system is, by a protocol.

ROWS is the output of `batch_jobs.prepare`, or the item file of a benchmark. Answers come into DIR/answers, row by row;
the same command goes on where it was stopped. At the end they are measured: DIR/metrics.json and DIR/report.html.
A finished run is measured again, with what --clip and --inception name now, and asks nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray.data

from batch_jobs.asking import ANSWER_SCHEMA, ROWS_PER_SYSTEM, Ask
from batch_jobs.evaluation_rows import Block, Fetch, RowReader, RowSource, blocks_of, open_rows
from batch_jobs.failpoints import FailpointHook
from batch_jobs.inputs import check_seed
from batch_jobs.job import Output, limits, new_parser, pool_size, run_command, work
from batch_jobs.measuring import Judging, measure, write_submission
from batch_jobs.pipeline import Limits, Pool, RemoteMonitor, check_capacity, connect, finished_rows, map_with_pool
from batch_jobs.report import Report
from batch_jobs.stages import Row
from minigpt5.commands import positive
from minigpt5.errors import InvalidRequest
from minigpt5.evaluation.judge import Judge
from minigpt5.evaluation.protocols.protocol import Protocol, Settings
from minigpt5.evaluation.protocols.scorers import load_scorers
from minigpt5.evaluation.protocols.table import PROTOCOLS
from minigpt5.evaluation.systems.face import System
from minigpt5.evaluation.systems.load import SystemInfo, load_system, read_system
from minigpt5.types import MAX_SIDE, MIN_SIDE

FORMAT = 1
"""Raised by one whenever the same rows would be asked otherwise than before."""
JUDGE_KEY = "JUDGE_API_KEY"
"""Environment variable with the judge's key, where it wants one."""


@dataclass(frozen=True)
class Asked:
    """A row with questions that have no answers yet."""

    id: str


def ask_on_ray(
    rows: list[Asked],
    report: Report,
    *,
    protocol: Protocol,
    settings: Settings,
    source: RowSource,
    index: dict[str, Block],
    pool: Pool,
    limits: Limits,
    output: Output,
) -> Iterator[Row | None]:
    """Output rows in the order in which they are answered."""
    connect(pool.min_engines)
    check_capacity(pool.min_engines, pool.num_gpus)
    monitor = RemoteMonitor()
    blocks = blocks_of(index, [row.id for row in rows])
    dataset = ray.data.from_arrow(blocks, override_num_blocks=blocks.num_rows)
    dataset.context.target_max_block_size = 1
    dataset.context.enable_progress_bars = False
    dataset.set_name("evaluate")
    fetched = dataset.map_batches(Fetch(source=source).tables, batch_size=None, batch_format="pyarrow", num_cpus=0.25)
    answered = map_with_pool(
        fetched,
        Ask,
        pool=pool,
        concurrency_per_actor=ROWS_PER_SYSTEM,
        protocol=protocol.name,
        settings=settings,
        watch=monitor,
        failpoint=output.failpoint,
    )
    yield from finished_rows(answered, monitor, limits, report, pools={"system": pool})


def load(folder: str, num_threads: int, num_gpus: float) -> System:
    """A system on the GPU that Ray gives its actor, else on the CPU: without one it may see those of others."""
    return load_system(folder, num_threads=num_threads, device="cuda" if num_gpus else "cpu")


def main(arguments: list[str] | None = None) -> int:
    return run_command(run, make_parser().parse_args(arguments))


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("evaluate", __doc__ or "", generators=False, decoders=False)
    about = "\n".join(f"{name}: {one.about}" for name, one in PROTOCOLS.items())
    parser.add_argument("protocol", choices=tuple(PROTOCOLS), metavar="PROTOCOL", help=about)
    parser.add_argument("--data", required=True, metavar="ROWS", help="folder, file or URI")
    parser.add_argument("--limit", type=positive, help="so many rows at most, the first ones")
    parser.add_argument("--seed", type=int, default=0, help="of all questions (default %(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps, 1 to 100 (default: the model's)")
    parser.add_argument("--guidance", type=float, help="1 to 20 (default: the model's)")
    for side in ("width", "height"):
        parser.add_argument(f"--{side}", type=int, help=f"{side} of pictures in pixels (default: the model's)")
    parser.add_argument("--clip", metavar="FOLDER|ID", help="a CLIP model's folder or hub id")
    parser.add_argument("--inception", metavar="FILE", help="Inception-v3 as ONNX or OpenVINO, see docs/evaluation.md")
    parser.add_argument("--device", default="cpu", help="where CLIP measures, on this machine (default %(default)s)")
    parser.add_argument(
        "--systems", type=pool_size, default=(1, 1), metavar="N|MIN:MAX", help="actors that answer (default 1)"
    )
    parser.add_argument("--system-gpus", type=float, default=0.0, help="GPUs of each of them (default 0)")
    parser.add_argument(
        "--judge",
        metavar="URL",
        help=f"of a server with OpenAI's interface, up to /v1; its key is read from ${JUDGE_KEY} (interleave)",
    )
    parser.add_argument("--judge-model", default="", help="the judge's name there")
    parser.add_argument("--judge-timeout", type=float, default=120.0, help="seconds of one request (default 120)")
    parser.add_argument(
        "--judge-limit", type=positive, default=200, help="answers that are judged at most (default 200)"
    )
    return parser


def run(options: argparse.Namespace, failpoint: FailpointHook) -> Report:
    """Check all that can be checked at once, ask, then measure."""
    check_seed(options.seed)
    protocol = PROTOCOLS[options.protocol]
    info = _system(options, protocol)
    judging = _judging(options, protocol)
    source = open_rows(options.data)
    index = source.index()
    ids = list(index)[: options.limit]
    if not ids:
        raise InvalidRequest("data", f"data is {options.data} and has no rows: name others")
    scorers = load_scorers(
        protocol.metrics + protocol.of_rows, clip=options.clip, inception=options.inception, device=options.device
    )
    settings = Settings(seed=options.seed, sampling=info.sampling, draw=info.draw, reads_pictures=info.reads_pictures)
    plan = {
        "job": "evaluate",
        "format": FORMAT,
        "protocol": protocol.name,
        "data_sha256": source.digest(),
        "limit": options.limit,
        "system": info.version or info.name,
        "settings": dataclasses.asdict(settings),
    }
    plan |= {"kind": info.kind} if info.kind else {}  # rivals of one model folder share its version
    folder = options.output.rstrip("/")
    output = Output.at(f"{folder}/answers", ANSWER_SCHEMA, plan, flush_s=options.flush_seconds, failpoint=failpoint)
    num_threads = max(1, (os.cpu_count() or 1) // options.systems[1])
    pool = Pool(
        load=partial(load, info.folder, num_threads, options.system_gpus),
        min_engines=options.systems[0],
        max_engines=options.systems[1],
        num_gpus=options.system_gpus,
    )
    make = partial(
        ask_on_ray,
        protocol=protocol,
        settings=settings,
        source=source,
        index=index,
        pool=pool,
        limits=limits(options),
        output=output,
    )
    report = work(
        [Asked(one) for one in ids], output, make, max_errors=options.max_errors, say=partial(print, flush=True)
    )
    if report.stopped_at is None and not report.left:
        reader = RowReader(source, index)
        about = {
            "system": {"name": info.name, "version": info.version},
            "data": options.data,
            "clip": options.clip,
            "inception": options.inception,
            "judge": options.judge_model or None,
        }
        if protocol.name == "interleave":
            print(f"submission: {write_submission(output.sink, reader, folder, model=info.name)}")
        metrics = measure(
            protocol, scorers, output.sink, reader, folder, settings=settings, about=about, judging=judging
        )
        print(_table(metrics))
    return report


def _system(options: argparse.Namespace, protocol: Protocol) -> SystemInfo:
    """Raises InvalidRequest where the system does not answer what is asked."""
    bounds = {"steps": (1, 100), "guidance": (1, 20), "width": (MIN_SIDE, MAX_SIDE), "height": (MIN_SIDE, MAX_SIDE)}
    for name, (least, most) in bounds.items():
        asked = getattr(options, name)
        if asked is not None and not least <= asked <= most:
            raise InvalidRequest(name, f"--{name} is {asked:g} but must be from {least} to {most}")
    changes = {
        "steps": options.steps,
        "guidance_scale": options.guidance,
        "width": options.width,
        "height": options.height,
    }
    info = read_system(options.model, {name: value for name, value in changes.items() if value is not None})
    if unanswered := protocol.kinds - info.kinds:
        raise InvalidRequest(
            "protocol",
            f"{protocol.name} asks for {', '.join(sorted(unanswered))}, which {info.name} does not answer: choose "
            "another protocol",
        )
    return info


def _judging(options: argparse.Namespace, protocol: Protocol) -> Judging | None:
    if not options.judge:
        return None
    if "judge" not in protocol.metrics or not options.judge_model:
        raise InvalidRequest("judge", "--judge needs the protocol interleave, and the judge's name with --judge-model")
    judge = Judge(
        url=options.judge,
        model=options.judge_model,
        key=os.environ.get(JUDGE_KEY, ""),
        timeout_s=options.judge_timeout,
    )
    return Judging(judge=judge, limit=options.judge_limit)


def _table(metrics: dict[str, Any]) -> str:
    lines = []
    for one in metrics["metrics"]:
        ends = "" if one["low"] is None else f"  [{one['low']:.4f}, {one['high']:.4f}]"
        lines.append(f"  {one['group']:16} {one['metric']:28} {one['mean']:10.4f}{ends}  n {one['n']}")
    lines += [f"  not judged: {count} answers ({why})" for why, count in metrics["unjudged"].items()]
    lines += [f"  not measured: {name} ({why})" for name, why in metrics["missing"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
