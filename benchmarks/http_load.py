"""Stories over HTTP, from a process of their own: `python -m benchmarks.http_load URL PICTURES NUM FIRST`.

Streams NUM stories at once, from number FIRST on, and prints figures. PICTURES: "default", or how many guided steps.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.load import LOADS, Load, Timing, describe_load, spread
from deployments.sse import read_events
from minigpt5.config import ModelConfig, default_model_folder, storybook
from minigpt5.model.folder_config import load_config
from minigpt5.types import StoryRequest

REFUSES_NOTHING = "--max-wait-s=3600"
"""An argument of `running_server`: on a slow machine sixteen guided stories at once would be told to come again."""
NUM_OF_MANY = 16
"""Stories of the client that asks for much."""
HEAD_START_S = 3.0
PROXIES = {"ProxyActor": "proxy", "HAProxyManager": "proxy", "haproxy": "proxy"}
GUIDED = "20"
"""Guided steps of the pictures whose fairness is measured."""


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


def load_over_http(
    url: str, load: Load, config: ModelConfig, *, pictures: str, num: int, first: int
) -> dict[str, object]:
    """Figures of `num` stories that are streamed at once, from a server of the model of `config`."""
    requests = [load.story(first + index, config, pictures=pictures) for index in range(num)]
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(num) as pool:
        timings = list(pool.map(lambda request: tell_over_http(url, request, began), requests))
    return describe_load(time.perf_counter() - began, timings, load)


def measure_fairness(url: str, load: Load, *, num: int = 5) -> dict[str, Any]:
    """Seconds of one-page stories of one client: alone, and while another client has sixteen stories under way."""
    config = storybook()

    def tell(client: str, index: int, pages: int) -> float:
        request = dataclasses.replace(load.story(index, config, pictures=GUIDED), pages=pages)
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
    kinds = {"VokenGenerator": "generator", "DiffusionDecoder": "decoder", "Ingress": "front", **PROXIES}
    found: dict[str, float] = {}
    for process in server.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            title = " ".join(process.cmdline())[:80]
            is_named = title.startswith("ray::") or process.name() == "haproxy"
            kind = next((kind for name, kind in kinds.items() if is_named and name in title), "ray")
            times = process.cpu_times()
            found[kind] = found.get(kind, 0.0) + times.user + times.system
    return found


class HttpLoads:
    """Loads from a process of their own, one after another, on a server that is running."""

    def __init__(self, url: str, server: psutil.Process, *, model: Path, load: str) -> None:
        """`load`: a key of LOADS."""
        self.url, self.server, self.model, self.load = url, server, model, load
        self._num_asked = 100_000  # no story that the engines of other processes write

    def stories(self, pictures: str, num: int) -> dict[str, Any]:
        """Figures of `num` stories at once, with the cores that were busy in each kind of the server's processes."""
        first, self._num_asked = self._num_asked, self._num_asked + num
        command = [sys.executable, "-m", "benchmarks.http_load", self.url, pictures, str(num), str(first)]
        before, began = cpu_s(self.server), time.perf_counter()
        finished = subprocess.run(
            [*command, "--load", self.load, "--model", str(self.model)], stdout=subprocess.PIPE, check=True
        )
        busy = busy_cores(before, cpu_s(self.server), time.perf_counter() - began)
        return json.loads(finished.stdout) | {"busy_cores": busy}

    def idle_cores(self, seconds: float = 2.0) -> dict[str, float]:
        """Cores that the server keeps busy while nobody asks: the other ways are measured beside it."""
        before = cpu_s(self.server)
        time.sleep(seconds)
        return busy_cores(before, cpu_s(self.server), seconds)

    def memory_gib(self) -> float:
        """Memory of all processes of the server."""
        return sum(process.memory_full_info().pss for process in self.server.children(recursive=True)) / 2**30


def busy_cores(before: Mapping[str, float], after: Mapping[str, float], seconds: float) -> dict[str, float]:
    return {kind: round((spent - before.get(kind, 0.0)) / seconds, 2) for kind, spent in after.items()}


@contextlib.contextmanager
def running_server(
    model: Path, *arguments: str, variables: Mapping[str, str] | None = None
) -> Iterator[tuple[str, psutil.Process]]:
    """The URL of `python -m deployments` with more `arguments` and environment `variables`, and its process."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as storage:
        command = [sys.executable, "-m", "deployments", "--port", str(port), "--model", str(model)]
        server = subprocess.Popen(
            [*command, *arguments, "--storage", storage],
            env={**os.environ, **(variables or {})},
            stdout=subprocess.PIPE,
            text=True,
        )
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
    parser.add_argument("pictures")
    parser.add_argument("num", type=int)
    parser.add_argument("first", type=int)
    parser.add_argument("--load", choices=LOADS, default="full")
    parser.add_argument("--model", type=Path, default=default_model_folder(), help="that the server has")
    options = parser.parse_args(arguments)
    figures = load_over_http(
        options.url,
        LOADS[options.load],
        load_config(options.model),
        pictures=options.pictures,
        num=options.num,
        first=options.first,
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
