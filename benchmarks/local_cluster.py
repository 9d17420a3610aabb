"""A Ray cluster of several nodes on this machine, as `ray start` makes it, with the application on Serve.

The head has no CPUs, as in the files of cluster/, and Redis keeps the state of its GCS where `redis-server` is on the
PATH. Serve's proxies of all nodes share one port (SO_REUSEPORT), so that the kernel stands for a load balancer.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.followed import wait_for
from benchmarks.victims import REPLICA, family, find, kill
from deployments.proxy import CALLBACK, CALLBACK_VARIABLE
from tests.helpers.processes import find_free_port

ROOT = Path(__file__).parent.parent
APPLICATION = "default"
NUM_WORKERS = 2
WORKER_CPUS = 4
"""Logical ones of a worker: one of two takes all replicas."""
REPLICAS = {"Ingress": 2, "VokenGenerator": 2, "DiffusionDecoder": 2, "Ledger": 1}
START_S, END_S, PAUSE_S, TRIES = 240.0, 30.0, 0.2, 3
RECONNECT_S = 120
"""How long a worker's raylet waits for the GCS of a head that is away."""


class Node:
    """`ray start --block`, and all that it starts."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *command],
                cwd=ROOT,
                env={**environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.root = psutil.Process(self.process.pid)
        self._left: list[psutil.Process] = []

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def raylet(self) -> psutil.Process:
        [found] = [process for process in self.root.children() if process.name() == "raylet"]
        return found

    def num_replicas(self) -> int:
        return len(find([self.root], REPLICA))

    def kill(self) -> None:
        """As a machine that loses its power: every process at once."""
        kill(family([self.root]), wait_s=END_S)
        self.process.wait()

    def kill_raylet(self) -> None:
        """Ray's own process of the node alone. Its workers end when they miss it."""
        self._left = family([self.root])
        kill([self.raylet()])

    def clean_up(self) -> None:
        """Wait for what a node without a raylet has left, and kill the rest."""
        psutil.wait_procs(self._left, timeout=END_S)
        kill(self._left)
        self.process.wait()


class LocalCluster:
    """Nodes on this machine, and the server on them."""

    def __init__(self, folder: Path, variables: Mapping[str, str]) -> None:
        """`folder`: for logs; its path has to be short, as Ray's sockets lie in it. `variables`: of every process."""
        self._folder = folder
        self._port, self._dashboard, self._http = find_free_port(), find_free_port(), find_free_port()
        token = secrets.token_hex(32)
        self._environment = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            **variables,
            CALLBACK_VARIABLE: CALLBACK,
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_gcs_rpc_server_reconnect_timeout_s": str(RECONNECT_S),
        }
        self._api = httpx.Client(
            base_url=f"http://127.0.0.1:{self._dashboard}",
            headers={"Authorization": f"Bearer {token}"},
            timeout=30,
            trust_env=False,
        )
        self.url = f"http://127.0.0.1:{self._http}"
        self.has_redis = shutil.which("redis-server") is not None
        self._redis: list[subprocess.Popen[bytes]] = []
        self._redis_password = secrets.token_hex(16)
        self._nodes: list[Node] = []
        """All that were ever started."""

    def start(self) -> None:
        """Start Redis, where it is there, and the nodes."""
        if self.has_redis:
            self._start_redis()
        self.start_head()
        for _ in range(NUM_WORKERS):
            self.add_worker()

    def _start_redis(self) -> None:
        port, password = find_free_port(), self._redis_password
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--requirepass", password]
        self._environment |= {"RAY_REDIS_ADDRESS": f"127.0.0.1:{port}", "RAY_external_storage_namespace": "chaos"}
        command += ["--dir", str(self._folder), "--save", "", "--appendonly", "yes"]
        with (self._folder / "redis.log").open("ab") as log:
            self._redis = [subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)]

    def start_head(self) -> None:
        """Start the head, or after its death the next one with the same state."""
        command = ["--head", "--num-cpus=0", f"--port={self._port}", f"--dashboard-port={self._dashboard}"]
        command += [f"--temp-dir={self._folder}", f"--ray-client-server-port={find_free_port()}"]
        if self._redis:
            command += [f"--redis-password={self._redis_password}"]
        # Ray would take the last head for alive; on the next machine it does not find this file.
        (self._folder / "ray_current_cluster").unlink(missing_ok=True)
        self.head = self._start(command)
        wait_for(self._answers, START_S, pause_s=PAUSE_S)

    def add_worker(self) -> None:
        command = [f"--address=127.0.0.1:{self._port}", f"--num-cpus={WORKER_CPUS}"]
        self._start(command)

    def _start(self, command: list[str]) -> Node:
        """Start a node, and once more where it dies: Ray gives it 30 s, which a busy machine may not have.

        Returns when the node is up: nodes that start at once on one machine take each other's sockets."""
        for _ in range(TRIES):
            ports = [f"--dashboard-agent-listen-port={find_free_port()}", "--min-worker-port=0", "--max-worker-port=0"]
            log = self._folder / f"node-{len(self._nodes)}.log"
            node = Node([*command, *ports, f"--object-store-memory={2**27}"], self._environment, log)
            self._nodes.append(node)
            wait_for(
                lambda log=log, node=node: "Ray runtime started" in log.read_text() or not node.is_alive(),
                START_S,
                pause_s=PAUSE_S,
            )
            if node.is_alive():
                return node
        raise RuntimeError(f"a node did not start: {log.read_text()[-2000:]}")

    @property
    def nodes(self) -> list[Node]:
        """Those that live."""
        return [node for node in self._nodes if node.is_alive()]

    @property
    def workers(self) -> list[Node]:
        """Those that live, but for the head."""
        return [node for node in self.nodes if node is not self.head]

    def _answers(self) -> bool:
        try:
            return self._api.get("/api/serve/applications/").status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def roots(self) -> list[psutil.Process]:
        """`ray start` of each node that lives."""
        return [node.root for node in self.nodes]

    def deploy(self, **args: Any) -> None:
        """`serve deploy`: the application with these arguments; what changed is replaced. Returns when all replicas
        run."""
        application = {
            "name": APPLICATION,
            "route_prefix": "/",
            "import_path": "deployments:app",
            "args": {
                "front_replicas": REPLICAS["Ingress"],
                "generator_min_replicas": REPLICAS["VokenGenerator"],
                "decoder_min_replicas": REPLICAS["DiffusionDecoder"],
                "decoder_num_threads": 1,
                "filters": "none",
                **args,
            },
        }
        config = {
            "proxy_location": "EveryNode",
            "http_options": {"host": "127.0.0.1", "port": self._http},
            "applications": [application],
        }
        self._api.put("/api/serve/applications/", json=config).raise_for_status()
        time.sleep(2)  # the controller takes it up in its next turn
        self.wait_until_whole()

    def application(self) -> dict[str, Any]:
        """Serve's account of the application. Raises httpx.HTTPError, or KeyError where there is none."""
        return self._api.get("/api/serve/applications/").raise_for_status().json()["applications"][APPLICATION]

    def is_whole(self) -> bool:
        """Whether every replica runs, none of an earlier deployment does, and the server answers."""
        try:
            found = self.application()
            states = {name: [one["state"] for one in found["deployments"][name]["replicas"]] for name in REPLICAS}
            is_ready = httpx.get(f"{self.url}/readyz", timeout=10, trust_env=False).status_code == 200
        except (httpx.HTTPError, KeyError):
            return False
        are_running = all(states[name] == ["RUNNING"] * number for name, number in REPLICAS.items())
        return found["status"] == "RUNNING" and is_ready and are_running

    def wait_until_whole(self) -> None:
        wait_for(self.is_whole, START_S, pause_s=PAUSE_S)

    def node_id(self, node: Node) -> str:
        """Ray's name of a node."""
        [option] = [part for part in node.raylet().cmdline() if part.startswith("--node_id=")]
        return option.partition("=")[2]

    def drain(self, node: Node, seconds: int) -> None:
        """Tell Ray that a node goes away after `seconds`, as a cloud does of a spot machine."""
        command = ["drain-node", f"--address=127.0.0.1:{self._port}", f"--node-id={self.node_id(node)}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=chaos"]
        command += [f"--deadline-remaining-seconds={seconds}"]
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *command], env=self._environment, check=True)

    def end(self) -> None:
        """Kill every process."""
        for node in self.nodes:
            node.kill()
        for process in self._redis:
            process.kill()
            process.wait()
        self._api.close()


@contextlib.contextmanager
def local_cluster(folder: Path, variables: Mapping[str, str]) -> Iterator[LocalCluster]:
    """A cluster for the time of the context."""
    cluster = LocalCluster(folder, variables)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.end()
