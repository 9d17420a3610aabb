"""The autoscaling policy on a real Ray Serve: `python -m benchmarks.autoscaling_live`, in five minutes.

The shipped model is served in a Ray of its own with logical CPUs, by the slowed engines of `benchmarks/slowed.py`.
`deployments.profile` measures their stages, then a burst of stories comes, and Serve scales by the policy. What was
seen goes into benchmarks/results/autoscaling_live.json. `benchmarks.autoscaling` compares it with its simulator.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from benchmarks.cluster_model import Arrival
from benchmarks.load import WHAT, WHO
from benchmarks.quality import machine
from benchmarks.slowed import PICTURE_BATCH, TEXT_BATCH
from deployments.__main__ import FEWER_HOPS, check_port, wait_until_ready
from deployments.autoscaling.policy import DECODER, GENERATOR
from deployments.autoscaling.stages import Profile
from deployments.client import Client
from deployments.profile import PROMPT, measure

LIVE = Path(__file__).parent / "results" / "autoscaling_live.json"
POLICY = "deployments.autoscaling.policy:StoryPolicy"
SCALING: dict[str, float] = {"look_back_period_s": 12.0, "upscale_delay_s": 3.0, "downscale_delay_s": 20.0}
MAX_REPLICAS = {GENERATOR: 2, DECODER: 3}
ARRIVALS = (
    *(Arrival(at_s=10.0 * number, pages=2) for number in range(8)),
    *(Arrival(at_s=20.0 + number, pages=6) for number in range(6)),
)
"""A story every ten seconds, and a burst of longer ones."""
MAX_S = 130.0
PERIOD_S = 0.25


def config(storage: str, *, policy: dict[str, Any] | None, most: dict[str, int]) -> ServeDeploySchema:
    """The Serve config; without a policy every engine has one replica."""
    engines = [
        {
            "name": name,
            "autoscaling_config": {"min_replicas": 1, "max_replicas": most[name], **SCALING},
            "ray_actor_options": {"num_cpus": 1},
        }
        for name in (GENERATOR, DECODER)
    ]
    application = {
        "name": "default",
        "route_prefix": "/",
        "import_path": "benchmarks.slowed:app",
        "args": {"storage": storage, "generator_num_threads": 1, "decoder_num_threads": 1, "filters": "none"},
        "deployments": engines,
        **({"autoscaling_policy": {"policy_function": POLICY, "policy_kwargs": policy}} if policy else {}),
    }
    return ServeDeploySchema.model_validate({"applications": [application]})


class Watch:
    """The replicas of each engine, looked at again and again."""

    def __init__(self, since: float) -> None:
        self.series: list[dict[str, float]] = []
        self._since, self._is_over = since, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def is_small(self) -> bool:
        return bool(self.series) and all(self.series[-1][f"{name}.RUNNING"] == 1 for name in (GENERATOR, DECODER))

    def _look(self) -> None:
        while not self._is_over.wait(PERIOD_S):
            seen = {"at_s": time.monotonic() - self._since}
            found = serve.status().applications["default"].deployments
            for name in (GENERATOR, DECODER):
                states = found[name].replica_states
                seen |= {f"{name}.{state}": states.get(state, 0) for state in ("RUNNING", "STARTING", "STOPPING")}
            self.series.append(seen)

    def replica_s(self, name: str) -> float:
        """Seconds of all replicas, from each one's start to its end."""
        pairs = zip(self.series, self.series[1:], strict=False)
        return sum((after["at_s"] - one["at_s"]) * _all(one, name) for one, after in pairs)

    def start_s(self) -> float:
        """Mean seconds from a replica's start to its being ready: those of all that started, over their number."""
        spent = started = 0.0
        for one, after in zip(self.series, self.series[1:], strict=False):
            for name in (GENERATOR, DECODER):
                spent += (after["at_s"] - one["at_s"]) * one[f"{name}.STARTING"]
                started += max(0, after[f"{name}.RUNNING"] - one[f"{name}.RUNNING"])
        return spent / started if started else 0.0


def _all(seen: dict[str, float], name: str) -> float:
    return sum(value for key, value in seen.items() if key.startswith(f"{name}."))


def measure_stages(port: int, storage: str) -> Profile:
    """What `python -m deployments.profile` says of one replica of each engine."""
    _deploy(config(storage, policy=None, most=dict.fromkeys(MAX_REPLICAS, 1)), port)
    with Client(f"http://127.0.0.1:{port}") as client:
        return measure(client, pages=2, steps=None, text_batch=TEXT_BATCH, picture_batch=PICTURE_BATCH)


def run(port: int, storage: str, profile: Profile) -> dict[str, Any]:
    """Figures of the live run."""
    kwargs = {"page_s": profile.text.item_s, "picture_s": profile.picture.item_s}
    _deploy(config(storage, policy=kwargs, most=MAX_REPLICAS), port)
    url = f"http://127.0.0.1:{port}"
    with Client(url) as client:  # the first story is the slowest
        list(client.create(PROMPT, pages=1))
    since = time.monotonic()
    watch = Watch(since)

    def tell(number: int) -> float:
        """Seconds to the story's first picture."""
        arrival = ARRIVALS[number]
        time.sleep(max(0.0, since + arrival.at_s - time.monotonic()))
        began, first = time.monotonic(), 0.0
        prompt = f"A {WHO[number % len(WHO)]} who finds a {WHAT[number % len(WHAT)]}"
        with Client(url) as client:
            for event in client.create(prompt, pages=arrival.pages, seed=900_000 + number):
                if event.name == "image" and not first:
                    first = time.monotonic() - began
        return first

    with ThreadPoolExecutor(len(ARRIVALS)) as pool:
        first_picture_s = list(pool.map(tell, range(len(ARRIVALS))))
    while time.monotonic() - since < MAX_S and not watch.is_small():
        time.sleep(PERIOD_S)
    watch.stop()
    return {
        "profile": dataclasses.asdict(profile),
        "scaling": SCALING,
        "max_replicas": MAX_REPLICAS,
        "start_s": watch.start_s(),
        "arrivals": [dataclasses.asdict(arrival) for arrival in ARRIVALS],
        "first_picture_s": first_picture_s,
        "replica_s": {name: watch.replica_s(name) for name in (GENERATOR, DECODER)},
        "seconds": watch.series[-1]["at_s"],
        "series": [
            seen for before, seen in zip([{}, *watch.series], watch.series, strict=False) if _differs(before, seen)
        ],
    }


def _deploy(schema: ServeDeploySchema, port: int) -> None:
    _get_global_client().deploy_apps(schema, _blocking=True)
    wait_until_ready("127.0.0.1", port)


def _differs(before: dict[str, float], seen: dict[str, float]) -> bool:
    return {**before, "at_s": 0} != {**seen, "at_s": 0}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoscaling_live", description=__doc__)
    parser.add_argument("--port", type=int, default=8197)
    parser.add_argument("--profile", type=Path, help="of these engines, instead of two minutes of measuring it")
    options = parser.parse_args(arguments)
    check_port("127.0.0.1", options.port)
    os.environ.update(FEWER_HOPS | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"})
    ray.init(
        address="local",
        namespace="serve",
        num_cpus=8,  # logical: the engines wait for most of the time
        object_store_memory=256 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    try:
        with tempfile.TemporaryDirectory() as storage:
            profile = Profile.load(options.profile) if options.profile else measure_stages(options.port, storage)
            print(profile, flush=True)
            figures = run(options.port, storage, profile)
    finally:
        serve.shutdown()
        ray.shutdown()
    found = {"figures": figures, "machine": machine(), "command": "python -m benchmarks.autoscaling_live"}
    LIVE.write_text(json.dumps(found, indent=1) + "\n")
    print(f"mean {statistics.mean(figures['first_picture_s']):.1f} s to the first picture; {figures['replica_s']}")


if __name__ == "__main__":
    main()
