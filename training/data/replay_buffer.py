"""What was dear to make for fresh rows, learnt from again in the steps between. It is in no checkpoint: a run that goes
on begins to remember anew."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from training.data.batches import Batch
from training.presets import Preset


class ReplayBuffer(deque[tuple[Tensor, ...]]):
    """The last rows that were made."""

    def sample(self, num: int) -> list[tuple[Tensor, ...]]:
        return [self[index] for index in torch.randint(len(self), (num,)).tolist()]


def is_replay(batch: Batch, preset: Preset, num_replayable: int) -> bool:
    """Whether a step learns from what is remembered: `replay_steps` of them after each one on fresh rows."""
    is_between = (batch["step"] + 1) % (1 + preset.replay_steps) > 0  # type: ignore[operator]
    return is_between and num_replayable >= preset.replay_from
