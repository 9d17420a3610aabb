"""Stage "sharpen": pictures as the default request draws them -> the same ones, crisp."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt5.engine.denoising import Denoising, advance
from minigpt5.model import folder as model_folder
from minigpt5.model.base_models import resolve
from minigpt5.model.decoders.diffusion import Diffusion, normal_like
from minigpt5.model.decoders.multistep_scheduler import last_level
from minigpt5.model.decoders.noise import predict_x0
from minigpt5.model.decoders.stable_diffusion import StableDiffusion
from minigpt5.model.folder import DISTILLED_DRAW
from minigpt5.model.pixels import to_pixels, to_tensor
from minigpt5.model.text_encoder import load_text_encoder
from minigpt5.objective.precision import exactly
from minigpt5.objective.replay_buffer import ReplayBuffer, TensorBatch
from minigpt5.storybook.scenes import Scene
from minigpt5.types import DISTILLED
from training.data.batches import Batch, StageData
from training.data.replay import is_replay, remember
from training.stage import TeachesNoWriting
from training.storybook.examples import WeightedScene
from training.storybook.presets import SharpenPreset
from training.storybook.sheets import save_captioned_sheet
from training.storybook.sprites import SPRITE_WEIGHT, cleared, enlarged, error_weight, find_sprites, redrawn
from training.storybook.vae import LATENT_NOISE, reconstruction_losses
from training.weight_sources import WeightSources, prepare_unet

REPLAY_BYTES = 450_000_000
"""Bytes of pictures, some 2,000, which cost nearly as much to draw as to learn from."""
MIN_ENERGY = 4e-3
"""Below it a region counts as flat: it has no correlation with anything."""


@dataclass(frozen=True, kw_only=True)
class TargetBatch(TensorBatch):
    """What pictures should be."""

    pixels_BYXC: Tensor
    """uint8."""
    weight_B1YX: Tensor
    """How much an error counts."""
    masks_BNYX: Tensor
    """Where each of the two sprites is."""


@dataclass(frozen=True, kw_only=True)
class DrawnBatch(TargetBatch):
    """Pictures as the default request draws them, with their targets."""

    noise_BCYX: Tensor
    """What they began as."""
    composed_BCYX: Tensor
    """What the first call made of it."""
    noisy_BCYX: Tensor
    """The latents before the last call."""
    condition_BQD: Tensor


class SharpenObjective(nn.Module):
    """The last call of the distilled UNet and the VAE decoder, trained together on their own pictures, through pixels
    (as in DRaFT-1, arXiv 2309.17400, but with a target instead of a reward).

    Trained on true scenes, both would blur what they doubt: where a sprite stands, and how large. Here they have
    decided that themselves. The weights from before this stage draw a picture; the stage finds the sprites in it and
    draws them again at their place. That is the target. A third of the pictures are true scenes from their own latents,
    for the VAE decoder alone. The first call, which decides the layout, is held to what it was.
    """

    def __init__(self, diffusion: Diffusion, text_encoder: nn.Module, preset: SharpenPreset) -> None:
        super().__init__()
        self.diffusion, self.text_encoder, self.preset = diffusion, text_encoder, preset
        diffusion.requires_grad_(False)
        self.before = StableDiffusion(
            copy.deepcopy(diffusion.vae), diffusion.denoiser, diffusion.noise, copy.deepcopy(diffusion.distilled)
        )
        for part in (diffusion.denoiser_for(DISTILLED), diffusion.vae.post_quant_conv, diffusion.vae.decoder):
            part.requires_grad_(True)
        self._replay_buffer: ReplayBuffer[DrawnBatch] = ReplayBuffer(max_bytes=REPLAY_BYTES)

    def forward(self, batch: Batch[WeightedScene], progress: float) -> dict[str, Tensor]:
        diffusion, device = self.diffusion, self.diffusion.denoiser.device
        size, step = len(batch.examples), batch.step
        num_true = min((step + 1) * size // 3 - step * size // 3, size - 1)
        drawn = self._drawn(batch, num_true)
        target = TargetBatch.cat([_true_target(batch.examples)[:num_true], drawn])
        pixels_BCYX, masks_BNYX = to_tensor(target.pixels_BYXC.to(device)), target.masks_BNYX.to(device)
        noisy_BCYX, condition_BQD = drawn.noisy_BCYX, drawn.condition_BQD

        num_composed = math.ceil(len(drawn) / 4)
        first, last = diffusion.noise_schedule.config.num_train_timesteps - 1, last_level(diffusion.noise_schedule)
        timesteps_B = torch.tensor([last] * len(noisy_BCYX) + [first] * num_composed, device=device)
        began_BCYX = torch.cat([noisy_BCYX, drawn.noise_BCYX[:num_composed]])
        predicted_BCYX = diffusion.denoiser_for(DISTILLED)(
            began_BCYX, timesteps_B, encoder_hidden_states=torch.cat([condition_BQD, condition_BQD[:num_composed]])
        ).sample
        clean_BCYX = predict_x0(diffusion.noise_schedule, began_BCYX, predicted_BCYX.float(), timesteps_B)
        painted_BCYX, again_BCYX = clean_BCYX.split([len(noisy_BCYX), num_composed])

        with torch.no_grad():
            exact_BCYX = diffusion.to_latents(pixels_BCYX[:num_true])
        exact_BCYX = exact_BCYX + LATENT_NOISE * normal_like(exact_BCYX)
        decoded_BCYX = diffusion.to_raw_pixels(torch.cat([exact_BCYX, painted_BCYX])).float()
        losses = reconstruction_losses(decoded_BCYX, pixels_BCYX, target.weight_B1YX.to(device))
        losses["detail"] = detail_loss(decoded_BCYX, pixels_BCYX, masks_BNYX)
        losses["composition"] = F.mse_loss(again_BCYX, drawn.composed_BCYX[:num_composed])
        loss = losses["loss"] + self.preset.detail_weight * losses["detail"] + losses["composition"]
        return {**losses, "loss": loss}

    def _drawn(self, batch: Batch[WeightedScene], first: int) -> DrawnBatch:
        """Pictures of the batch from `first` on, or as many of those that are remembered."""
        if self.training and is_replay(batch, self.preset.replay, len(self._replay_buffer)):
            return DrawnBatch.cat(self._replay_buffer.sample(len(batch.examples) - first))
        drawn = self._draw(batch.examples[first:])
        if self.training:
            remember(self._replay_buffer, drawn, self.preset.replay)
        return drawn

    @torch.no_grad()
    def _draw(self, scenes: list[WeightedScene]) -> DrawnBatch:
        """A picture of each scene. The weights from before this stage make the first and the last call, the present
        ones the calls between."""
        condition_BQD, null_1QD = self.text_encoder([scene.caption for scene in scenes]), self.text_encoder([""])
        pictures = begin_pictures(self.diffusion, condition_BQD)
        noise_BCYX = torch.cat([picture.latents_1CYX for picture in pictures])
        advance(self.before, pictures, null_1QD)
        composed_BCYX = torch.cat([picture.pred_x0_1CYX for picture in pictures])
        while pictures[0].num_calls_left > 1:
            advance(self.diffusion, pictures, null_1QD)
        noisy_BCYX = torch.cat([picture.latents_1CYX for picture in pictures])
        advance(self.before, pictures, null_1QD)
        with exactly(noise_BCYX.device):  # levels that bfloat16 does not tell apart
            drawn = to_pixels(self.before.to_pixels(torch.cat([picture.pred_x0_1CYX for picture in pictures])))
        targets = [drawn_target(pixels, scene.scene) for pixels, scene in zip(drawn, scenes, strict=True)]
        target = TargetBatch.cat(targets)
        return DrawnBatch(
            pixels_BYXC=target.pixels_BYXC,
            weight_B1YX=target.weight_B1YX,
            masks_BNYX=target.masks_BNYX,
            noise_BCYX=noise_BCYX,
            composed_BCYX=composed_BCYX,
            noisy_BCYX=noisy_BCYX,
            condition_BQD=condition_BQD,
        ).contiguous()


def begin_pictures(diffusion: Diffusion, condition_BQD: Tensor) -> list[Denoising]:
    """A picture of each condition by the default request, from noise of any seed."""
    seeds = torch.randint(2**31, (len(condition_BQD),)).tolist()
    return [
        Denoising(diffusion, condition_QD, seed=seed, draw=DISTILLED_DRAW, guidance_rescale=0.0)
        for condition_QD, seed in zip(condition_BQD, seeds, strict=True)
    ]


def detail_loss(decoded_BCYX: Tensor, pixels_BCYX: Tensor, masks_BNYX: Tensor) -> Tensor:
    """One minus the normalised correlation under each mask, each colour channel around its own mean there; the mean
    over the masks that have any pixel. It is what `minigpt5.storybook.crispness` measures, at one place."""
    masks_BN1YX = masks_BNYX[:, :, None].float()
    area_BN111 = masks_BN1YX.sum((3, 4), keepdim=True).clamp_min(1)

    def details(pictures_BCYX: Tensor) -> Tensor:
        under_BNCYX = pictures_BCYX[:, None] * masks_BN1YX
        return (under_BNCYX - under_BNCYX.sum((3, 4), keepdim=True) / area_BN111) * masks_BN1YX

    decoded_BNCYX, true_BNCYX = details(decoded_BCYX), details(pixels_BCYX)
    energies_BN = (values.square().sum((2, 3, 4)).clamp_min(MIN_ENERGY) for values in (decoded_BNCYX, true_BNCYX))
    correlation_BN = (decoded_BNCYX * true_BNCYX).sum((2, 3, 4)) / torch.stack(list(energies_BN)).prod(0).sqrt()
    is_there_BN = masks_BNYX.flatten(2).any(-1)
    return ((1 - correlation_BN) * is_there_BN).sum() / is_there_BN.sum().clamp_min(1)


def _true_target(scenes: list[WeightedScene]) -> TargetBatch:
    return TargetBatch(
        pixels_BYXC=torch.as_tensor(np.stack([scene.pixels for scene in scenes])),
        weight_B1YX=torch.as_tensor(np.stack([scene.weight for scene in scenes])),
        masks_BNYX=torch.as_tensor(np.stack([scene.masks for scene in scenes])),
    )


def drawn_target(pixels: np.ndarray, scene: Scene, *, scale: int = 1) -> TargetBatch:
    """Of one drawn picture, `scale` times as large: with its sprites drawn again, without their halos, and no pixel in
    the mask of one that is not to be seen."""
    sprites = find_sprites(pixels, scene)
    is_whole = len(sprites) == 2  # what is not found would be taken for what is behind the other
    if is_whole:
        pixels = cleared(pixels, sprites)
    if scale > 1:
        sprites = [dataclasses.replace(sprite, scale=scale) for sprite in sprites]
        pixels = enlarged(pixels, scale)
    masks_NYX = np.zeros((2, *pixels.shape[:2]), bool)
    for mask_YX, sprite in zip(masks_NYX, sprites, strict=False):
        mask_YX[:] = sprite.mask()
    weight_1YX = error_weight(sprites, around=SPRITE_WEIGHT if is_whole else 1.0, scale=scale)
    return TargetBatch(
        pixels_BYXC=torch.tensor(redrawn(pixels, sprites))[None],
        weight_B1YX=torch.tensor(weight_1YX)[None],
        masks_BNYX=torch.tensor(masks_NYX)[None],
    )


class SharpenStage(TeachesNoWriting):
    def __init__(self, preset: SharpenPreset, sources: WeightSources, data: StageData) -> None:
        config = sources.config()
        self.diffusion = sources.diffusion(stage="sharpen")
        prepare_unet(self.diffusion.denoiser_for(DISTILLED), preset)
        text_encoder = load_text_encoder(resolve(config.text_encoder), config)
        self.config, self.preset = config, preset
        self.objective = SharpenObjective(self.diffusion, text_encoder, preset)

    def parameter_groups(self) -> list[dict[str, Any]]:
        vae = [parameter for parameter in self.diffusion.vae.parameters() if parameter.requires_grad]
        return [
            {
                "params": list(self.diffusion.denoiser_for(DISTILLED).parameters()),
                "lr": self.preset.optimizer.learning_rate,
            },
            {"params": vae, "lr": self.preset.decoder_learning_rate},
        ]

    def draw_sheet(self, path: Path) -> None:
        save_captioned_sheet(path, self.diffusion, self.objective.text_encoder, self.config, DISTILLED_DRAW)

    def saved_parameters(self) -> list[nn.Parameter]:
        return list(self.objective.parameters())

    def save(self, folder: Path) -> None:
        model_folder.save_diffusion(self.diffusion, folder)
