"""Where replicas compute: on the GPU that Ray gives them, and never on another's. Ray counts what it is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from deployments.application import AppArgs, app
from deployments.engines.placement import device_for, num_gpus_here, num_gpus_of_cluster, share_gpus
from minigpt5.codec import to_json
from minigpt5.config import storybook
from minigpt5.errors import SettingsError
from minigpt5.limits import ON_CPU, ON_GPU


def engines(folder: Path, **settings: object) -> list[Any]:
    """The generator's and the decoder's deployments, as the builder makes them."""
    (folder / "config.json").write_text(json.dumps(to_json(storybook())))
    application = app(AppArgs.model_validate({"model": str(folder), "storage": str(folder), **settings}))
    return [argument._bound_deployment for argument in application._bound_deployment.init_args[:2]]


def test_two_engines_share_one_gpu_and_have_one_each_of_more() -> None:
    assert [share_gpus(num) for num in (0, 1, 2, 8)] == [0, 0.5, 1, 1]


def test_a_replica_computes_on_its_gpu_only_where_torch_can(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (device_for(0), device_for(0.5)) == ("cpu", "cuda")
    assert not capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (device_for(0), device_for(0.5)) == ("cpu", "cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Ray has given 0.5 GPUs") and line.endswith("install a CUDA build of torch")


def test_a_replica_has_the_gpus_that_are_asked_for(tmp_path: Path) -> None:
    generator, decoder = engines(tmp_path, generator_num_gpus=1, decoder_num_gpus=0, generator_kv_cache_gib=3)
    assert generator.ray_actor_options["num_gpus"] == 1 and not decoder.ray_actor_options["num_gpus"]
    assert generator.init_args[3]["kv_cache_gib"] == 3
    targets = [
        deployment._deployment_config.autoscaling_config.target_ongoing_requests for deployment in (generator, decoder)
    ]
    assert targets == [ON_GPU.max_batch // 2, 16]


@pytest.fixture
def one_gpu() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=2, num_gpus=1, log_to_driver=False, logging_level="ERROR", include_dashboard=False
    )
    yield
    ray.shutdown()


@pytest.mark.cluster
def test_engines_share_the_clusters_gpu_and_an_actor_without_one_computes_on_the_cpu(
    one_gpu: None, tmp_path: Path
) -> None:
    assert num_gpus_of_cluster() == 1
    generator, decoder = engines(tmp_path)
    assert [deployment.ray_actor_options["num_gpus"] for deployment in (generator, decoder)] == [0.5, 0.5]
    elsewhere = ray.remote(num_cpus=0.1)(num_gpus_here)
    assert ray.get([elsewhere.options(num_gpus=num).remote() for num in (0.5, 0)]) == [0.5, 0]
    assert ON_CPU.max_batch == 16


COUNT = """
import click, ray
from deployments.engines.placement import num_gpus_of_cluster

@click.command()
@click.option("--address")
def count(address: str) -> None:
    print(num_gpus_of_cluster(), ray.is_initialized())

count()
"""


def count(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """What a process counts that is not in a Ray yet, under a command as `serve run` is one."""
    settings = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | settings
    command = [sys.executable, "-c", COUNT, *arguments]
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120)


@pytest.mark.cluster
def test_a_cluster_elsewhere_is_asked_for_its_gpus(one_gpu: None) -> None:
    address = ray.get_runtime_context().gcs_address
    for done in (count(RAY_ADDRESS=address), count("--address", address, RAY_ADDRESS="127.0.0.1:1")):
        assert done.stdout.strip() == "1.0 False", done.stderr


def test_a_ray_that_cannot_be_asked_needs_both_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    with pytest.raises(SettingsError, match="127.0.0.1:1 does not say .*: set generator_num_gpus and decoder_num_gpus"):
        engines(tmp_path)
    assert engines(tmp_path, generator_num_gpus=0, decoder_num_gpus=0)
