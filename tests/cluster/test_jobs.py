"""The jobs of cluster/kubernetes: commands, pods and their sizes."""

from __future__ import annotations

import contextlib
import io
import re
import shlex

import pytest

from batch_jobs import illustrate
from batch_jobs.pipeline import ENGINE_CPUS
from minigpt5.model.sizes import print_tables
from tests.helpers.cluster_files import GIB, GPU, JOBS, of_kind, pods
from tests.test_docs import parse_all
from training.presets import PUBLISHED
from training.train import make_parser


def test_jobs_name_modules_and_arguments_that_they_take() -> None:
    entrypoints = {name: shlex.split(of_kind(name, "RayJob")[0]["spec"]["entrypoint"]) for name in JOBS}
    assert set(entrypoints) == {f"jobs/{job}" for job in ("align", "learn", "illustrate", "evaluate")}
    assert all(words[:2] == ["python", "-m"] for words in entrypoints.values())
    answers = parse_all([words[2:] for words in entrypoints.values()])
    assert len(answers) == len(JOBS) and all(code == 77 for _, code, _ in answers), answers


@pytest.mark.parametrize("stage", ["align", "learn"])
def test_a_training_job_has_a_pod_for_each_worker(stage: str) -> None:
    (job,) = of_kind(f"jobs/{stage}", "RayJob")
    options = make_parser().parse_args(shlex.split(job["spec"]["entrypoint"])[3:])
    assert options.stage == stage and stage in PUBLISHED
    assert PUBLISHED[stage].batch_size % options.workers == 0
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"] == options.workers
    worker = next(pod for pod in pods(f"jobs/{stage}") if pod.name == "workers")
    assert worker.limits[GPU] == options.gpus
    with contextlib.redirect_stdout(io.StringIO()) as said:
        print_tables()
    sizes = {
        name: int(number.replace(",", ""))
        for name, number in re.findall(r"^  (\w[\w -]+?) +([\d,]+)$", said.getvalue(), flags=re.M)
    }
    names = ("language model", "vision encoder", "Q-Former and projection", "mapper", "UNet", "VAE", "text encoder")
    assert worker.limits["memory"] >= 4 * sum(sizes[name] for name in names) + 8 * GIB  # float32, while it loads


def test_learn_starts_where_align_ended() -> None:
    align, learn = (
        make_parser().parse_args(shlex.split(of_kind(f"jobs/{stage}", "RayJob")[0]["spec"]["entrypoint"])[3:])
        for stage in ("align", "learn")
    )
    assert learn.start == f"{align.out}/model"


def test_a_bulk_job_has_cpus_for_its_engines() -> None:
    (job,) = of_kind("jobs/illustrate", "RayJob")
    options = illustrate.make_parser().parse_args(shlex.split(job["spec"]["entrypoint"])[3:])
    worker = next(pod for pod in pods("jobs/illustrate") if pod.name == "workers")
    num_cpus = (options.generators[1] + options.decoders[1]) * ENGINE_CPUS
    assert num_cpus + 2 <= worker.max_replicas * worker.limits["cpu"]  # two for Ray Data's own tasks


def test_the_driver_that_computes_runs_on_a_worker() -> None:
    (job,) = of_kind("jobs/evaluate", "RayJob")
    worker = next(pod for pod in pods("jobs/evaluate") if pod.name == "workers")
    threads = re.search(r"--threads (\d+)", job["spec"]["entrypoint"])
    assert threads and int(threads[1]) == job["spec"]["entrypointNumCpus"] <= worker.limits["cpu"]
