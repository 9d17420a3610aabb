"""Stage "upscale": latents -> pictures twice as large as the VAE's own, painted by a second decoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minigpt5.engine.denoising import advance
from minigpt5.errors import TrainingError
from minigpt5.model import folder as model_folder
from minigpt5.model.base_models import resolve
from minigpt5.model.decoders.diffusion import Diffusion, normal_like
from minigpt5.model.decoders.upscaling import UpscalingDecoder, load_upscaling
from minigpt5.model.folder import DISTILLED_DRAW
from minigpt5.model.pixels import to_pixels, to_tensor
from minigpt5.model.text_encoder import load_text_encoder
from minigpt5.objective.precision import exactly
from minigpt5.objective.replay_buffer import ReplayBuffer
from minigpt5.storybook.scenes import draw_scene
from minigpt5.types import UPSCALING_FOLDER
from training.data.batches import Batch, StageData
from training.data.replay import is_replay, remember
from training.stage import TeachesNoWriting
from training.storybook.examples import WeightedScene
from training.storybook.feature_loss import FeatureLoss
from training.storybook.presets import UpscalePreset
from training.storybook.sharpen import REPLAY_BYTES, TargetBatch, begin_pictures, detail_loss, drawn_target
from training.storybook.sheets import save_captioned_sheet
from training.storybook.sprites import SPRITE_WEIGHT, error_weight, sprites_of
from training.storybook.vae import LATENT_NOISE, reconstruction_losses
from training.weight_sources import WeightSources

BACKGROUND_WEIGHT = 0.1
"""How much an error counts where a drawn picture's target is only enlarged."""


@dataclass(frozen=True, kw_only=True)
class UpscaledBatch(TargetBatch):
    """Latents, and what pictures should be made of them."""

    latents_BCYX: Tensor
    """On the denoiser's scale."""


class UpscaleObjective(nn.Module):
    """The second decoder alone, on latents of two kinds. Two thirds are of true scenes, whose targets are the scenes
    drawn larger; the others are what the default request draws, with targets in which the sprites that the VAE's own
    decoder shows are drawn again, and larger, as in "sharpen". The background of these is enlarged and counts little:
    what is crisp in it is learnt from the true scenes.
    """

    def __init__(
        self, diffusion: Diffusion, upscaling: UpscalingDecoder, text_encoder: nn.Module, preset: UpscalePreset
    ) -> None:
        super().__init__()
        self.diffusion, self.upscaling = diffusion.requires_grad_(False), upscaling
        self.text_encoder, self.preset = text_encoder, preset
        self._feature_loss = FeatureLoss()
        self._replay_buffer: ReplayBuffer[UpscaledBatch] = ReplayBuffer(max_bytes=REPLAY_BYTES)

    def forward(self, batch: Batch[WeightedScene], progress: float) -> dict[str, Tensor]:
        size, step, device = len(batch.examples), batch.step, self.diffusion.denoiser.device
        num_true = min(2 * (step + 1) * size // 3 - 2 * step * size // 3, size - 1)
        drawn = self._drawn(batch, num_true)
        target = UpscaledBatch.cat([self._true(batch.examples[:num_true]), drawn]) if num_true else drawn
        latents_BCYX = target.latents_BCYX.to(device)
        latents_BCYX = latents_BCYX + LATENT_NOISE * normal_like(latents_BCYX)
        decoded_BCYX = self.upscaling.decode(self.diffusion.denormalise(latents_BCYX)).sample.float()
        pixels_BCYX = to_tensor(target.pixels_BYXC.to(device))
        losses = reconstruction_losses(decoded_BCYX, pixels_BCYX, target.weight_B1YX.to(device))
        losses["detail"] = detail_loss(decoded_BCYX, pixels_BCYX, target.masks_BNYX.to(device))
        loss = losses["loss"] + self.preset.detail_weight * losses["detail"]
        if num_true:
            losses["features"] = self._feature_loss(decoded_BCYX[:num_true], pixels_BCYX[:num_true])
            loss = loss + self.preset.feature_weight * losses["features"]
        return {**losses, "loss": loss}

    def _drawn(self, batch: Batch[WeightedScene], first: int) -> UpscaledBatch:
        """Pictures of the batch from `first` on, or as many of those that are remembered."""
        if self.training and is_replay(batch, self.preset.replay, len(self._replay_buffer)):
            return UpscaledBatch.cat(self._replay_buffer.sample(len(batch.examples) - first))
        drawn = self._draw(batch.examples[first:])
        if self.training:
            remember(self._replay_buffer, drawn, self.preset.replay)
        return drawn

    @torch.no_grad()
    def _true(self, scenes: list[WeightedScene]) -> UpscaledBatch:
        scale, device = self.preset.scale, self.diffusion.denoiser.device
        sprites = [sprites_of(scene.scene, scale=scale) for scene in scenes]
        weights = [error_weight(of_scene, around=SPRITE_WEIGHT, scale=scale) for of_scene in sprites]
        masks = [np.stack([sprite.mask() for sprite in of_scene]) for of_scene in sprites]
        return UpscaledBatch(
            pixels_BYXC=torch.tensor(np.stack([draw_scene(scene.scene, scale=scale) for scene in scenes])),
            weight_B1YX=torch.tensor(np.stack(weights)),
            masks_BNYX=torch.tensor(np.stack(masks)),
            latents_BCYX=self.diffusion.to_latents(
                to_tensor(np.stack([scene.pixels for scene in scenes])).to(device)
            ).cpu(),
        )

    @torch.no_grad()
    def _draw(self, scenes: list[WeightedScene]) -> UpscaledBatch:
        """What the default request draws of each scene."""
        condition_BQD, null_1QD = self.text_encoder([scene.caption for scene in scenes]), self.text_encoder([""])
        pictures = begin_pictures(self.diffusion, condition_BQD)
        while pictures[0].num_calls_left:
            advance(self.diffusion, pictures, null_1QD)
        latents_BCYX = torch.cat([picture.latents_1CYX for picture in pictures])
        with exactly(latents_BCYX.device):  # levels that bfloat16 does not tell apart
            drawn = to_pixels(self.diffusion.to_pixels(latents_BCYX))
        targets = [
            drawn_target(pixels, scene.scene, scale=self.preset.scale)
            for pixels, scene in zip(drawn, scenes, strict=True)
        ]
        target = TargetBatch.cat(targets)
        return UpscaledBatch(
            pixels_BYXC=target.pixels_BYXC,
            weight_B1YX=target.weight_B1YX.masked_fill(target.weight_B1YX == 1, BACKGROUND_WEIGHT),
            masks_BNYX=target.masks_BNYX,
            latents_BCYX=latents_BCYX.float().cpu(),
        ).contiguous()


class UpscaleStage(TeachesNoWriting):
    def __init__(self, preset: UpscalePreset, sources: WeightSources, data: StageData) -> None:
        config = sources.config()
        self.diffusion = sources.diffusion(stage="upscale")
        known = sources.find(UPSCALING_FOLDER, stage="upscale")
        self.upscaling: Any = (
            load_upscaling(known / UPSCALING_FOLDER)
            if known
            else UpscalingDecoder.from_vae(self.diffusion.vae, scale=preset.scale)
        )
        if (scale := self.upscaling.config.scale) != preset.scale:
            raise TrainingError(f"scale is {preset.scale} but the decoder in {known} has {scale}: set scale={scale}")
        text_encoder = load_text_encoder(resolve(config.text_encoder), config)
        self.config, self.preset = config, preset
        self.objective = UpscaleObjective(self.diffusion, self.upscaling, text_encoder, preset)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.upscaling.parameters()), "lr": self.preset.optimizer.learning_rate}]

    def draw_sheet(self, path: Path) -> None:
        self.diffusion.upscaling = self.upscaling
        try:
            save_captioned_sheet(path, self.diffusion, self.objective.text_encoder, self.config, DISTILLED_DRAW)
        finally:
            self.diffusion.upscaling = None

    def saved_parameters(self) -> list[nn.Parameter]:
        return [*self.diffusion.parameters(), *self.upscaling.parameters()]

    def save(self, folder: Path) -> None:
        """Write the decoder that the stage started from, with the second decoder beside its VAE."""
        model_folder.save_diffusion(self.diffusion, folder)
        model_folder.save_part(self.upscaling, folder / UPSCALING_FOLDER)
