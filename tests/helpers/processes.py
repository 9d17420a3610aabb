"""Real processes that tests talk to: a server, and a Ray cluster that takes jobs."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
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

ACTIVE = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
"""The environment after `. .venv/bin/activate`."""
SUBMIT = ("ray", "job", "submit", "--working-dir", ".", "--", "python")


@dataclass
class Server:
    """A server of the shipped model, and a client of it."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int
    client: httpx.Client

    @property
    def metrics_url(self) -> str:
        """Where Prometheus scrapes it."""
        return self._said("metrics")

    @property
    def logs(self) -> Path:
        """The folder of Serve's log files."""
        return Path(self._said("logs"))

    def _said(self, name: str) -> str:
        [value] = re.findall(rf"^  {name} +(\S+)$", self.log.read_text(), flags=re.M)
        return value

    def listening(self) -> set[tuple[str, int]]:
        """Addresses and ports on which the server's processes listen."""
        return {
            (socket.laddr.ip.removeprefix("::ffff:"), socket.laddr.port)
            for process in psutil.Process(self.process.pid).children(recursive=True)
            for socket in process.net_connections("tcp")
            if socket.status == psutil.CONN_LISTEN
        }

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


def start_server(
    port: int,
    storage: Path | str,
    output: IO[bytes],
    *options: str,
    model: Path | str = MODEL,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "deployments", "--port", str(port), "--model", str(model)]
    # A session of its own, so that a test can send it Ctrl-C as a terminal does: to the whole group.
    return subprocess.Popen(
        [*command, "--storage", str(storage), *options],
        cwd=ROOT,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while "ready after" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@contextlib.contextmanager
def running_server(folder: Path, *options: str) -> Iterator[Server]:
    """`options`: of `python -m deployments`."""
    log, port = folder / "log", find_free_port()
    with log.open("wb") as output:
        process = start_server(port, folder / "storage", output, *options)
    try:
        wait_until_ready(process, log)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client:
            yield Server(process, log, port, client)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(END_TIMEOUT_S)


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster with token authentication, and the environment of its clients."""

    address: str
    environment: Mapping[str, str]

    def submit(self, *command: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- python COMMAND`, from the repository's root."""
        deadline = time.monotonic() + JOBS_TIMEOUT_S
        while True:
            job = subprocess.run(
                [*SUBMIT, *command], cwd=ROOT, env=self.environment, capture_output=True, text=True, errors="replace"
            )
            # A cluster takes jobs some seconds after it is up, on a busy machine a minute.
            if "No available agent" not in job.stderr or time.monotonic() > deadline:
                return job
            time.sleep(1)


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Start `ray start --head` with ports and a token of its own, beside any other Ray of this machine."""
    port, log = find_free_port(), folder / "log"
    environment = {**ACTIVE, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment.pop("RAY_ADDRESS", None)
    command = ["ray", "start", "--head", "--block", "--num-cpus=4", f"--object-store-memory={2**28}"]
    command += ["--port=0", f"--dashboard-port={port}", f"--dashboard-agent-listen-port={find_free_port()}"]
    command += [f"--ray-client-server-port={find_free_port()}", "--disable-usage-stats"]
    # Ray's sockets lie in the folder, and a socket's path has at most 107 bytes: pytest's folders are too deep.
    with tempfile.TemporaryDirectory(prefix="ray-") as state, log.open("wb") as output:
        head = subprocess.Popen(
            [*command, f"--temp-dir={state}"], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
        address = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not answers(address):
                assert head.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield Cluster(address, {**environment, "RAY_API_SERVER_ADDRESS": address})
        finally:
            head.terminate()
            head.wait(END_TIMEOUT_S)


def answers(address: str) -> bool:
    """Say whether an HTTP server is there, whatever it answers."""
    try:
        httpx.get(address, trust_env=False)
    except httpx.TransportError:
        return False
    return True
