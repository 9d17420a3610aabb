"""When a run learns from its replay buffer, and whether that can be."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import distributed

from minigpt5.errors import TrainingError
from minigpt5.objective.replay_buffer import ReplayBuffer, TensorBatch
from training.data.batches import Batch
from training.presets import ReplayConfig
from training.workers import num_workers

T = TypeVar("T", bound=TensorBatch)


def is_replay(batch: Batch[Any], config: ReplayConfig, num_replayable: int) -> bool:
    """Tell whether a step learns from the buffer: `config.steps` do after each step on new samples. For stages whose
    workers keep equally many samples at every step; for others see WorkersReplay."""
    return _may_replay(batch, config) and num_replayable >= config.min_size


def _may_replay(batch: Batch[Any], config: ReplayConfig) -> bool:
    return (batch.step + 1) % (1 + config.steps) > 0


class WorkersReplay:
    """Tells when the workers of a run learn from their buffers: all at the same steps, or those that share gradients
    and weights would wait for each other. Batches without a picture leave buffers of different sizes."""

    def __init__(self, config: ReplayConfig) -> None:
        self._config = config
        self._is_full_enough = False
        """Whether every worker's buffer was, once: buffers do not shrink."""

    def is_replay(self, batch: Batch[Any], num_replayable: int) -> bool:
        """As the function does, by the smallest buffer of all workers. Each of them must ask at the same steps."""
        if not _may_replay(batch, self._config):
            return False
        self._is_full_enough = self._is_full_enough or _smallest(num_replayable) >= self._config.min_size
        return self._is_full_enough


def _smallest(size: int) -> int:
    """The smallest number of all workers."""
    if num_workers() == 1:
        return size
    said = torch.tensor(size)
    distributed.all_reduce(said, op=distributed.ReduceOp.MIN)
    return int(said)


def remember(buffer: ReplayBuffer[T], samples: T, config: ReplayConfig) -> None:
    """Keep samples, where the stage replays. Raises TrainingError where the buffer can never hold as many of their size
    as replaying needs."""
    if not config.steps:
        return
    buffer.extend(samples)
    if buffer.capacity < config.min_size:
        room = "" if buffer.max_bytes is None else f" in {buffer.max_bytes // 2**20} MiB"
        raise TrainingError(
            f"replay.min_size is {config.min_size} but {buffer.capacity} samples of this model fit{room}: "
            f"set replay.min_size={max(1, buffer.capacity // 2)}, or replay.steps=0"
        )
