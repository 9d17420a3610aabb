"""What the workers of a run decide and do together; a run without workers is one of its own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import distributed, nn

from minigpt5.errors import NotFinite
from training.checkpoint import checkpoints
from training.data.batches import Batch
from training.presets import Preset
from training.run_folder import RunFolder


def own_rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def num_workers() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first_worker() -> bool:
    return own_rank() == 0


def seed_of(preset: Preset, step: int) -> int:
    """Derive the seed of a step's noise, timesteps and dropout on this worker."""
    return int(np.random.SeedSequence([preset.seed, own_rank(), step]).generate_state(1, np.uint64)[0])


def agreed_checkpoint(folder: RunFolder) -> str | None:
    """The newest one that the first worker sees: a run that is dying may write another one meanwhile."""
    newest = next(reversed(checkpoints(folder)), None)
    if not distributed.is_initialized():
        return newest
    everyone: list[str | None] = [newest]
    distributed.broadcast_object_list(everyone, src=0)
    return everyone[0]


def mean_over_workers(found: dict[str, list[float]]) -> dict[str, float]:
    """The mean of each name's values, of all workers together."""
    everyone: list[dict[str, list[float]]] = [found]
    if distributed.is_initialized():
        everyone = [{} for _ in range(distributed.get_world_size())]
        distributed.all_gather_object(everyone, found)
    names = dict.fromkeys(name for one in everyone for name in one)
    values = {name: [value for one in everyone for value in one.get(name, [])] for name in names}
    return {name: sum(some) / len(some) for name, some in values.items()}


def agree(elapsed_s: float, losses: list[float], batches: list[Batch[Any]]) -> float:
    """The first worker's clock: what ends a run or makes a checkpoint must be the same for all.

    Raises NotFinite on every worker where a loss of any is not: one alone would leave the others waiting for its
    gradients. `losses` are those of `batches`, all of a step. One message carries both.
    """
    together = list(zip(losses, batches, strict=True))
    found = [f"{loss}, examples {batch.ids}" for loss, batch in together if not math.isfinite(loss)]
    if distributed.is_initialized():
        clock = elapsed_s if is_first_worker() else 0.0
        said = torch.tensor([len(found), clock], dtype=torch.float64)
        distributed.all_reduce(said)
        num_broken, elapsed_s = said.tolist()
        if num_broken:
            everyone: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
            distributed.all_gather_object(everyone, found)
            found = [entry for entries in everyone for entry in entries]
    if found:
        raise NotFinite(
            f"the loss at step {batches[0].step} is not finite: {'; '.join(found)}: "
            "lower the learning rate or look at these examples; the last checkpoint is kept"
        )
    return elapsed_s


def average_over_workers(trained: dict[str, nn.Parameter]) -> None:
    """Mean gradients; a worker whose batch did not touch a parameter counts as zero, so that none waits for ever."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    for parameter in trained.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in trained.values() if parameter.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])  # hundreds of small ones would wait in a row
    distributed.all_reduce(together)
    together /= distributed.get_world_size()
    for gradient, mean in zip(gradients, together.split([one.numel() for one in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
