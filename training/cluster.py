"""A stage on a Ray cluster: Ray Train workers, each with its share of the examples, through Ray Data."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from dataclasses import dataclass
from typing import TypedDict

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from minigpt5.errors import NotFinite, TrainingError
from training import checkpoint, devices, loop, workers
from training.data import batches
from training.data.batches import StageData
from training.presets import Preset
from training.run_folder import RunFolder
from training.stage import build_stage
from training.weight_sources import WeightSources

MAX_FAILURES = 3
REPORT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a worker is told."""

    preset: Preset
    sources: WeightSources
    out: RunFolder
    data: StageData
    owner: str = ""


def check_workers(preset: Preset, num_workers: int) -> None:
    """Before any work: raises TrainingError where the workers cannot share a batch."""
    if preset.batch_size % num_workers:
        raise TrainingError(
            f"batch_size is {preset.batch_size} but must be a multiple of the {num_workers} workers: set batch_size="
        )


def check_gpus(num_workers: int, num_gpus: float, there: float) -> None:
    """Raise TrainingError where a Ray of our own has `there` GPUs: nobody will add any, and Ray would wait for ever."""
    if num_workers * num_gpus > there:
        raise TrainingError(
            f"{num_workers} workers of {num_gpus:g} GPUs do not fit this machine, which has {there:g}: set --gpus or "
            "--workers, or name a cluster with RAY_ADDRESS"
        )


def run_on_ray(run: Run, num_workers: int, *, num_gpus: float = 0.0) -> None:
    """Train with `num_workers` workers; the folders of `run` must be ones that all of them see.

    Raises TrainingError: of a worker, as it was raised there, or where the workers died more than MAX_FAILURES times.
    """
    check_workers(run.preset, num_workers)
    if not ray.is_initialized():
        # Where RAY_ADDRESS says, as in a submitted job; else one of our own, with logical CPUs: half a one for each
        # worker, and one for its data tasks. No more, and no dashboard: idle processes take their share of the cores.
        num_cpus = max(os.cpu_count() or 1, num_workers + math.ceil(num_workers / 2))
        own = {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
        ray.init(**({} if "RAY_ADDRESS" in os.environ else own))
    if "RAY_ADDRESS" not in os.environ:
        check_gpus(num_workers, num_gpus, ray.cluster_resources().get("GPU", 0))
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # else what a worker prints comes twice
    settings = WorkerSettings(run=dataclasses.replace(run, owner=checkpoint.claim(run.out)))
    resources = {"CPU": 0.5} | ({"GPU": num_gpus} if num_gpus else {})
    with tempfile.TemporaryDirectory() as scratch:
        trainer = TorchTrainer(
            work,
            train_loop_config=settings,
            # Gradients lie on the GPUs; what workers agree on besides does not.
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if num_gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=num_workers, use_gpu=bool(num_gpus), resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=run.preset.stage,
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
            ),
        )
        try:
            result = trainer.fit()
        except TrainingFailedError as failure:
            raise TrainingError(reason_of(failure)) from failure
    if result.return_value:
        raise TrainingError(result.return_value)


def reason_of(failure: TrainingFailedError) -> str:
    """In one line: what a worker raised, where it was one of our own errors."""
    raised = failure.worker_failures.values() if isinstance(failure, WorkerGroupError) else ()
    for one in raised:
        error = getattr(one, "_base_exc", one)  # Ray Train's wrapper shows the traceback alone in public
        if isinstance(error, TrainingError):
            return str(error)
    last = str(failure).strip().splitlines()[-1]
    return f"the workers failed more than {MAX_FAILURES} times, the last time with: {last}; the checkpoints are kept"


class WorkerSettings(TypedDict):
    """What Ray Train hands to each worker."""

    run: Run


def work(settings: WorkerSettings) -> str | None:
    """One worker. Returns why a run ended early that a restart would not help."""
    run = settings["run"]
    device = get_device()
    preset = devices.for_device(run.preset, device)
    torch.set_num_threads(preset.num_threads)
    context = ray.train.get_context()
    share = {"rank": context.get_world_rank(), "num_workers": context.get_world_size()}
    try:
        loop.fit(
            build_stage(preset, run.sources, run.data),
            preset,
            run.out,
            batches.ray_batches(run.data.training, preset, **share),
            validation=batches.validation_batches(run.data.validation, preset, **share),
            owner=run.owner,
            report=Reports(),
            device=device,
        )
    except NotFinite as error:  # raised by every worker, and a restart would come to the same rows
        return str(error)
    return None


class Reports:
    """Metrics to the driver's terminal; and to Ray Train seldom, since all workers wait for each other there."""

    def __init__(self) -> None:
        self._last_s = 0.0

    def __call__(self, metrics: dict[str, float]) -> None:
        if workers.is_first_worker():
            print({name: round(value, 4) for name, value in metrics.items()}, flush=True)
        is_last = "loss" not in metrics
        if is_last or metrics["elapsed_s"] - self._last_s >= REPORT_S:  # the same on all workers
            self._last_s = metrics["elapsed_s"]
            ray.train.report(metrics)
