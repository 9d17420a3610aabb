"""What stage "unet" learns first, and what after it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.helpers.tiny import tiny_config, tiny_diffusion
from training.data.batches import batch_at
from training.presets import STORYBOOK
from training.storybook.examples import StorybookExamples
from training.storybook.unet import UnetObjective


def test_it_learns_where_things_stand_first(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = dataclasses.replace(STORYBOOK["unet"], placement_until=0.5, first_timestep=600, canonical_share=0.5)
    diffusion = tiny_diffusion(tiny_config())
    read: list[set[str]] = []
    firsts: list[int] = []

    def encode(captions: list[str]) -> torch.Tensor:
        read.append(set(captions) - {""})
        return torch.zeros(len(captions), 1, 1)

    def training_loss(latents: torch.Tensor, condition: torch.Tensor, *, first_timestep: int) -> torch.Tensor:
        assert len(latents) == len(condition)
        firsts.append(first_timestep)
        return torch.zeros(())

    monkeypatch.setattr(diffusion, "training_loss", training_loss)
    objective = UnetObjective(diffusion, encode, preset)  # type: ignore[arg-type]
    batch = batch_at(StorybookExamples(preset), 0, 16)
    for progress in (0.0, 0.49, 0.5, 1.0):
        objective(batch, progress)
    assert firsts == [600, 600, 0, 0]
    canonical, mixed = {one.canonical for one in batch.examples}, {one.caption for one in batch.examples}
    assert read[0] <= canonical and read[1] <= canonical
    assert read[2] <= mixed and read[2] - canonical, "no other phrasing came after it"
