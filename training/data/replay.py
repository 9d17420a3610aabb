"""When a run learns from its replay buffer, and whether that can be."""

from __future__ import annotations

from typing import Any

from minigpt5.errors import TrainingError
from minigpt5.objective.replay_buffer import ReplayBuffer
from training.data.batches import Batch
from training.presets import ReplayConfig


def is_replay(batch: Batch[Any], config: ReplayConfig, num_replayable: int) -> bool:
    """Tell whether a step learns from the buffer: `config.steps` do after each step on new samples."""
    return (batch.step + 1) % (1 + config.steps) > 0 and num_replayable >= config.min_size


def validate_room(buffer: ReplayBuffer[Any], config: ReplayConfig) -> None:
    """Raise TrainingError where a buffer, which has a sample, can never hold as many as replaying needs."""
    if buffer.capacity < config.min_size:
        room = "" if buffer.max_bytes is None else f" in {buffer.max_bytes // 2**20} MiB"
        raise TrainingError(
            f"replay.min_size is {config.min_size} but {buffer.capacity} samples of this model fit{room}: "
            f"set replay.min_size={max(1, buffer.capacity // 2)}, or replay.steps=0"
        )
