"""Stage "distill": the guided UNet -> one that draws as it does in NUM_LEVELS unguided steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt5.engine.denoising import guide
from minigpt5.model import folder as model_folder
from minigpt5.model.base_models import resolve
from minigpt5.model.decoders.diffusion import Diffusion, normal_like
from minigpt5.model.decoders.multistep_scheduler import NUM_LEVELS
from minigpt5.model.folder import DISTILLED_DRAW
from minigpt5.model.pixels import to_tensor
from minigpt5.model.text_encoder import load_text_encoder
from training.data.batches import Batch, StageData
from training.data.replay_buffer import ReplayBuffer, is_replay
from training.storybook.examples import CaptionedScene
from training.storybook.presets import DistillPreset
from training.storybook.sheets import save_captioned_sheet
from training.weight_sources import WeightSources, prepare_unet

REPLAY_CAPACITY = 8192
"""Samples of the teacher, which cost more to make than to learn from; half a gigabyte."""


class DistillObjective(nn.Module):
    """Progressive distillation (arXiv 2202.00512) of guidance and step count at once. The student learns one step that
    ends where `teacher_steps` guided steps of the UNet end. It starts from noised latents at one of its own timesteps.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        text_encoder: nn.Module,
        preset: DistillPreset,
        *,
        guidance_scale: float,
        guidance_rescale: float,
    ) -> None:
        """`guidance_scale`, `guidance_rescale`: the teacher's, as `guide` takes them."""
        super().__init__()
        self.diffusion, self.text_encoder, self.preset = diffusion, text_encoder, preset
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        diffusion.requires_grad_(False)
        assert diffusion.distilled is not None
        self.student = diffusion.distilled.requires_grad_(True)
        # Trailing spacing: every teacher_steps-th timestep is one that MultistepScheduler draws at.
        sampler = diffusion.noise.new_sampler("ddim")
        sampler.set_timesteps(NUM_LEVELS * preset.teacher_steps)
        self.timesteps = torch.cat([sampler.timesteps, torch.tensor([-1])])
        """The teacher's timesteps, and -1 for latents without noise."""
        self._replay_buffer = ReplayBuffer(maxlen=REPLAY_CAPACITY)

    def forward(self, batch: Batch[CaptionedScene], progress: float) -> dict[str, Tensor]:
        if self.training and is_replay(batch, self.preset.replay, len(self._replay_buffer)):
            samples = self._replay_buffer.sample(len(batch.examples))
        else:
            samples = self._new_samples(batch)
            if self.training:
                self._replay_buffer.extend(samples)
        begin_BCYX, timesteps_B, condition_BQD, target_BCYX = (torch.stack(part) for part in zip(*samples, strict=True))
        predicted_BCYX = self.student(begin_BCYX, timesteps_B, encoder_hidden_states=condition_BQD).sample
        return {"loss": F.mse_loss(predicted_BCYX.float(), target_BCYX.float())}

    @torch.no_grad()
    def _new_samples(self, batch: Batch[CaptionedScene]) -> list[tuple[Tensor, ...]]:
        """Make one training sample a picture: noisy latents, timestep, condition, target velocity."""
        diffusion = self.diffusion
        clean_BCYX = diffusion.to_latents(
            to_tensor(np.stack([scene.pixels for scene in batch.examples])).to(diffusion.denoiser.device)
        )
        condition_BQD = self.text_encoder([scene.caption for scene in batch.examples])
        index_B = torch.randint(NUM_LEVELS, (len(clean_BCYX),)) * self.preset.teacher_steps
        timesteps_B = self.timesteps[index_B].to(clean_BCYX.device)
        begin_BCYX = diffusion.noise_schedule.add_noise(clean_BCYX, normal_like(clean_BCYX), timesteps_B)
        end_BCYX = self._run_teacher(begin_BCYX, condition_BQD, index_B)
        target_BCYX = self._velocity(begin_BCYX, end_BCYX, index_B)
        return list(zip(begin_BCYX, timesteps_B, condition_BQD, target_BCYX, strict=True))

    def _run_teacher(self, latents_BCYX: Tensor, condition_BQD: Tensor, index_B: Tensor) -> Tensor:
        """Run the guided teacher for `teacher_steps` DDIM steps from `latents_BCYX`. `index_B`: where in
        `self.timesteps` they are."""
        null_BQD = self.text_encoder([""]).expand_as(condition_BQD)
        for number in range(self.preset.teacher_steps):
            timesteps_B = self.timesteps[index_B + number].to(latents_BCYX.device)
            predicted = self.diffusion.denoiser(
                torch.cat([latents_BCYX] * 2),
                torch.cat([timesteps_B] * 2),
                encoder_hidden_states=torch.cat([condition_BQD, null_BQD]),
            ).sample.float()
            conditional_BCYX, unconditional_BCYX = predicted.chunk(2)
            velocity_BCYX = guide(
                conditional_BCYX, unconditional_BCYX, scale=self.guidance_scale, rescale=self.guidance_rescale
            )
            signal_B111, noise_B111 = self._signal_and_noise(index_B + number)
            next_signal_B111, next_noise_B111 = self._signal_and_noise(index_B + number + 1)
            clean_BCYX = signal_B111 * latents_BCYX - noise_B111 * velocity_BCYX
            noise_BCYX = noise_B111 * latents_BCYX + signal_B111 * velocity_BCYX
            latents_BCYX = next_signal_B111 * clean_BCYX + next_noise_B111 * noise_BCYX
        return latents_BCYX

    def _velocity(self, begin_BCYX: Tensor, end_BCYX: Tensor, index_B: Tensor) -> Tensor:
        """Compute the prediction with which one step leads from `begin_BCYX` to `end_BCYX`."""
        signal_B111, noise_B111 = self._signal_and_noise(index_B)
        end_signal_B111, end_noise_B111 = self._signal_and_noise(index_B + self.preset.teacher_steps)
        begin_weight_B111 = end_signal_B111 * signal_B111 + end_noise_B111 * noise_B111
        return (end_BCYX - begin_weight_B111 * begin_BCYX) / (
            end_noise_B111 * signal_B111 - end_signal_B111 * noise_B111
        )

    def _signal_and_noise(self, index_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(alpha_bar) and sqrt(1 - alpha_bar) at indices into `self.timesteps`: (B, 1, 1, 1) each."""
        # The last entry of alpha_bar is that of timestep -1.
        alpha_bar = torch.cat([self.diffusion.noise_schedule.alphas_cumprod.cpu(), torch.ones(1)])
        alpha_bar_B111 = alpha_bar[self.timesteps[index_B]].view(-1, 1, 1, 1).to(self.diffusion.denoiser.device)
        return alpha_bar_B111.sqrt(), (1 - alpha_bar_B111).sqrt()


class DistillStage:
    def __init__(self, preset: DistillPreset, sources: WeightSources, data: StageData) -> None:
        config = sources.config()
        self.diffusion = sources.diffusion(stage="distill", is_distilled=False)
        if self.diffusion.distilled is None:
            self.diffusion.distilled = copy.deepcopy(self.diffusion.denoiser)
        prepare_unet(self.diffusion.distilled, preset)
        text_encoder = load_text_encoder(resolve(config.text_encoder), config)
        self.config, self.preset = config, preset
        self.objective = DistillObjective(
            self.diffusion,
            text_encoder,
            preset,
            guidance_scale=config.draw.guidance_scale,
            guidance_rescale=config.guidance_rescale,
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.objective.student.parameters()), "lr": self.preset.optimizer.learning_rate}]

    def draw_sheet(self, path: Path) -> None:
        save_captioned_sheet(path, self.diffusion, self.objective.text_encoder, self.config, DISTILLED_DRAW)

    def save(self, folder: Path) -> None:
        model_folder.save_diffusion(self.diffusion, folder)
