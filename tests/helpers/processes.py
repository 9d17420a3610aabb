"""Real processes that tests talk to: a server, and a Ray cluster that takes jobs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import psutil

from minigpt5.config import default_model_folder

ROOT = Path(__file__).parent.parent.parent
MODEL = default_model_folder()
START_TIMEOUT_S = 240
END_TIMEOUT_S = 60
JOBS_TIMEOUT_S = 150

HEAD = """
import ray, sys
port = int(sys.argv[1])
ray.init(address="local", num_cpus=4, dashboard_port=port, log_to_driver=False, object_store_memory=2**28)
print("up", flush=True)
sys.stdin.read()
ray.shutdown()
"""


@dataclass
class Server:
    """A server of the shipped model, and a client of it."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int
    client: httpx.Client

    def replica(self, deployment: str) -> psutil.Process:
        title = f"ray::ServeReplica:default:{deployment}"
        [process] = [
            process
            for process in psutil.Process(self.process.pid).children(recursive=True)
            if process.cmdline()[:1] and process.cmdline()[0].startswith(title)
        ]
        return process


def find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_server(port: int, storage: Path, output: IO[bytes]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "deployments", "--port", str(port), "--model", str(MODEL)]
    # A session of its own, so that a test can send it Ctrl-C as a terminal does: to the whole group.
    return subprocess.Popen(
        [*command, "--storage", str(storage)],
        cwd=ROOT,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    log, port = folder / "log", find_free_port()
    with log.open("wb") as output:
        process = start_server(port, folder / "storage", output)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "ready after" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client:
            yield Server(process, log, port, client)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(END_TIMEOUT_S)


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster with token authentication."""

    address: str

    @property
    def environment(self) -> dict[str, str]:
        """For its clients: Ray's own clusters ask for the token that they wrote."""
        environment = {**os.environ, "RAY_AUTH_MODE": "token"}
        environment.pop("RAY_ADDRESS", None)
        return environment

    def submit(self, *command: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit -- python COMMAND`, from the repository's root."""
        submit = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", self.address]
        runtime_env = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})
        deadline = time.monotonic() + JOBS_TIMEOUT_S
        while True:
            job = subprocess.run(
                [*submit, "--runtime-env-json", runtime_env, "--", sys.executable, *command],
                cwd=ROOT,
                env=self.environment,
                capture_output=True,
                text=True,
            )
            # A cluster takes jobs some seconds after it is up, on a busy machine a minute.
            if "No available agent" not in job.stderr or time.monotonic() > deadline:
                return job
            time.sleep(1)


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Its port is named: two clusters that look for a free one at the same time may both take the same."""
    port = find_free_port()
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert head.stdin and head.stdout
    try:
        assert head.stdout.readline().strip() == "up"
        yield Cluster(f"http://127.0.0.1:{port}")
    finally:
        head.stdin.close()
        head.wait(timeout=60)
