"""The device of a replica: the GPU that Ray has given it, else the CPU.

A replica without a GPU of its own may see those of its machine: Ray hides none from an actor that asks for none.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click  # the command line of Serve is made with it
import ray

from minigpt5.engine.vllm.settings import VllmSettings
from minigpt5.errors import SettingsError


def num_gpus_here() -> float:
    """GPUs that Ray has given to this actor, such as 1 or 0.5."""
    return float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0))


def device_for(num_gpus: float) -> str:
    """Where a replica with so many GPUs computes: on the CPU, and stderr says so, where torch cannot use them."""
    import torch

    if num_gpus and not torch.cuda.is_available():
        reason = f"Ray has given {num_gpus:g} GPUs, but torch {torch.__version__} has no CUDA here"
        print(f"{reason}: this replica computes on the CPU; install a CUDA build of torch", file=sys.stderr, flush=True)
    return "cuda" if num_gpus and torch.cuda.is_available() else "cpu"


def place_generator(num_cpus: float, num_gpus: float, vllm: VllmSettings | None) -> dict[str, Any]:
    """Options of the generator's deployment: what a replica reserves, and the environment that it runs in.

    Where vLLM divides a model, its own workers have the GPUs: one bundle each, on the replica's node.
    """
    options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    if vllm and vllm.python:
        options["runtime_env"] = {"py_executable": vllm.python}
    if not (vllm and num_gpus and vllm.num_gpus > 1):
        return {"ray_actor_options": options}
    return {
        "ray_actor_options": {**options, "num_gpus": 0},
        "placement_group_bundles": [{"CPU": num_cpus}, *({"GPU": 1.0} for _ in range(vllm.num_gpus))],
        "placement_group_strategy": "STRICT_PACK",
    }


def num_gpus_of_cluster() -> float:
    """GPUs of the Ray that this process is in; before there is one, those of the Ray that it will connect to, or of
    this machine, where Ray will start.

    Raises SettingsError where there is no Ray at the address that is given.
    """
    if ray.is_initialized():
        return float(ray.cluster_resources().get("GPU", 0))
    if address := _address():
        try:
            # `serve run` connects later, with a runtime environment that only it knows.
            with ray.init(address=address, log_to_driver=False, logging_level="ERROR"):
                return float(ray.cluster_resources().get("GPU", 0))
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise SettingsError(
                f"the Ray at {address} does not say how many GPUs it has ({str(error).splitlines()[0]}): "
                "set generator_num_gpus and decoder_num_gpus"
            ) from error
    import torch

    return float(torch.cuda.device_count())


def _address() -> str | None:
    """The address of a Ray by `serve run --address`, else by RAY_ADDRESS."""
    command = click.get_current_context(silent=True)
    return (command.params.get("address") if command else None) or os.environ.get("RAY_ADDRESS")


def share_gpus(num_gpus: float) -> float:
    """GPUs of a replica where a cluster has so many: one each; two kinds of engines share a single one."""
    return min(1.0, num_gpus / 2)
