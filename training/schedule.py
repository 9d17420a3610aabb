"""How far a run is, and the learning rate there."""

from __future__ import annotations

import math

from training.checkpoint import Position
from training.presets import Preset


def progress_of(preset: Preset, position: Position) -> float:
    """0 at the start, 1 at the end: by steps, or by minutes where the preset bounds them.

    A run of no steps ends at once: it puts the parts that it would have gone on from into one folder.
    """
    by_steps = position.step / preset.steps if preset.steps else 1.0
    by_time = position.elapsed_s / (60 * preset.minutes) if preset.minutes else 0.0
    return max(by_steps, by_time)


def learning_rate_factor(step: int, progress: float, preset: Preset) -> float:
    """Linear warm-up, then a half cosine down to a hundredth, or a line down to nothing."""
    warm = min(1.0, (step + 1) / max(1, preset.optimizer.warmup_steps))
    if preset.optimizer.schedule == "linear":
        return warm * max(0.0, 1 - progress)
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
