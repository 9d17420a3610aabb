"""What Serve's ways in cost a streamed story: `python -m benchmarks.ingress [--rounds 3]`.

A round starts a server in each of Serve's modes, one after another, and streams default stories from it, one, four and
eight at once. The tables show medians over the rounds of benchmarks/results/ingress.json, to which `--append` adds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.http_load import REFUSES_NOTHING, cpu_s, running_server
from benchmarks.load import WHAT, WHO
from benchmarks.quality import machine
from deployments.sse import read_events
from minigpt5.config import default_model_folder

RESULTS = Path(__file__).parent / "results" / "ingress.json"
MODES: dict[str, dict[str, str]] = {
    "default": {},
    "throughput": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
    "haproxy": {"RAY_SERVE_ENABLE_HA_PROXY": "1"},
}
"""Serve's mode -> the variables that choose it; `make serve` has the first."""
DIRECT = "direct"
"""The way to the port that a front itself has in the mode `throughput`, for a load balancer of one's own."""
DIRECT_PORTS = range(30_000, 31_000)
AT_ONCE = (1, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """When the events of a story came, in seconds from its request."""

    first_text_s: float
    gaps_s: tuple[float, ...]
    story_s: float


def stream(url: str, index: int) -> Stream:
    """Stream a default story. Raises RuntimeError where it does not end well."""
    body = {
        "prompt": f"A {WHO[index % len(WHO)]} who finds a {WHAT[index % len(WHAT)]}",
        "seed": 500_000 + index,
        "stream": True,
    }
    began, name = time.perf_counter(), ""
    times: list[float] = []
    first_text_s = 0.0
    with httpx.stream("POST", f"{url}/v1/stories", json=body, timeout=600, trust_env=False) as reply:
        for event in read_events(reply.iter_bytes()):
            name = event.name
            times.append(time.perf_counter() - began)
            if name == "text" and not first_text_s:
                first_text_s = times[-1]
    if name != "done":
        raise RuntimeError(f"{url} answered {reply.status_code}, and the story ended with {name or 'nothing'}")
    return Stream(first_text_s=first_text_s, gaps_s=tuple(np.diff(times)), story_s=times[-1])


def measure(url: str, server: psutil.Process, *, num: int, first: int) -> dict[str, Any]:
    """Figures of `num` stories at once, from number `first` on."""
    before = cpu_s(server)
    with ThreadPoolExecutor(num) as pool:
        streams = list(pool.map(lambda index: stream(url, index), range(first, first + num)))
    after = cpu_s(server)
    gaps = [gap for each in streams for gap in each.gaps_s]
    return {
        "first_text_s": float(np.median([each.first_text_s for each in streams])),
        "gap_p50_s": float(np.quantile(gaps, 0.5)),
        "gap_p95_s": float(np.quantile(gaps, 0.95)),
        "story_s": float(np.median([each.story_s for each in streams])),
        "cpu_s_per_story": {kind: (after[kind] - before.get(kind, 0.0)) / num for kind in after},
    }


def direct_url(server: psutil.Process) -> str:
    """The port of the front's own process."""
    (port,) = {
        each.laddr.port
        for process in server.children(recursive=True)
        for each in process.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN and each.laddr.port in DIRECT_PORTS
    }
    return f"http://127.0.0.1:{port}"


def run_round(number: int, *, at_once: Sequence[int] = AT_ONCE) -> dict[str, Any]:
    """Way -> stories at once -> figures. No story is made twice, so that no cache answers."""
    figures: dict[str, Any] = {}
    first = 10_000 * number
    for mode, variables in MODES.items():
        with running_server(default_model_folder(), REFUSES_NOTHING, variables=variables) as (url, server):
            ways = {mode: url} | ({DIRECT: direct_url(server)} if mode == "throughput" else {})
            stream(url, first)  # the first story is always the slowest
            for way, address in ways.items():
                figures[way] = {}
                for num in at_once:
                    first += 100
                    figures[way][str(num)] = measure(address, server, num=num, first=first)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ingress", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--append", action="store_true", help="keep the rounds that the file has")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    found: Mapping[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    rounds = list(found["figures"]["rounds"]) if options.append and found else []
    for _ in range(options.rounds):
        rounds.append(run_round(len(rounds)))
        print(json.dumps(rounds[-1]), flush=True)
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m benchmarks.ingress", *given])
    figures = dict(found["figures"]) if found else {}
    report = {"figures": {**figures, "rounds": rounds}, "machine": machine(), "command": command}
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
