"""Stories over HTTP, from a process of their own: `python -m benchmarks.http_load URL STEPS NUM FIRST`.

Streams NUM stories at once, from number FIRST on, and prints figures.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.load import TINY, Load, Timing, describe_load, spread
from deployments.sse import read_events
from minigpt5.config import storybook
from minigpt5.types import StoryRequest

NUM_OF_MANY = 16
"""Stories of the client that asks for much."""
HEAD_START_S = 3.0


def tell_over_http(url: str, request: StoryRequest, began: float, *, client: str = "") -> Timing:
    """Stream one story and note when what arrived."""
    body = {
        "prompt": request.prompt[0],
        "pages": request.pages,
        "seed": request.seed,
        **{name: value for name, value in dataclasses.asdict(request.draw).items() if value},  # 0 and "": none
        "min_page_tokens": request.sampling.min_page_tokens,
        "max_page_tokens": request.sampling.max_page_tokens,
        "stream": True,
    }
    timing = Timing(start=time.perf_counter() - began)
    arrivals = {"text": timing.texts, "image": timing.pictures, "page": timing.pages}
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {client}"} if client else {})}
    post = urllib.request.Request(f"{url}/v1/stories", json.dumps(body).encode(), headers)
    name = ""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(post, timeout=3600) as reply:
        for event in read_events(iter(reply.read1, b"")):
            name = event.name
            arrivals.get(name, []).append(time.perf_counter() - began)
    assert name == "done", name
    return timing


def load_over_http(url: str, load: Load, *, steps: int, num: int, first: int) -> dict[str, object]:
    """Figures of `num` stories that are streamed at once."""
    config = storybook()
    requests = [load.story(first + index, config, steps=steps) for index in range(num)]
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(num) as pool:
        timings = list(pool.map(lambda request: tell_over_http(url, request, began), requests))
    return describe_load(time.perf_counter() - began, timings, load)


def measure_fairness(url: str, load: Load, *, num: int = 5) -> dict[str, Any]:
    """Seconds of one-page stories of one client: alone, and while another client has sixteen stories under way."""
    config = storybook()

    def tell(client: str, index: int, pages: int) -> float:
        request = dataclasses.replace(load.story(index, config, steps=load.steps[0]), pages=pages)
        timing = tell_over_http(url, request, time.perf_counter(), client=client)
        return timing.pages[-1]

    tell("few", 200_000, 1)  # the first call is always the slowest
    alone = [tell("few", 200_001 + index, 1) for index in range(num)]
    with concurrent.futures.ThreadPoolExecutor(NUM_OF_MANY) as pool:
        many = [pool.submit(tell, "many", 201_000 + index, load.pages) for index in range(NUM_OF_MANY)]
        time.sleep(HEAD_START_S)
        beside = [tell("few", 202_000 + index, 1) for index in range(num)]
        still = sum(not story.done() for story in many)
    return {
        "alone_s": spread(alone),
        "beside_16_s": spread(beside),
        "ratio": float(np.median(beside) / np.median(alone)),
        "of_16_still_running": still,
    }


def cpu_s(server: psutil.Process) -> dict[str, float]:
    """CPU seconds so far by kind of process."""
    kinds = {"VokenGenerator": "generator", "DiffusionDecoder": "decoder", "Ingress": "front", "ProxyActor": "proxy"}
    found: dict[str, float] = {}
    for process in server.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            title = " ".join(process.cmdline())[:80]
            kind = next((kind for name, kind in kinds.items() if title.startswith("ray::") and name in title), "ray")
            times = process.cpu_times()
            found[kind] = found.get(kind, 0.0) + times.user + times.system
    return found


def measure_http(url: str, server: psutil.Process, load: Load, *, tiny: bool) -> dict[str, dict[str, Any]]:
    """The same loads from a process of its own: by steps, then by number of stories at once."""
    figures: dict[str, dict[str, Any]] = {}
    first = 100_000  # no story that this server, or the engines of this process, have written
    warm_up = (load.steps[0], [1])  # the first call is always the slowest; its figures are replaced
    for steps, nums in [warm_up, *load.sizes()]:
        for num in nums:
            command = [sys.executable, "-m", "benchmarks.http_load", url, str(steps), str(num), str(first)]
            before, began = cpu_s(server), time.perf_counter()
            finished = subprocess.run([*command, *(["--tiny"] if tiny else [])], stdout=subprocess.PIPE, check=True)
            seconds = time.perf_counter() - began
            busy = {kind: round((spent - before.get(kind, 0.0)) / seconds, 2) for kind, spent in cpu_s(server).items()}
            figures.setdefault(str(steps), {})[str(num)] = json.loads(finished.stdout) | {"busy_cores": busy}
            first += num
    return figures


@contextlib.contextmanager
def running_server(model: Path, *, port: int = 8191) -> Iterator[tuple[str, psutil.Process]]:
    """The URL of `python -m deployments`, and its process."""
    with tempfile.TemporaryDirectory() as storage:
        command = [sys.executable, "-m", "deployments", "--port", str(port), "--model", str(model)]
        server = subprocess.Popen([*command, "--storage", storage], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if line.startswith("ready"):
                    break
            else:
                raise RuntimeError("the server did not start: see what it printed")

            yield f"http://127.0.0.1:{port}", psutil.Process(server.pid)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http_load", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("steps", type=int)
    parser.add_argument("num", type=int)
    parser.add_argument("first", type=int)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    load = TINY if options.tiny else Load()
    print(json.dumps(load_over_http(options.url, load, steps=options.steps, num=options.num, first=options.first)))


if __name__ == "__main__":
    main()
