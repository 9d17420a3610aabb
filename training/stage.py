"""What a stage of training is, and how the stage of a preset is built."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from training.data.batches import StageData
from training.presets import STAGES, Preset
from training.weight_sources import WeightSources


class Stage(Protocol):
    """One stage of training: what is trained, on which loss, and what comes out."""

    @property
    def objective(self) -> nn.Module:
        """Batch, progress (0 to 1) -> losses by name; "loss" is the one that is minimised."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, as torch's optimizers take it, each group with its learning rate."""

    def draw_sheet(self, path: Path) -> None:
        """Write sample pictures, for a person to look at; or nothing."""

    def write_sample(self) -> bytes | None:
        """Write and draw a sample story: an HTML page; None where the stage teaches no writing."""

    def saved_parameters(self) -> list[nn.Parameter]:
        """All that `save` writes: workers that share out weights gather no others for it."""

    def save(self, folder: Path) -> None:
        """Write what later stages start from."""


class TeachesNoWriting:
    """For stages without a sample story."""

    def write_sample(self) -> bytes | None:
        return None


def build_stage(preset: Preset, sources: WeightSources, data: StageData) -> Stage:
    """The stage of a preset, on the weights that it starts from. Raises TrainingError where there are none."""
    new_stage = pkgutil.resolve_name(STAGES[preset.stage])
    return new_stage(preset, sources, data)
