"""Replay buffer for expensive samples. It is not checkpointed: a resumed run fills it again."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from training.data.batches import Batch
from training.presets import ReplayConfig


class ReplayBuffer(deque[tuple[Tensor, ...]]):
    """The newest samples."""

    def sample(self, num: int) -> list[tuple[Tensor, ...]]:
        return [self[index] for index in torch.randint(len(self), (num,)).tolist()]


def is_replay(batch: Batch[Any], config: ReplayConfig, num_replayable: int) -> bool:
    """Tell whether a step learns from the buffer: `config.steps` do after each step on new samples."""
    return (batch.step + 1) % (1 + config.steps) > 0 and num_replayable >= config.min_size
