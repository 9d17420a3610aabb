"""Stage "decoder": fine-tunes the VAE decoder on denoised latents. The encoder stays, so that latents stay valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minigpt5.model import folder as model_folder
from minigpt5.model.base_models import resolve
from minigpt5.model.decoders.diffusion import Diffusion, normal_like
from minigpt5.model.decoders.multistep_scheduler import last_level
from minigpt5.model.pixels import to_tensor
from minigpt5.model.text_encoder import load_text_encoder
from minigpt5.types import DISTILLED
from training.data.batches import Batch, StageData
from training.stage import TeachesNoWriting
from training.storybook.examples import CaptionedCrops
from training.storybook.presets import DecoderPreset
from training.storybook.sheets import save_captioned_sheet
from training.storybook.vae import LATENT_NOISE, reconstruction_losses
from training.weight_sources import WeightSources


class DecoderObjective(nn.Module):
    """Reconstruction of crops: from latents as they are, from latents that were noised and cleaned in one step by the
    UNet, and from latents as the distilled UNet ends what it draws, a third each.

    A decoder that has seen exact latents alone paints what a UNet smears as smears; this one learns what was meant.
    Noise goes up to `DecoderPreset.last_timestep`: beyond it a UNet puts things elsewhere, and no picture is right.
    """

    def __init__(self, diffusion: Diffusion, text_encoder: nn.Module, preset: DecoderPreset) -> None:
        super().__init__()
        self.diffusion, self.text_encoder, self.preset = diffusion, text_encoder, preset
        diffusion.requires_grad_(False)
        for part in (diffusion.vae.post_quant_conv, diffusion.vae.decoder):
            part.requires_grad_(True)

    def forward(self, batch: Batch[CaptionedCrops], progress: float) -> dict[str, Tensor]:
        scenes, device = batch.examples, self.diffusion.denoiser.device
        pixels_BCYX = to_tensor(np.stack([scene.pixels for scene in scenes])).to(device)
        first = batch.step * len(pixels_BCYX)
        kind_B = torch.arange(first, first + len(pixels_BCYX)) % 3  # a third each, however small a share
        with torch.no_grad():
            latents_BCYX = self._cleaned(
                pixels_BCYX, self.text_encoder([scene.caption for scene in scenes]), kind_B
            ).float()
        pixels_per_latent = pixels_BCYX.shape[-1] // latents_BCYX.shape[-1]
        corners_BN2 = np.asarray([scene.corners for scene in scenes]) // pixels_per_latent
        latents_BCYX = _crops(latents_BCYX, corners_BN2, self.preset.crop_px // pixels_per_latent)
        pixels_BCYX, weight_B1YX = (
            _crops(whole, corners_BN2 * pixels_per_latent, self.preset.crop_px)
            for whole in (pixels_BCYX, torch.as_tensor(np.stack([scene.weight for scene in scenes])).to(device))
        )
        return reconstruction_losses(self.diffusion.to_raw_pixels(latents_BCYX).float(), pixels_BCYX, weight_B1YX)

    def _cleaned(self, pixels_BCYX: Tensor, condition_BQD: Tensor, kind_B: Tensor) -> Tensor:
        """Pictures' latents as they are (of kind 0), cleaned by the UNet (1), less often of more noise, and ended as
        what is drawn (2)."""
        latents_BCYX = self.diffusion.to_latents(pixels_BCYX)
        noise_BCYX = normal_like(latents_BCYX)
        timesteps_B = (torch.rand(len(kind_B)).square() * self.preset.last_timestep).long()
        timesteps_B[kind_B == 2] = last_level(self.diffusion.noise_schedule)
        cleaned_BCYX = latents_BCYX + LATENT_NOISE * noise_BCYX
        for sampler, of_kind_B in (("ddim", kind_B == 1), (DISTILLED, kind_B == 2)):
            if of_kind_B.any():
                cleaned_BCYX[of_kind_B] = self.diffusion.predict_x0(
                    latents_BCYX[of_kind_B],
                    condition_BQD[of_kind_B],
                    noise=noise_BCYX[of_kind_B],
                    timesteps=timesteps_B[of_kind_B].to(latents_BCYX.device),
                    sampler=sampler,
                ).to(cleaned_BCYX.dtype)
        return cleaned_BCYX


class DecoderStage(TeachesNoWriting):
    def __init__(self, preset: DecoderPreset, sources: WeightSources, data: StageData) -> None:
        config = sources.config()
        self.diffusion = sources.diffusion(stage="decoder")
        text_encoder = load_text_encoder(resolve(config.text_encoder), config)
        self.config, self.preset = config, preset
        self.objective = DecoderObjective(self.diffusion, text_encoder, preset)

    def parameter_groups(self) -> list[dict[str, Any]]:
        trained = [parameter for parameter in self.diffusion.vae.parameters() if parameter.requires_grad]
        return [{"params": trained, "lr": self.preset.optimizer.learning_rate}]

    def draw_sheet(self, path: Path) -> None:
        save_captioned_sheet(path, self.diffusion, self.objective.text_encoder, self.config, self.config.draw)

    def saved_parameters(self) -> list[nn.Parameter]:
        return list(self.objective.parameters())

    def save(self, folder: Path) -> None:
        model_folder.save_diffusion(self.diffusion, folder)


def _crops(whole_BCYX: Tensor, corners_BN2: np.ndarray, side: int) -> Tensor:
    """N squares of each, from their rows and columns on: (B N, C, side, side)."""
    return torch.stack(
        [
            whole_CYX[:, row : row + side, column : column + side]
            for whole_CYX, corners_N2 in zip(whole_BCYX, corners_BN2.tolist(), strict=True)
            for row, column in corners_N2
        ]
    )
