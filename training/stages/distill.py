"""Stage "distill": the guided denoiser -> one that draws as it does in NUM_LEVELS unguided steps.

It takes any Stable Diffusion, 1.x, 2.x or XL, and captions with their pictures.

Shape letters: B pictures, C latent channels, Y X latent rows and columns, Q condition positions, D condition width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minigpt5.config import storybook
from minigpt5.engine.denoising import denoise, guide
from minigpt5.errors import TrainingError
from minigpt5.model import folder as model_folder
from minigpt5.model.base_models import resolve
from minigpt5.model.decoders.diffusion import Diffusion, normal_like
from minigpt5.model.decoders.multistep_scheduler import NUM_LEVELS
from minigpt5.model.decoders.noise import VariancePreserving
from minigpt5.model.folder import DISTILLED_DRAW
from minigpt5.model.folder_config import load_config
from minigpt5.model.locate import find_part
from minigpt5.model.pixels import to_tensor
from minigpt5.model.text_encoder import load_text_encoder
from minigpt5.objective.example import Example
from minigpt5.objective.replay_buffer import ReplayBuffer, TensorBatch
from minigpt5.types import DrawSettings
from training.data.batches import Batch, StageData
from training.data.replay import is_replay, remember
from training.devices import autocast
from training.presets import DistillPreset
from training.samples import save_sheet
from training.stage import TeachesNoWriting
from training.stages.model import NUM_SHEET_PICTURES, FoundDecoder, find_decoder, halve_frozen
from training.weight_sources import WeightSources, prepare_unet

REPLAY_BYTES = 2**29
"""Bytes of the teacher's samples, which cost more to make than to learn from."""


@dataclass(frozen=True, kw_only=True)
class TeacherSteps(TensorBatch):
    """Where the student begins, and what it is to predict there."""

    begin_BCYX: Tensor
    timesteps_B: Tensor
    condition_BQD: Tensor
    target_BCYX: Tensor


class DistillObjective(nn.Module):
    """Progressive distillation (arXiv 2202.00512) of guidance and step count at once. The student learns one step that
    ends where `teacher_steps` guided DDIM steps of the teacher end. It starts from noised latents at one of its own
    timesteps, and predicts what the teacher predicts: noise or velocity.

    The loss is the squared error of the velocity in both cases, the paper's "SNR+1" weight. The error of the noise
    hardly counts the step of most noise, which decides the layout.
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
        assert isinstance(diffusion.noise, VariancePreserving)
        self.noise = diffusion.noise
        self.diffusion, self.text_encoder, self.preset = diffusion, text_encoder, preset
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        diffusion.requires_grad_(False)
        assert diffusion.distilled is not None
        self.student = diffusion.distilled.requires_grad_(True)
        # Every teacher_steps-th timestep is one that MultistepScheduler draws at.
        sampler = self.noise.new_sampler("ddim", timestep_spacing="trailing")
        sampler.set_timesteps(NUM_LEVELS * preset.teacher_steps)
        self.timesteps = torch.cat([sampler.timesteps, torch.tensor([-1])])
        """The teacher's timesteps, and -1 for latents without noise."""
        self._replay_buffer: ReplayBuffer[TeacherSteps] = ReplayBuffer(max_bytes=REPLAY_BYTES)

    def forward(self, batch: Batch[Example], progress: float) -> dict[str, Tensor]:
        if self.training and is_replay(batch, self.preset.replay, len(self._replay_buffer)):
            taught = TeacherSteps.cat(self._replay_buffer.sample(len(batch.examples)))
        else:
            taught = self._ask_teacher(batch)
            if self.training:
                remember(self._replay_buffer, taught, self.preset.replay)
        predicted_BCYX = self.diffusion.predict(
            self.student, taught.begin_BCYX, taught.timesteps_B, taught.condition_BQD
        )
        error_B = (predicted_BCYX.float() - taught.target_BCYX.float()).square().mean((1, 2, 3))
        if not self.noise.is_velocity:
            error_B = error_B / self._signal_and_noise(taught.timesteps_B)[0].square().flatten()
        return {"loss": error_B.mean()}

    @torch.no_grad()
    def to_latents(self, examples: list[Example]) -> Tensor:
        """The latents of each example's first picture, or of its stored moments: (B, C, Y, X)."""
        drawn = torch.from_numpy(np.stack([example.drawn[0] for example in examples]))
        drawn = drawn.to(self.diffusion.denoiser.device)
        moments_BMYX = self.diffusion.to_moments(to_tensor(drawn)) if drawn.dtype == torch.uint8 else drawn
        return self.diffusion.from_moments(moments_BMYX)

    @torch.no_grad()
    def _ask_teacher(self, batch: Batch[Example]) -> TeacherSteps:
        """One sample for each picture, at a timestep of its own."""
        clean_BCYX = self.to_latents(batch.examples)
        condition_BQD = self.text_encoder([example.captions[0] for example in batch.examples])
        index_B = torch.randint(NUM_LEVELS, (len(clean_BCYX),)) * self.preset.teacher_steps
        timesteps_B = self.timesteps[index_B].to(clean_BCYX.device)
        begin_BCYX = self.noise.add_noise(clean_BCYX, normal_like(clean_BCYX), timesteps_B)
        end_BCYX = self.run_teacher(begin_BCYX, condition_BQD, index_B)
        target_BCYX = self.target(begin_BCYX, end_BCYX, index_B)
        return TeacherSteps(
            begin_BCYX=begin_BCYX, timesteps_B=timesteps_B, condition_BQD=condition_BQD, target_BCYX=target_BCYX
        ).contiguous()

    @torch.no_grad()
    def run_teacher(self, latents_BCYX: Tensor, condition_BQD: Tensor, index_B: Tensor) -> Tensor:
        """Run the guided teacher for `teacher_steps` DDIM steps from `latents_BCYX`. `index_B`: where in
        `self.timesteps` they are."""
        for number in range(self.preset.teacher_steps):
            timesteps_B = self.timesteps[index_B + number]
            predicted_BCYX = self._predict_guided(latents_BCYX, timesteps_B.to(latents_BCYX.device), condition_BQD)
            signal_B111, noise_B111 = self._signal_and_noise(timesteps_B)
            next_signal_B111, next_noise_B111 = self._signal_and_noise(self.timesteps[index_B + number + 1])
            if self.noise.is_velocity:
                clean_BCYX = signal_B111 * latents_BCYX - noise_B111 * predicted_BCYX
                noise_BCYX = noise_B111 * latents_BCYX + signal_B111 * predicted_BCYX
            else:
                clean_BCYX = (latents_BCYX - noise_B111 * predicted_BCYX) / signal_B111
                noise_BCYX = predicted_BCYX
            latents_BCYX = next_signal_B111 * clean_BCYX + next_noise_B111 * noise_BCYX
        return latents_BCYX

    def _predict_guided(self, latents_BCYX: Tensor, timesteps_B: Tensor, condition_BQD: Tensor) -> Tensor:
        """Call the teacher with and, where it is guided, without the condition."""
        predict, teacher = self.diffusion.predict, self.diffusion.denoiser
        if self.guidance_scale <= 1:
            return predict(teacher, latents_BCYX, timesteps_B, condition_BQD).float()
        null_BQD = self.text_encoder([""]).expand_as(condition_BQD)
        both = predict(
            teacher,
            torch.cat([latents_BCYX] * 2),
            torch.cat([timesteps_B] * 2),
            torch.cat([condition_BQD, null_BQD]),
        )
        conditional_BCYX, unconditional_BCYX = both.float().chunk(2)
        return guide(conditional_BCYX, unconditional_BCYX, scale=self.guidance_scale, rescale=self.guidance_rescale)

    def target(self, begin_BCYX: Tensor, end_BCYX: Tensor, index_B: Tensor) -> Tensor:
        """Compute the prediction with which one step leads from `begin_BCYX` to `end_BCYX` (arXiv 2202.00512,
        appendix G). `index_B`: as in `run_teacher`."""
        timesteps_B = self.timesteps[index_B]
        signal_B111, noise_B111 = self._signal_and_noise(timesteps_B)
        end_signal_B111, end_noise_B111 = self._signal_and_noise(self.timesteps[index_B + self.preset.teacher_steps])
        share_B111 = end_noise_B111 / noise_B111
        clean_BCYX = (end_BCYX - share_B111 * begin_BCYX) / (end_signal_B111 - share_B111 * signal_B111)
        noise_BCYX = (begin_BCYX - signal_B111 * clean_BCYX) / noise_B111
        return self.noise.target(clean_BCYX, noise_BCYX, timesteps_B.to(begin_BCYX.device))

    def _signal_and_noise(self, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(alpha_bar) and sqrt(1 - alpha_bar) at timesteps: (B, 1, 1, 1) each."""
        # The last entry of alpha_bar is that of timestep -1.
        alpha_bar = torch.cat([self.noise.schedule.alphas_cumprod.cpu(), torch.ones(1)])
        alpha_bar_B111 = alpha_bar[timesteps_B.cpu()].view(-1, 1, 1, 1).to(self.diffusion.denoiser.device)
        return alpha_bar_B111.sqrt(), (1 - alpha_bar_B111).sqrt()


class DistillStage(TeachesNoWriting):
    """See this file's first line. With a start it writes a model folder, without one the picture world's decoder."""

    def __init__(self, preset: DistillPreset, sources: WeightSources, data: StageData) -> None:
        """Load the decoder of the model folder that the stage starts from, and nothing else of it. Raises
        TrainingError."""
        torch.manual_seed(preset.seed)
        self.preset, self.data = preset, data
        self.start: Path | None = None
        if sources.start:
            self.start = sources.need_model("distill")
            self.config = load_config(self.start)
            self._decoder = find_decoder(self.start, self.config, sources)
            self.diffusion = load_teacher(self._decoder)
            text_of = find_part(self.start, self.config, self.config.text_encoder)
        else:
            self.config = storybook()
            self.diffusion = sources.diffusion(stage="distill", is_distilled=False)
            text_of = resolve(self.config.text_encoder)
        if self.diffusion.distilled is None:
            self.diffusion.distilled = copy.deepcopy(self.diffusion.denoiser)
        prepare_unet(self.diffusion.distilled, preset)
        if preset.checkpoint_activations:
            self.diffusion.distilled.enable_gradient_checkpointing()
        self.objective = DistillObjective(
            self.diffusion,
            load_text_encoder(text_of, self.config),
            preset,
            guidance_scale=self.config.draw.guidance_scale,
            guidance_rescale=self.config.guidance_rescale,
        )
        if preset.halves_frozen and self.start:  # without a start, `save` writes the frozen parts too
            halve_frozen(self.objective)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.objective.student.parameters()), "lr": self.preset.optimizer.learning_rate}]

    @torch.no_grad()
    def draw_sheet(self, path: Path) -> None:
        """Held-out pictures, above what the teacher draws of their captions, and what the student draws."""
        objective, source = self.objective, self.data.samples
        examples = [source.example_at(position)[1] for position in range(NUM_SHEET_PICTURES)]
        teacher_draw = DrawSettings(
            steps=NUM_LEVELS * self.preset.teacher_steps,
            guidance_scale=max(1.0, self.config.draw.guidance_scale),
            scheduler="ddim",
        )
        with autocast(self.preset, self.diffusion.denoiser.device):
            condition_BQD = objective.text_encoder([example.captions[0] for example in examples]).float()
            null_1QD = objective.text_encoder([""]).float()
            rows = [self.diffusion.to_pixels(objective.to_latents(examples)).float()]
            rows += [
                denoise(
                    self.diffusion,
                    condition_BQD,
                    null_1QD,
                    seeds=list(range(len(examples))),
                    draw=draw,
                    guidance_rescale=self.config.guidance_rescale,
                )
                for draw in (teacher_draw, DISTILLED_DRAW)
            ]
        save_sheet(path, rows)

    def saved_parameters(self) -> list[nn.Parameter]:
        return list((self.diffusion.distilled if self.start else self.diffusion).parameters())

    def save(self, folder: Path) -> None:
        if self.start is None:
            model_folder.save_diffusion(self.diffusion, folder)
            return
        model_folder.save_distilled(
            folder,
            self.config,
            start=self.start,
            distilled=self.diffusion.distilled,
            decoder=self._decoder.parts if self._decoder.is_own else None,
        )


def load_teacher(found: FoundDecoder) -> Diffusion:
    """The decoder with its distilled denoiser, where there is one. Raises TrainingError for a family that cannot be
    distilled, before any weights are read."""
    denoiser_of = found.parts[found.family.DENOISER]
    noise = found.family.load_noise(denoiser_of)
    if not isinstance(noise, VariancePreserving):
        raise TrainingError(
            f"{denoiser_of} is a {found.family.__name__}, whose noise is a {type(noise).__name__}: distill takes "
            "Stable Diffusion 1.x, 2.x and XL; for another family name a base of few steps in python -m minigpt5.new"
        )
    return found.load()
