"""Clients that vanish in mid-stream leave nothing behind on a real Serve: decoders scale back, and gauges are 0."""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from deployments.__main__ import wait_until_ready
from deployments.autoscaling.policy import DECODER, GENERATOR
from deployments.sse import read_events
from minigpt5.config import default_model_folder
from tests.helpers.processes import find_free_port

MODEL = default_model_folder()
METRICS_PORT = 18401
NUM_STORIES = 40
NUM_CHATS = 8
"""A chat's work stops with its client; a story is made to its end."""
DOWNSCALE_DELAY_S = 10.0
REPORT_S = 1.0
"""How often replicas and handles report what the autoscaler counts."""
STOP_S = 6.0
"""The autoscaler's own look-back, its ticks, and the time in which an idle replica's process ends."""
SCALING = {
    "min_replicas": 1,
    "max_replicas": 3,
    "target_ongoing_requests": 2,
    "metrics_interval_s": REPORT_S,
    "look_back_period_s": 2.0,
    "upscale_delay_s": 2.0,
    "downscale_delay_s": DOWNSCALE_DELAY_S,
}
POLICY = {"policy_function": "deployments.autoscaling.policy:StoryPolicy", "policy_kwargs": {"picture_s": 6}}
GAUGES = (
    "minigpt5_running_requests",
    "minigpt5_queued_requests",
    "minigpt5_pending_tokens",
    "minigpt5_pending_samples",
    "minigpt5_admitted_requests",
    "serve_replica_processing_queries",
    "serve_deployment_queued_queries",
    "serve_num_ongoing_http_requests",
)
GAUGES_S = 45.0
"""Ray's processes send gauges to the agent every 10 s."""


@pytest.fixture(scope="module")
def port(monkeypatch_module: pytest.MonkeyPatch) -> Iterator[int]:
    """Of Serve, in a Ray of its own with logical CPUs."""
    found = find_free_port()
    ray.init(
        address="local",
        namespace="serve",
        num_cpus=8,
        object_store_memory=2**28,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _metrics_export_port=METRICS_PORT,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": found})
        yield found
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        yield patch


def deploy(storage: Path, port: int, policy: dict[str, Any] | None) -> None:
    application = {
        "name": "default",
        "route_prefix": "/",
        "import_path": "benchmarks.slowed:app",
        "args": {
            "storage": str(storage),
            "filters": "none",
            "max_wait_s": 3600,
            "generator_num_threads": 1,
            "decoder_num_threads": 1,
        },
        "deployments": [
            {"name": GENERATOR, "ray_actor_options": {"num_cpus": 1}},
            {"name": DECODER, "autoscaling_config": SCALING, "ray_actor_options": {"num_cpus": 1}},
        ],
        **({"autoscaling_policy": policy} if policy else {}),
    }
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}), _blocking=False)
    deadline = time.monotonic() + 200
    while serve.status().applications["default"].status != "RUNNING":
        assert time.monotonic() < deadline, serve.status()
        time.sleep(0.5)
    wait_until_ready("127.0.0.1", port)


def vanish(port: int, path: str, body: dict[str, Any], *, after: str) -> None:
    """Begin a stream, and close its connection once an event has come whose name or data has `after`."""
    url = f"http://127.0.0.1:{port}{path}"
    with httpx.stream("POST", url, json={**body, "stream": True}, timeout=120, trust_env=False) as reply:
        assert reply.status_code == 200, reply.read()
        for event in read_events(reply.iter_bytes()):
            if after in event.name or after in event.data:
                return
    raise AssertionError(f"no {after} came")


def num_decoders() -> int:
    """Decoders that run, start or stop."""
    states = serve.status().applications["default"].deployments[DECODER].replica_states
    return sum(states.values())


def read_gauges() -> dict[str, float]:
    """Name -> the sum over all processes."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://127.0.0.1:{METRICS_PORT}", timeout=10) as reply:
        text = reply.read().decode()
    found: dict[str, float] = {}
    for name, value in re.findall(r"^ray_(\w+)(?:\{.*\})? (\S+)$", text, flags=re.M):
        if name in GAUGES:
            found[name] = found.get(name, 0.0) + float(value)
    return found


def wait_for_all(port: int) -> None:
    """Until every story has ended."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client:
        while True:
            stories = client.get("/v1/stories", params={"limit": 100}).json()["data"]
            assert len(stories) == NUM_STORIES
            if all(story["status"] == "done" for story in stories):
                return
            time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
@pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason=f"no model is shipped in {MODEL}")
@pytest.mark.parametrize("policy", [None, POLICY], ids=["serve", "stories"])
def test_decoders_scale_back_after_forty_streams_whose_clients_vanish(
    port: int, tmp_path: Path, policy: dict[str, Any] | None
) -> None:
    deploy(tmp_path / "storage", port, policy)
    seen: list[int] = []
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.5):
            seen.append(num_decoders())

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    with ThreadPoolExecutor(NUM_STORIES + NUM_CHATS) as pool:
        streams = [
            pool.submit(
                vanish,
                port,
                "/v1/stories",
                {
                    "prompt": f"A fox and {number} balloons",
                    "pages": 2,
                    "seed": number,
                    "steps": 2,
                    "max_page_tokens": 8,
                },
                after=("story", "text", "slot", "image")[number % 4],
            )
            for number in range(NUM_STORIES)
        ]
        streams += [
            pool.submit(
                vanish,
                port,
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": f"Draw {number} owls"}], "modalities": ["text", "image"]},
                after="content",
            )
            for number in range(NUM_CHATS)
        ]
        for stream in streams:
            stream.result()
    wait_for_all(port)
    since = time.monotonic()
    while num_decoders() > 1 and time.monotonic() - since < 60:
        time.sleep(0.2)
    took_s = time.monotonic() - since
    is_over.set()
    looking.join()
    assert max(seen) == 3, "the decoders were to scale up first"
    assert num_decoders() == 1
    assert took_s <= DOWNSCALE_DELAY_S + REPORT_S + STOP_S
    deadline = time.monotonic() + GAUGES_S
    while any((gauges := read_gauges()).values()) and time.monotonic() < deadline:
        time.sleep(1)
    assert set(gauges) == set(GAUGES)
    assert not any(gauges.values()), gauges
    print(f"decoders were back at their minimum after {took_s:.1f} s")
