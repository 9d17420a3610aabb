"""The jobs of cluster/kubernetes: commands, pods and their sizes."""

from __future__ import annotations

import re

import pytest

from batch_jobs import illustrate
from batch_jobs.pipeline import ENGINE_CPUS
from tests.helpers.cluster_files import GIB, GPU, job_commands, of_kind, pods, published_tables
from training.presets import PUBLISHED
from training.train import make_parser


def test_every_job_is_a_command_of_ours() -> None:
    """tests/test_docs.py parses their options."""
    assert {name: words[0] for name, words in job_commands().items()} == {
        "jobs/align": "training.train",
        "jobs/learn": "training.train",
        "jobs/illustrate": "batch_jobs.illustrate",
        "jobs/evaluate": "benchmarks.quality",
    }


@pytest.mark.parametrize("stage", ["align", "learn"])
def test_a_training_job_has_a_pod_for_each_worker(stage: str) -> None:
    (job,) = of_kind(f"jobs/{stage}", "RayJob")
    options = make_parser().parse_args(job_commands()[f"jobs/{stage}"][1:])
    assert options.stage == stage and stage in PUBLISHED
    assert PUBLISHED[stage].batch_size % options.workers == 0
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"] == options.workers
    worker = next(pod for pod in pods(f"jobs/{stage}") if pod.name == "workers")
    assert worker.limits[GPU] == options.gpus
    sizes = {
        name: int(number.replace(",", ""))
        for name, number in re.findall(r"^  (\w[\w -]+?) +([\d,]+)$", published_tables(), flags=re.M)
    }
    names = ("language model", "vision encoder", "Q-Former and projection", "mapper", "UNet", "VAE", "text encoder")
    assert worker.limits["memory"] >= 4 * sum(sizes[name] for name in names) + 8 * GIB  # float32, while it loads


def test_learn_starts_where_align_ended() -> None:
    align, learn = (make_parser().parse_args(job_commands()[f"jobs/{stage}"][1:]) for stage in ("align", "learn"))
    assert learn.start == f"{align.out}/model"


def test_a_bulk_job_has_cpus_for_its_engines() -> None:
    options = illustrate.make_parser().parse_args(job_commands()["jobs/illustrate"][1:])
    worker = next(pod for pod in pods("jobs/illustrate") if pod.name == "workers")
    num_cpus = (options.generators[1] + options.decoders[1]) * ENGINE_CPUS
    assert num_cpus + 2 <= worker.max_replicas * worker.limits["cpu"]  # two for Ray Data's own tasks


def test_the_driver_that_computes_runs_on_a_worker() -> None:
    (job,) = of_kind("jobs/evaluate", "RayJob")
    worker = next(pod for pod in pods("jobs/evaluate") if pod.name == "workers")
    threads = re.search(r"--threads (\d+)", job["spec"]["entrypoint"])
    assert threads and int(threads[1]) == job["spec"]["entrypointNumCpus"] <= worker.limits["cpu"]
