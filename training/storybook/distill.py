"""Stage "distill": the guided UNet -> one that draws as it does in NUM_LEVELS unguided steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt5.config import storybook
from minigpt5.engine.denoising import guide
from minigpt5.model import folder as model_folder
from minigpt5.model.base_models import resolve
from minigpt5.model.diffusion import Diffusion, normal_like
from minigpt5.model.folder import DISTILLED_DRAW
from minigpt5.model.multistep_scheduler import NUM_LEVELS
from minigpt5.model.pixels import to_tensor
from minigpt5.model.text_encoder import load_text_encoder
from training.data.batches import Batch, ExampleSource
from training.data.replay_buffer import ReplayBuffer, is_replay
from training.presets import DistillPreset
from training.storybook.examples import CaptionedScene
from training.storybook.sheets import save_captioned_sheet
from training.weight_sources import WeightSources, prepare_unet

REPLAY_CAPACITY = 8192
"""Steps of the teacher, which cost more than learning from them does; half a gigabyte."""


class DistillObjective(nn.Module):
    """Progressive distillation (arXiv 2202.00512) of guidance and steps at once: from noised latents, at one of the
    timesteps that the distilled UNet draws at, its step ends where `DistillPreset.teacher_steps` guided steps of the
    UNet do."""

    def __init__(self, diffusion: Diffusion, text_encoder: nn.Module, preset: DistillPreset) -> None:
        super().__init__()
        self.diffusion, self.text_encoder, self.preset = diffusion, text_encoder, preset
        diffusion.requires_grad_(False)
        assert diffusion.distilled is not None
        self.student = diffusion.distilled.requires_grad_(True)
        self.config = storybook()
        scheduler = diffusion.noise_schedule
        scheduler.set_timesteps(NUM_LEVELS * preset.teacher_steps)
        self.timesteps = torch.cat([scheduler.timesteps, torch.tensor([-1])])
        """The teacher's timesteps, and -1 for latents without noise."""
        self._replay_buffer = ReplayBuffer(maxlen=REPLAY_CAPACITY)

    def forward(self, batch: Batch[CaptionedScene], progress: float) -> dict[str, Tensor]:
        if self.training and is_replay(batch, self.preset.replay, len(self._replay_buffer)):
            samples = self._replay_buffer.sample(len(batch.examples))
        else:
            samples = self._ask_teacher(batch)
            if self.training:
                self._replay_buffer.extend(samples)
        begin_BCYX, timesteps_B, condition_BQD, target_BCYX = (torch.stack(part) for part in zip(*samples, strict=True))
        predicted_BCYX = self.student(begin_BCYX, timesteps_B, encoder_hidden_states=condition_BQD).sample
        return {"loss": F.mse_loss(predicted_BCYX.float(), target_BCYX.float())}

    @torch.no_grad()
    def _ask_teacher(self, batch: Batch[CaptionedScene]) -> list[tuple[Tensor, ...]]:
        """For each of the batch's pictures, where a step begins: latents, timestep, condition; and the prediction with
        which it ends where the teacher's steps do."""
        diffusion = self.diffusion
        clean_BCYX = diffusion.to_latents(
            to_tensor(np.stack([scene.pixels for scene in batch.examples])).to(diffusion.unet.device)
        )
        condition_BQD = self.text_encoder([scene.caption for scene in batch.examples])
        first_B = torch.randint(NUM_LEVELS, (len(clean_BCYX),)) * self.preset.teacher_steps
        timesteps_B = self.timesteps[first_B].to(clean_BCYX.device)
        begin_BCYX = diffusion.noise_schedule.add_noise(clean_BCYX, normal_like(clean_BCYX), timesteps_B)
        end_BCYX = self._teach(begin_BCYX, condition_BQD, first_B)
        target_BCYX = self._velocity(begin_BCYX, end_BCYX, first_B)
        return list(zip(begin_BCYX, timesteps_B, condition_BQD, target_BCYX, strict=True))

    def _teach(self, latents_BCYX: Tensor, condition_BQD: Tensor, first_B: Tensor) -> Tensor:
        """The teacher's way over one step of the student."""
        null_BQD = self.text_encoder([""]).expand_as(condition_BQD)
        for number in range(self.preset.teacher_steps):
            timesteps = self.timesteps[first_B + number].to(latents_BCYX.device)
            predicted = self.diffusion.unet(
                torch.cat([latents_BCYX] * 2),
                torch.cat([timesteps] * 2),
                encoder_hidden_states=torch.cat([condition_BQD, null_BQD]),
            ).sample.float()
            conditional, unconditional = predicted.chunk(2)
            velocity_BCYX = guide(
                conditional, unconditional, scale=self.config.draw.guidance_scale, rescale=self.config.guidance_rescale
            )
            signal, noise = self._levels(first_B + number)
            next_signal, next_noise = self._levels(first_B + number + 1)
            clean_BCYX = signal * latents_BCYX - noise * velocity_BCYX
            noise_BCYX = noise * latents_BCYX + signal * velocity_BCYX
            latents_BCYX = next_signal * clean_BCYX + next_noise * noise_BCYX
        return latents_BCYX

    def _velocity(self, begin_BCYX: Tensor, end_BCYX: Tensor, first_B: Tensor) -> Tensor:
        """The prediction with which one step leads from `begin` to `end`."""
        signal, noise = self._levels(first_B)
        end_signal, end_noise = self._levels(first_B + self.preset.teacher_steps)
        stays = end_signal * signal + end_noise * noise
        return (end_BCYX - stays * begin_BCYX) / (end_noise * signal - end_signal * noise)

    def _levels(self, numbers_B: Tensor) -> tuple[Tensor, Tensor]:
        """What is left of the signal, and the noise, at the teacher's timesteps of these numbers: (B, 1, 1, 1) each."""
        alphas = torch.cat(
            [self.diffusion.noise_schedule.alphas_cumprod.cpu(), torch.ones(1)]
        )  # the last is timestep -1
        alpha_bar_B111 = alphas[self.timesteps[numbers_B]].view(-1, 1, 1, 1).to(self.diffusion.unet.device)
        return alpha_bar_B111.sqrt(), (1 - alpha_bar_B111).sqrt()


class DistillStage:
    def __init__(self, preset: DistillPreset, sources: WeightSources, examples: ExampleSource) -> None:
        config = storybook()
        self.diffusion = sources.diffusion(stage="distill", is_distilled=False)
        if self.diffusion.distilled is None:
            self.diffusion.distilled = copy.deepcopy(self.diffusion.unet)
        prepare_unet(self.diffusion.distilled, preset)
        text_encoder = load_text_encoder(resolve(config.text_encoder), config)
        self.preset = preset
        self.objective = DistillObjective(self.diffusion, text_encoder, preset)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.objective.student.parameters()), "lr": self.preset.optimizer.learning_rate}]

    def draw_sheet(self, path: Path) -> None:
        save_captioned_sheet(path, self.diffusion, self.objective.text_encoder, DISTILLED_DRAW)

    def save(self, folder: Path) -> None:
        model_folder.save_diffusion(self.diffusion, folder)
