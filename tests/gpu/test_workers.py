"""GPUs that Ray and torch's process groups share out: replicas on their own GPU, and ZeRO over NCCL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from deployments.engines.placement import device_for, num_gpus_here, num_gpus_of_cluster
from minigpt5.config import default_model_folder
from tests.training.test_zero import largest_difference, train

WORKER = """
import json, os, sys
import torch
from torch import distributed
from tests.helpers.toy_stage import ToyStage, batches, TOY
from training.presets import override
from training.strategy import new_strategy

zero_stage, steps = sys.argv[2], int(sys.argv[3])
device = torch.device(os.environ["TEST_DEVICE"])
torch.set_num_threads(1)
if device.type == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
stage, preset = ToyStage(), override(TOY, [f"zero_stage={zero_stage}"])
stage.objective.to(device)
strategy = new_strategy(stage.objective, stage.parameter_groups(), preset.optimizer)
stream = batches(distributed.get_rank(), distributed.get_world_size())(0)
losses = []
for step in range(steps):
    loss = strategy.losses(next(stream), 0.0)["loss"]
    assert loss.device.type == device.type
    strategy.backward(loss)
    strategy.step(1.0)
    distributed.all_reduce(mean := loss.detach().double())
    losses.append(mean.item() / distributed.get_world_size())
if distributed.get_rank() == 0:
    print("LOSSES", json.dumps(losses))
"""


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu(2))],
)
@pytest.mark.timeout(1200)
def test_zero_on_two_devices_has_the_plain_curve(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_DEVICE", device)
    plain = train(tmp_path / "plain", None, steps=10, worker=WORKER)
    assert len(plain) == 10 and plain[-1] < plain[0]
    for zero_stage in (1, 2, 3):
        curve = train(tmp_path / str(zero_stage), zero_stage, steps=10, worker=WORKER)
        assert largest_difference(curve, plain) < 1e-3, zero_stage


@pytest.fixture
def own_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    yield
    ray.shutdown()


@ray.remote(num_cpus=0.1)
class Replica:
    """Loads a generator as a replica does."""

    def __init__(self, folder: str) -> None:
        from deployments.engines.voken_generator import VokenGenerator

        self.engine = VokenGenerator(folder, 1).engine

    def facts(self) -> tuple[float, str, str | None]:
        """GPUs of this actor, where its weights lie, and which GPUs it sees."""
        device = self.engine.language.embedding.device.type
        return num_gpus_here(), device, os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize("num_gpus", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.gpu)])
@pytest.mark.cluster
def test_a_replica_computes_where_ray_has_placed_it(own_ray: None, num_gpus: int) -> None:
    """One without a GPU stays on the CPU, on a machine with GPUs too."""
    replica = Replica.options(num_gpus=num_gpus).remote(str(default_model_folder()))  # type: ignore[attr-defined]
    given, device, visible = ray.get(replica.facts.remote())
    assert (given, device) == (num_gpus, device_for(num_gpus))
    assert not num_gpus or (num_gpus_of_cluster() >= 1 and visible and "," not in visible)
