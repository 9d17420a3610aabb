"""A stage on a Ray cluster: Ray Train workers, each with its shard of the Ray Data rows."""

from __future__ import annotations

import os
import tempfile

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from minigpt5.errors import TrainingError
from training import checkpoint, data, loop
from training.parts import Parts
from training.presets import Preset

MAX_FAILURES = 3


def run_on_ray(preset: Preset, parts: Parts, num_workers: int) -> None:
    """Train with `num_workers` workers; the folders of `parts` must be ones that all of them see."""
    if preset.batch_size % num_workers:
        raise TrainingError(
            f"batch_size is {preset.batch_size} but must be a multiple of the {num_workers} workers: set batch_size="
        )
    if not ray.is_initialized():
        ray.init(num_cpus=max(4, os.cpu_count() or 1))  # logical: data tasks must fit beside the workers
    first_step = checkpoint.newest_step(parts.runs / preset.stage)
    settings = {"preset": preset, "parts": parts, "first_step": first_step}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = TorchTrainer(
            work,
            train_loop_config=settings,
            scaling_config=ScalingConfig(num_workers=num_workers, resources_per_worker={"CPU": 0.5}),
            run_config=RunConfig(
                name=preset.stage,
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
            ),
            datasets={"train": data.ray_rows(preset, first_step=first_step)},
        )
        trainer.fit()


def work(settings: dict[str, object]) -> None:
    """One worker."""
    from training.train import build_stage

    preset, parts = settings["preset"], settings["parts"]
    assert isinstance(preset, Preset) and isinstance(parts, Parts)
    torch.set_num_threads(preset.num_threads)
    batches = data.ray_batches(
        ray.train.get_dataset_shard("train"),
        preset,
        first_step=int(str(settings["first_step"])),
        num_workers=ray.train.get_context().get_world_size(),
    )
    loop.fit(build_stage(preset, parts), preset, parts.runs / preset.stage, batches, report=ray.train.report)
