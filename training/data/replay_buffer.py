"""Replay buffer for expensive samples. It is not checkpointed: a resumed run fills it again."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from minigpt5.errors import TrainingError
from training.data.batches import Batch
from training.presets import ReplayConfig


class ReplayBuffer:
    """The newest samples that fit in `max_bytes`. All samples of a run have one size."""

    def __init__(self, *, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._samples: deque[tuple[Tensor, ...]] = deque()

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def capacity(self) -> int:
        """Samples that have room, of the size of those in the buffer."""
        return self.max_bytes // sum(part.nbytes for part in self._samples[0])

    def extend(self, samples: list[tuple[Tensor, ...]]) -> None:
        self._samples.extend(tuple(part.clone() for part in sample) for sample in samples)  # no views of a batch
        while len(self._samples) > self.capacity:
            self._samples.popleft()

    def check_room(self, config: ReplayConfig) -> None:
        """Raise TrainingError where the buffer can never hold as many samples as replaying needs."""
        if self.capacity < config.min_size:
            raise TrainingError(
                f"replay.min_size is {config.min_size} but {self.capacity} samples of this model fit in "
                f"{self.max_bytes // 2**20} MiB: set replay.min_size={max(1, self.capacity // 2)}, or replay.steps=0"
            )

    def sample(self, num: int) -> list[tuple[Tensor, ...]]:
        return [self._samples[index] for index in torch.randint(len(self), (num,)).tolist()]


def is_replay(batch: Batch[Any], config: ReplayConfig, num_replayable: int) -> bool:
    """Tell whether a step learns from the buffer: `config.steps` do after each step on new samples."""
    return (batch.step + 1) % (1 + config.steps) > 0 and num_replayable >= config.min_size
