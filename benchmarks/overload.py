"""More stories than a server can make: `python -m benchmarks.overload [URL --pid PID] [--seconds 300]`.

Measures how many default stories a second the server makes, then posts five times as many for some minutes. Every
answer has to be a story or 503; a story that was accepted ends within the server's `max_wait_s`. Without a URL a server
is started for it. The memory of the server's processes is that of PID and its children. The figures go into
benchmarks/results/load.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.http_load import running_server
from benchmarks.load import WHAT, WHO
from benchmarks.quality import machine
from benchmarks.victims import family
from deployments.sse import read_events
from minigpt5.config import default_model_folder

RESULTS = Path(__file__).parent / "results" / "load.json"
TIMES_CAPACITY = 5
MAX_WAIT_S = 60.0
"""Of the server that is started for it."""
NUM_PROBES = 8
"""Stories at once that the capacity is measured with."""
PROBE_TURNS = 3
"""Of which the quickest counts: a server that has just started is slower."""
MAX_CLIENTS = 512
MEMORY_PERIOD_S = 2.0
SETTLE_S = 5.0
"""From the last answer to the last look at the memory."""


def tell(url: str, index: int) -> tuple[str, float]:
    """Post the default request. Returns how it ended ("done", an HTTP status, or an error's name) and its seconds."""
    body = {
        "prompt": f"A {WHO[index % len(WHO)]} who finds a {WHAT[index % len(WHAT)]}",
        "seed": 300_000 + index,
        "stream": True,
    }
    began, name = time.perf_counter(), ""
    try:
        with httpx.stream("POST", f"{url}/v1/stories", json=body, timeout=3600, trust_env=False) as reply:
            if reply.status_code != 200:
                return str(reply.status_code), time.perf_counter() - began
            for event in read_events(reply.iter_bytes()):
                name = event.name
    except httpx.HTTPError as failure:
        name = type(failure).__name__
    return name, time.perf_counter() - began


def overload(
    url: str, *, seconds: float, times: float = TIMES_CAPACITY, roots: Sequence[psutil.Process] = ()
) -> dict[str, Any]:
    """Figures of a server that is asked for `times` what it can make, for so many seconds. `roots`: the processes that
    have started all of it, for its memory."""
    capacity = max(measure_capacity(url, start=turn * NUM_PROBES) for turn in range(PROBE_TURNS))
    before_mib = resident_mib(roots)

    memory_mib: list[float] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(MEMORY_PERIOD_S):
            memory_mib.append(resident_mib(roots))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(MAX_CLIENTS) as pool:
            began = time.perf_counter()
            stories: list[Future[tuple[str, float]]] = []
            while time.perf_counter() - began < seconds:
                stories.append(pool.submit(tell, url, PROBE_TURNS * NUM_PROBES + len(stories)))
                time.sleep(max(0.0, began + len(stories) / (times * capacity) - time.perf_counter()))
            ends = [story.result() for story in stories]
    finally:
        is_over.set()
        watcher.join()
    time.sleep(SETTLE_S)
    after_mib = resident_mib(roots)
    done = [took for end, took in ends if end == "done"]
    quarter = max(1, len(memory_mib) // 4)
    return {
        "capacity_stories_per_s": capacity,
        "times_capacity": times,
        "seconds": seconds,
        "ends": dict(Counter(end for end, _ in ends)),
        "accepted_p50_s": float(np.percentile(done, 50)) if done else None,
        "accepted_p95_s": float(np.percentile(done, 95)) if done else None,
        "refused_p95_s": float(np.percentile([took for end, took in ends if end == "503"] or [0.0], 95)),
        "memory_growth": float(np.mean(memory_mib[-quarter:]) / np.mean(memory_mib[quarter : 2 * quarter]))
        if roots and len(memory_mib) >= 4
        else None,
        "probes": PROBE_TURNS * NUM_PROBES,
        "memory_mib": [round(before_mib), round(after_mib)],
        "memory_after": after_mib / before_mib if roots else None,
    }


def measure_capacity(url: str, *, start: int) -> float:
    """Default stories a second, NUM_PROBES at once, of which `start` were asked for before."""
    began = time.perf_counter()
    with ThreadPoolExecutor(NUM_PROBES) as pool:
        ends = [end for end, _ in pool.map(lambda index: tell(url, index), range(start, start + NUM_PROBES))]
    if "done" not in ends:
        raise RuntimeError(f"the server made no story: {ends[0]}; start it before the bench")
    return ends.count("done") / (time.perf_counter() - began)


def resident_mib(roots: Sequence[psutil.Process]) -> float:
    """Of processes and all that they started."""
    total = 0
    for process in family(roots):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=__doc__)
    parser.add_argument("url", nargs="?", help="of a server that runs (default: one is started)")
    parser.add_argument("--pid", type=int, default=0, help="the server's process, for its memory")
    parser.add_argument("--max-wait-s", type=float, default=MAX_WAIT_S, help="of the server (default: %(default)g)")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.url:
        roots = [psutil.Process(options.pid)] if options.pid else []
        figures = overload(options.url, seconds=options.seconds, roots=roots)
    else:
        with running_server(default_model_folder(), f"--max-wait-s={options.max_wait_s:g}") as (url, server):
            figures = overload(url, seconds=options.seconds, roots=[server])
    figures["max_wait_s"] = options.max_wait_s
    ratios = {
        "accepted_p95_vs_max_wait": figures["accepted_p95_s"] and figures["accepted_p95_s"] / options.max_wait_s,
        "memory_growth": figures["memory_growth"],
    }
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m benchmarks.overload", *given])
    report = {"ratios": ratios, "figures": figures, "machine": machine(), "command": command}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
