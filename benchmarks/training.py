"""Training, measured: `python -m benchmarks.training [rows] [memory] [speed] [curves] [kills] [--count 10]`.

Into benchmarks/results/training.json.

    rows     the cost of a stored row, and the size of a reader, at 10,000 to 10,000,000 rows
    memory   what a worker holds with a language model of 0.5 GB: frozen weights in float32 and bfloat16, ZeRO 3
    speed    a worker on Ray Train against the plain loop, both with two threads; two workers; memory by ZeRO stage
    curves   losses of ZeRO 0 to 3 against the plain loop, 50 steps, float32 and bfloat16
    kills    one run of each kind, whose worker, driver or whole job and Ray is killed with SIGKILL again and again at
             seeded random moments, and started again: every row used once in the history that counts, and the losses
             of a run without a kill

The same command resumes after a stop.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks import training_memory, training_rows
from benchmarks.quality import machine
from tests.training.test_zero import MODEL_WORKER, largest_difference, train
from training.report import read_lines
from training.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "training.json"
PARTS = ["rows", "memory", "speed", "curves", "kills"]
NUM_ROWS = (10_000, 1_000_000, 10_000_000)
KINDS = ("worker", "driver", "job")
STEPS, BATCH, WORKERS = 150, 4, 2
KILL_WITHIN_S = 4.0
"""A kill comes within this time of the first step after a start."""
ROUND_S = 900.0
"""No start and no run without a kill takes longer, on one core."""
RUN = [
    "vae",
    "--start",
    "models/storybook",
    f"steps={STEPS}",
    f"batch_size={BATCH}",
    "num_threads=1",
    "log_every=1",
    "warmup_steps=5",
]
RUN += ["checkpoint_every_s=1", "sheet_every_s=100000", "log_examples=true"]


def command(out: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "training.train",
        "--preset",
        "storybook",
        *options,
        "--out",
        str(out),
        "--runs",
        str(out.parent),
    ]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", **more}


# Kills


def processes(root: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [root, *root.children(recursive=True)]
    return []


def kill(found: list[psutil.Process]) -> int:
    """How many of them were there."""
    num_killed = 0
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            num_killed += 1
    psutil.wait_procs(found, timeout=30)
    return num_killed


class Cluster:
    """A Ray that outlives its drivers."""

    def __init__(self) -> None:
        start = [
            str(Path(sys.executable).parent / "ray"),
            "start",
            "--head",
            "--block",
            "--num-cpus",
            "4",
            "--port",
            "0",
        ]
        self.process = subprocess.Popen(
            [*start, "--include-dashboard", "false"],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout
        for line in self.process.stdout:
            if match := re.search(r"Local node IP: (\S+)", line):
                self.address = match.group(1)
            if match := re.search(r"--address='([^']+)'", line):
                self.address = match.group(1)
                break

    def end(self) -> None:
        kill(processes(psutil.Process(self.process.pid)))


def history(out: Path) -> tuple[dict[int, list[Any]], dict[int, float]]:
    """Rows and the mean loss of each step, as last done: what came after the checkpoint that a run went on from does
    not count."""
    rows: dict[int, list[Any]] = {}
    losses: dict[int, float] = {}
    by_rank = [
        {line["step"]: line for line in map(json.loads, path.read_text().splitlines())}
        for path in sorted(out.glob("examples-*.jsonl"))
    ]
    for step in range(STEPS):
        lines = [lines[step] for lines in by_rank]
        rows[step] = sorted(row for line in lines for row in line["ids"])
        losses[step] = statistics.fmean(line["loss"] for line in lines)
    return rows, losses


class KilledRun:
    """One run, started as often as it takes, of which `count` victims of a kind are killed at seeded moments."""

    def __init__(self, out: Path, kind: str, count: int, *, address: str = "") -> None:
        self.out, self.kind, self.count = out, kind, count
        self.env = environment(RAY_ADDRESS=address) if address else environment()
        self.rng = random.Random(kind)
        self.kills: list[dict[str, Any]] = []
        self.starts = 0

    def go(self) -> None:
        """To the end of the run."""
        while not self.goes_through():
            assert self.starts < self.count + 4, (self.out.parent / "run.log").read_text()[-3000:]

    def goes_through(self) -> bool:
        """One start; whether the run came to its end by itself."""
        self.starts += 1
        command_line = command(self.out, *RUN, "--workers", str(WORKERS))
        with (self.out.parent / "run.log").open("ab") as log:
            driver = subprocess.Popen(
                command_line, cwd=ROOT, env=self.env, stdout=log, stderr=log, start_new_session=True
            )
        root = psutil.Process(driver.pid)
        try:
            while len(self.kills) < self.count and self.waits_for_a_step(driver):
                delay_s = self.rng.uniform(0, KILL_WITHIN_S)
                time.sleep(delay_s)
                if num_killed := self.kill_victim(root):
                    self.kills.append({"delay_s": round(delay_s, 2), "processes": num_killed})
                    print(self.kind, len(self.kills), self.kills[-1], flush=True)
                if self.kind != "worker":
                    driver.wait(30)
                    return False
            return driver.wait(ROUND_S) == 0
        finally:
            kill(processes(root))

    def waits_for_a_step(self, driver: subprocess.Popen[bytes]) -> bool:
        """Until the run has done a new step; False where it ended before."""
        size, deadline = log_size(self.out), time.monotonic() + ROUND_S
        while log_size(self.out) == size:
            if driver.poll() is not None:
                return False
            assert time.monotonic() < deadline, (self.out.parent / "run.log").read_text()[-3000:]
            time.sleep(0.05)
        return True

    def kill_victim(self, root: psutil.Process) -> int:
        if self.kind == "driver":
            return kill([root])
        if self.kind == "job":
            return kill(processes(root))
        workers = training_workers()
        num_killed = kill(workers[:1])
        psutil.wait_procs(workers, timeout=ROUND_S)  # Ray ends the others: what they still log is no new step
        return num_killed


def training_workers() -> list[psutil.Process]:
    titles = "ray::RayTrainWorker", "ray::_RayTrainWorker"
    everyone = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"]]
    return [process for process in everyone if " ".join(process.info["cmdline"]).startswith(titles)]


def log_size(out: Path) -> int:
    path = out / "log.jsonl"
    return path.stat().st_size if path.exists() else 0


def measure_kill(kind: str, count: int, whole: tuple[dict[int, list[Any]], dict[int, float]]) -> dict[str, Any]:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        cluster = Cluster() if kind == "driver" else None  # that outlives its drivers
        try:
            run = KilledRun(out, kind, count, address=cluster.address if cluster else "")
            run.go()
        finally:
            if cluster:
                cluster.end()
        rows, losses = history(out)
        seen = [row for step in rows for row in rows[step]]
        return {
            "kills": run.kills,
            "starts": run.starts,
            "steps_redone": sum(len(path.read_text().splitlines()) for path in out.glob("examples-*.jsonl")) / WORKERS
            - STEPS,
            "rows_lost": len({row for step in whole[0] for row in whole[0][step]} - set(seen)),
            "rows_twice": len(seen) - len(set(seen)),
            "loss_difference": max(abs(losses[step] / whole[1][step] - 1) for step in losses),
            "seconds": round(time.monotonic() - began, 1),
        }


def measure_kills(results: dict[str, Any], count: int) -> None:
    if "whole" not in results:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            KilledRun(out, "none", 0).go()
            results["whole"] = history(out)
            save(results)
    rows, losses = ({int(step): value for step, value in part.items()} for part in results["whole"])
    for kind in KINDS:
        if kind not in results.setdefault("kills", {}):
            results["kills"][kind] = measure_kill(kind, count, (rows, losses))
            print(kind, {**results["kills"][kind], "kills": len(results["kills"][kind]["kills"])}, flush=True)
            save(results)


# Speed


def speed_of(out: Path, *options: str) -> dict[str, float]:
    """Steps a second in the second half, the parts of a step, and the most memory of a worker. In the first, Ray's
    processes still start, and its data tasks are ahead of what is trained."""
    process = subprocess.Popen(
        command(out, *options), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    peak = 0
    while process.poll() is None:
        for child in processes(psutil.Process(process.pid)):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                title = " ".join(child.cmdline())
                if "RayTrainWorker" in title or child.pid == process.pid:
                    peak = max(peak, child.memory_info().rss)
        time.sleep(2)  # to look at all of Ray's processes takes a tenth of a second
    assert process.returncode == 0, options
    lines = read_lines(RunFolder(str(out)))
    steps = [line for line in lines if "loss" in line]
    late = steps[len(steps) // 2 :]
    rate = (late[-1]["step"] - late[0]["step"]) / (late[-1]["elapsed_s"] - late[0]["elapsed_s"])
    parts = {name: statistics.fmean(line[name] for line in late) for name in late[0] if name.endswith("_s")}
    del parts["elapsed_s"]
    return {"steps_per_s": rate, "peak_mib": peak / 2**20, **parts}


def measure_speed(results: dict[str, Any], repeats: int = 3) -> None:
    quiet = ["log_every=5", "checkpoint_every_s=100000", "sheet_every_s=100000", "warmup_steps=5"]
    vae = ["vae", "steps=60", "batch_size=16", *quiet]
    ways = {
        "plain, 2 threads": [*vae, "num_threads=2", "--workers", "0"],
        "Ray, 1 worker of 2 threads": [*vae, "num_threads=2", "--workers", "1"],
        "Ray, 2 workers of 1 thread": [*vae, "num_threads=1", "--workers", "2"],
    }
    model = ["learn", "steps=12", "batch_size=4", "replay.steps=0", "num_threads=1", "--start", "models/storybook"]
    model += ["times_communication=true", "whitens=false", "standardises=false"]
    model += [*quiet[1:], "log_every=2", "--workers", "2", "ema_decay=0"]
    zero = {f"learn, ZeRO {stage}": [*model, f"zero_stage={stage}"] for stage in (0, 1, 2, 3)}
    found = results.setdefault("speed", {})
    rounds = [(number, way) for number in range(repeats) for way in ways.items()]  # in turn: the machine is shared
    for number, (name, options) in [*rounds, *((0, way) for way in zero.items())]:
        if len(found.get(name, [])) <= number:
            with tempfile.TemporaryDirectory() as folder:
                found.setdefault(name, []).append(speed_of(Path(folder) / "run", *options))
            print(name, found[name][-1], flush=True)
            save(results)


# Rows and memory


def measure_rows(results: dict[str, Any]) -> None:
    found = results.setdefault("rows", {})
    for num_rows in NUM_ROWS:
        if str(num_rows) not in found:
            with tempfile.TemporaryDirectory() as folder:
                found[str(num_rows)] = training_rows.measure(Path(folder), num_rows)
            print(num_rows, found[str(num_rows)], flush=True)
            save(results)


def measure_memory(results: dict[str, Any]) -> None:
    found = results.setdefault("memory", {})
    with tempfile.TemporaryDirectory() as folder:
        made = training_memory.make_model(Path(folder))
        for way in training_memory.WAYS:
            for num_workers in (1, 2, 4) if way in training_memory.WITH_FOUR else (1, 2):
                name = f"{way}, {num_workers}"
                if name not in found:
                    out = Path(folder) / "runs" / name
                    found[name] = training_memory.measure(made, out, way, num_workers=num_workers)
                    print(name, found[name], flush=True)
                    save(results)


# Curves


def measure_curves(results: dict[str, Any]) -> None:
    curves = results.setdefault("curves", {})
    for precision, worker in (
        ("float32", MODEL_WORKER),
        ("bfloat16", MODEL_WORKER.replace("VokenPreset(\n", "VokenPreset(bf16=True,\n")),
    ):
        for stage in (None, 0, 1, 2, 3):
            name = f"{precision}, {'plain' if stage is None else f'ZeRO {stage}'}"
            if name not in curves:
                with tempfile.TemporaryDirectory() as folder:
                    curves[name] = train(Path(folder), stage, steps=50, worker=worker)
                print(name, curves[name][-1], flush=True)
                save(results)


def save(results: dict[str, Any]) -> None:
    speed, curves, kills = (results.get(name, {}) for name in ("speed", "curves", "kills"))
    ratios: dict[str, float] = {}
    median = {
        name: statistics.median(one["steps_per_s"] for one in runs) for name, runs in (speed or {}).items() if runs
    }
    if {"plain, 2 threads", "Ray, 1 worker of 2 threads"} <= set(median):
        ratios["throughput_vs_plain"] = median["Ray, 1 worker of 2 threads"] / median["plain, 2 threads"]
    if "Ray, 2 workers of 1 thread" in median:
        ratios["two_workers_vs_plain"] = median["Ray, 2 workers of 1 thread"] / median["plain, 2 threads"]
    for precision in ("float32", "bfloat16"):
        plain = (curves or {}).get(f"{precision}, plain")
        others = [curve for name, curve in (curves or {}).items() if name.startswith(f"{precision}, ZeRO")]
        if plain and others:
            key = "loss_largest_difference" + ("" if precision == "float32" else "_bfloat16")
            ratios[key] = max(largest_difference(curve, plain) for curve in others)
    if rows := results.get("rows"):
        costs = [one["us_per_row"] for one in rows.values()]
        ratios["row_cost_largest_over_smallest"] = max(costs) / min(costs)
    if kills:
        runs = kills.values()
        ratios["rows_lost"] = sum(one["rows_lost"] for one in runs)
        ratios["rows_twice"] = sum(one["rows_twice"] for one in runs)
        ratios["kills"] = sum(len(one["kills"]) for one in runs)
        ratios["loss_largest_difference_after_kills"] = max(one["loss_difference"] for one in runs)
    report = {
        "ratios": ratios,
        "figures": results,
        "machine": machine(),
        "command": "make bench-training",
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="(default: all)")
    parser.add_argument("--count", type=int, default=10, help="kills of each kind (default %(default)s)")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text())["figures"] if RESULTS.exists() else {}
    parts = options.parts or PARTS
    if "rows" in parts:
        measure_rows(results)
    if "memory" in parts:
        measure_memory(results)
    if "speed" in parts:
        measure_speed(results)
    if "curves" in parts:
        measure_curves(results)
    if "kills" in parts:
        measure_kills(results, options.count)
    save(results)
    print(json.dumps(json.loads(RESULTS.read_text())["ratios"], indent=1))


if __name__ == "__main__":
    main()
