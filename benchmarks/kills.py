"""Jobs that are killed at seeded random moments, and run again until they end: what was lost, doubled or changed.

    worker   one of the two engines' processes, while the job goes on
    raylet   the raylet of a second node, with the engines on it; a new one comes
    driver   the process that reads the input and writes the output; Ray goes on
    job      the driver and its whole Ray
    point    each point of batch_jobs/failpoints.py, in whichever process reaches it first

The engines are the real classes at tiny size. Every finished job is compared with the same stories made by the same
stages in one process, one after another and without a kill: where the texts are alike, pixels are to be within one
level. Texts are alike but where a choice was close (`minigpt5/engine/steps.py`), which the tiny model, whose words are
all about as likely, has far more often than a trained one: those pages are counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from pyarrow import parquet

from batch_jobs.failpoints import POINTS, VARIABLE
from minigpt5.story.voken_file import unpack

ROOT = Path(__file__).parent.parent
NUM_STORIES, NUM_PAGES, STEPS = 24, 3, 30
KINDS = ("worker", "raylet", "driver", "job")
ROUND_S = 150.0
"""A job that takes longer is stuck."""


def write_input(folder: Path) -> Path:
    rows = [
        {"id": f"story-{n}", "prompt": f"A fox and {n} balloons", "pages": NUM_PAGES, "seed": n, "steps": STEPS}
        for n in range(NUM_STORIES)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def run_job(source: str, output: str) -> None:
    """The driver: `batch_jobs.illustrate` with tiny engines."""
    from batch_jobs import failpoints, illustrate
    from batch_jobs.inputs import check_rows, read_rows
    from batch_jobs.job import Output
    from batch_jobs.outputs import STORY_SCHEMA
    from batch_jobs.pipeline import Limits, Pool
    from benchmarks.bulk_engines import load_tiny_decoder, load_tiny_generator
    from tests.helpers.tiny import tiny_config

    config = tiny_config()
    place = Output.at(output, STORY_SCHEMA, {"job": "kills"}, flush_s=1.0, failpoint=failpoints.from_environment())
    engines = illustrate.Engines(
        generator=Pool(load=load_tiny_generator), decoder=Pool(load=load_tiny_decoder), limits=Limits(max_deaths=1000)
    )
    report = illustrate.illustrate(
        check_rows(read_rows(source), config),
        place,
        make_pages=partial(illustrate.make_pages_on_ray, config=config, engines=engines, output=place),
        say=partial(print, flush=True),
    )
    print(report, flush=True)


def make_reference(source: Path, output: Path) -> dict[str, list[dict[str, Any]]]:
    """The same stories by the same stages, in this process and one after another; kept in a file."""
    from batch_jobs.inputs import StoryJob, check_rows, read_rows
    from batch_jobs.monitor import Monitor
    from batch_jobs.stages import Draw, Write
    from batch_jobs.state import PageStore
    from benchmarks.bulk_engines import load_tiny_decoder, load_tiny_generator
    from tests.helpers.tiny import tiny_config

    config, store, watch = tiny_config(), PageStore(str(output)), Monitor()
    write = Write(load_tiny_generator, config.sampling, store=store, watch=watch)
    draw = Draw(load_tiny_decoder, store=store, watch=watch)
    stories = {}
    for job in check_rows(read_rows(str(source)), config):
        assert isinstance(job, StoryJob)
        pages = [draw.draw(row) for row in write.write(job) if row["page"]]
        stories[job.id] = [
            {
                "text": page["text"],
                "vokens": page["vokens"],
                "png": store.load_picture(job.id, page["page"]) or b"",
            }
            for page in pages
        ]
    return stories


class Round:
    """One output, with the jobs that work on it and what is killed of them."""

    def __init__(self, source: Path, output: Path, environment: dict[str, str]) -> None:
        self.source, self.output, self.environment = source, output, environment
        self.log = output.with_suffix(".log")
        self.kills: list[dict[str, Any]] = []
        self.num_runs = 0
        self._parts: dict[str, str] = {}
        self.num_changed = 0
        for path in output.parent.glob(f"{output.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def start(self) -> subprocess.Popen[bytes]:
        self.num_runs += 1
        code = f"from benchmarks.kills import run_job; run_job({str(self.source)!r}, {str(self.output)!r})"
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", code], cwd=ROOT, env=self.environment, stdout=log, stderr=log
            )

    def marks(self) -> set[str]:
        """Files that a job leaves as it works: they tell that work is in flight."""
        state = self.output.with_name(self.output.name + ".state") / "pages"
        with contextlib.suppress(FileNotFoundError):
            return {str(path) for path in state.rglob("*.*")} | {path.name for path in self.output.glob("part-*")}
        return set()

    def wait_for_work(self, job: subprocess.Popen[bytes], *, more: int = 3) -> bool:
        """Until the job has made something new; whether it still runs."""
        seen, new, deadline = self.marks(), 0, time.monotonic() + ROUND_S
        while new < more:
            if job.poll() is not None:
                return False
            assert time.monotonic() < deadline, f"the job is stuck, see {self.log}"
            time.sleep(0.1)
            marks = self.marks()
            new += len(marks - seen)
            seen |= marks
        return True

    def look(self) -> None:
        """Count the finished files that have changed since the last look."""
        parts = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in self.output.glob("part-*")}
        self.num_changed += sum(parts.get(name) != digest for name, digest in self._parts.items())
        self._parts |= parts

    def finish(self, job: subprocess.Popen[bytes] | None) -> None:
        """Run again until a job ends by itself."""
        for _ in range(3):
            job = job or self.start()
            if job.wait(timeout=2 * ROUND_S) == 0:
                break
            job = None
        self.look()

    def verdict(self, reference: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        rows = [row for path in self.output.glob("part-*") for row in parquet.read_table(path).to_pylist()]
        ids = Counter(row["id"] for row in rows)
        good = [row for row in rows if row["error"] is None]
        pairs = [
            (page, expected) for row in good for page, expected in zip(row["pages"], reference[row["id"]], strict=True)
        ]
        alike = [(page, expected) for page, expected in pairs if page["text"] == expected["text"]]
        levels = max((level_difference(page["png"], expected["png"]) for page, expected in alike), default=0)
        return {
            "rows": len(reference),
            "kills": len(self.kills),
            "runs": self.num_runs,
            "rows_lost": len(reference.keys() - ids.keys()),
            "rows_doubled": sum(count - 1 for count in ids.values()),
            "files_changed": self.num_changed,
            "error_rows": len(rows) - len(good),
            "errors": sorted({row["error"] for row in rows if row["error"]}),
            "pictures": sum(bool(page["png"]) for row in rows for page in row["pages"]),
            "largest_voken_difference": max(
                (voken_difference(page["vokens"], expected["vokens"]) for page, expected in alike), default=0.0
            ),
            "pages_with_other_text": len(pairs) - len(alike),
            "largest_pixel_difference": levels,
        }


def level_difference(png: bytes, expected: bytes) -> int:
    """In levels of a pixel."""
    one, other = (np.array(Image.open(io.BytesIO(data))).astype(int) for data in (png, expected))
    return int(np.abs(one - other).max())


def voken_difference(packed: bytes, expected: bytes) -> float:
    one, other = (unpack(data, page=1).hidden_VH for data in (packed, expected))
    return float(np.abs(one - other).max())


def kill(process: psutil.Process | subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


def engine_processes(root: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in root.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if " ".join(process.cmdline()).startswith("ray::MapWorker"):
                found.append(process)
    return found


@contextlib.contextmanager
def cluster(*, with_second_node: bool) -> Iterator[tuple[dict[str, str], Any]]:
    """A Ray of this process's own: what a driver's environment needs, and the cluster."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["RAY_AUTH_MODE"] = "disabled"  # it listens on this machine alone, for as long as this process lives
    from ray.cluster_utils import Cluster

    num_cpus = 1 if with_second_node else 4
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": num_cpus, "object_store_memory": 2**28, "include_dashboard": False},
    )
    try:
        yield {**os.environ, "RAY_ADDRESS": made.address, "PYTHONPATH": str(ROOT)}, made
    finally:
        made.shutdown()


def kill_many(
    kind: str, count: int, *, seed: int, work: Path, reference: dict[str, list[dict[str, Any]]], until: float
) -> Iterator[dict[str, Any]]:
    """Rounds of one kind, until `count` kills are done or the time is up."""
    rng, source, done, number = random.Random(f"{kind}/{seed}"), write_input(work), 0, 0
    with contextlib.ExitStack() as stack:
        environment, made = {**os.environ, "PYTHONPATH": str(ROOT)}, None
        environment.pop("RAY_ADDRESS", None)
        if kind != "job":
            environment, made = stack.enter_context(cluster(with_second_node=kind == "raylet"))
        while done < count and time.monotonic() < until:
            trial = Round(source, work / f"{kind}-{seed}-{number}", environment)
            node = made.add_node(num_cpus=1, object_store_memory=2**28) if kind == "raylet" else None
            job: subprocess.Popen[bytes] | None = trial.start()
            while job and len(trial.kills) + done < count and time.monotonic() < until:
                if not trial.wait_for_work(job):
                    break
                delay = rng.uniform(0, 1.5)
                time.sleep(delay)
                if job.poll() is not None:
                    break
                victim = kind
                if kind == "worker":
                    engines = engine_processes(psutil.Process())
                    if not engines:
                        continue
                    process = rng.choice(sorted(engines, key=lambda process: process.pid))
                    victim = " ".join(process.cmdline())
                    kill(process)
                elif kind == "raylet":
                    assert node
                    raylet = node.all_processes["raylet"][0].process
                    victim = f"raylet with {len(engine_processes(psutil.Process(raylet.pid)))} engines"
                    kill(raylet)
                    made.remove_node(node, allow_graceful=False)
                    node = made.add_node(num_cpus=1, object_store_memory=2**28)
                elif kind == "driver":
                    kill(job)
                    job.wait()
                else:
                    family = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
                    victim = f"driver and {len(family) - 1} processes of its Ray"
                    for process in family:
                        kill(process)
                    job.wait()
                trial.look()
                trial.kills.append({"victim": victim, "after_s": round(delay, 2), "parts": len(trial._parts)})
                if job.poll() is not None:
                    job = trial.start()
            trial.finish(job)
            if node is not None:
                made.remove_node(node, allow_graceful=False)
            done, number = done + len(trial.kills), number + 1
            yield {"kind": kind, "seed": seed, **trial.verdict(reference), "victims": trial.kills}


def kill_at(point: str, *, work: Path, reference: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """One job with one named death, in whichever process reaches the point first; "recovering" begins with another."""
    marker = work / f"{point}.marker"
    marker.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    trial = Round(write_input(work), work / f"point-{point}", environment)
    job = trial.start() if point == "recovering" else None
    if job and trial.wait_for_work(job, more=12):
        for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
            kill(process)
        job.wait()
        trial.kills.append({"victim": "driver and its Ray"})
    environment[VARIABLE] = f"{point}:{marker}"
    trial.finish(None)
    assert marker.exists(), f"no process reached {point}"
    trial.kills.append({"victim": f"the process that reached {point}"})
    return {"kind": "point", "point": point, **trial.verdict(reference), "victims": trial.kills}


def table(rounds: list[dict[str, Any]]) -> str:
    """What was killed how often, and what came of it."""
    names = ("kills", "jobs", "rows", "lost", "doubled", "changed", "errors", "px")
    lines = [f"{'killed':24}" + "".join(f"{name:>9}" for name in names)]
    for name in [*KINDS, *(f"point {point}" for point in POINTS)]:
        found = [one for one in rounds if name in (one["kind"], f"point {one.get('point')}")]
        if found:
            keys = ("kills", "rows", "rows_lost", "rows_doubled", "files_changed", "error_rows")
            num_kills, *sums = (sum(one[key] for one in found) for key in keys)
            px = max(one["largest_pixel_difference"] for one in found)
            lines.append(f"{name:24}" + "".join(f"{value:9}" for value in (num_kills, len(found), *sums, px)))
    return "\n".join(lines)
