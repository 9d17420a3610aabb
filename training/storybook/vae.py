"""Stage "vae": pictures -> latents -> pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from minigpt5.model import folder as model_folder
from minigpt5.model.decoders.diffusion import load_part, normal_like
from minigpt5.model.pixels import to_tensor
from minigpt5.storybook.scenes import draw_scene, scene_at
from training.data.batches import Batch, StageData
from training.samples import save_sheet
from training.stage import TeachesNoWriting
from training.storybook.examples import Crop
from training.storybook.new_decoder import new_storybook_vae
from training.storybook.presets import VaePreset
from training.weight_sources import WeightSources

LATENT_NOISE = 0.05
"""Noise added to latents, raw ones here and normalised ones in "decoder": the VAE decoder learns to forgive it."""


class VaeObjective(nn.Module):
    """Reconstruction of crops."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, batch: Batch[Crop], progress: float) -> dict[str, Tensor]:
        pixels_BCYX = to_tensor(np.stack([crop.pixels for crop in batch.examples])).to(self.vae.device)
        latents_BCYX = self.vae.encode(pixels_BCYX).latent_dist.mode().float()
        decoded_BCYX = self.vae.decode(latents_BCYX + LATENT_NOISE * normal_like(latents_BCYX)).sample.float()
        losses = reconstruction_losses(decoded_BCYX, pixels_BCYX, np.stack([crop.weight for crop in batch.examples]))
        size = 1e-4 * latents_BCYX.square().mean()  # keeps the latents' scale from wandering
        return {**losses, "loss": losses["loss"] + size}


def reconstruction_losses(
    decoded_BCYX: Tensor, pixels_BCYX: Tensor, weight_B1YX: np.ndarray | Tensor
) -> dict[str, Tensor]:
    """L1, a little L2 against colour drift, and the L1 of the gradients for crispness."""
    weight_B1YX = torch.as_tensor(weight_B1YX).to(pixels_BCYX.device).float()
    weight_B1YX = weight_B1YX / weight_B1YX.mean()
    error_BCYX = decoded_BCYX - pixels_BCYX
    l1 = (error_BCYX.abs() * weight_B1YX).mean()
    l2 = (error_BCYX.square() * weight_B1YX).mean()
    rows, columns = error_BCYX.diff(dim=2), error_BCYX.diff(dim=3)
    gradient = (rows.abs() * weight_B1YX[:, :, 1:]).mean() + (columns.abs() * weight_B1YX[..., 1:]).mean()
    return {"loss": l1 + l2 + gradient, "l1": l1, "mse": error_BCYX.square().mean(), "gradient": gradient}


class VaeStage(TeachesNoWriting):
    def __init__(self, preset: VaePreset, sources: WeightSources, data: StageData) -> None:
        torch.manual_seed(preset.seed)
        self.preset = preset
        continues = sources.start or sources.decoder
        self.vae = load_part(sources.need("vae", stage="vae"), "vae") if continues else new_storybook_vae()
        self.objective = VaeObjective(self.vae)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.vae.parameters()), "lr": self.preset.optimizer.learning_rate}]

    @torch.no_grad()
    def draw_sheet(self, path: Path) -> None:
        """Validation scenes above their reconstructions."""
        scenes = [scene_at(i, seed=0, split="validation") for i in range(16)]
        pixels_BCYX = to_tensor(np.stack([draw_scene(scene) for scene in scenes])).to(self.vae.device)
        decoded_BCYX = self.vae.decode(self.vae.encode(pixels_BCYX).latent_dist.mode()).sample
        print(f"validation mse {F.mse_loss(decoded_BCYX, pixels_BCYX).item():.5f}", flush=True)
        save_sheet(path, [pixels_BCYX[:8], decoded_BCYX[:8], pixels_BCYX[8:], decoded_BCYX[8:]])

    def saved_parameters(self) -> list[nn.Parameter]:
        return list(self.objective.parameters())

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Write the VAE with its latents' statistics, which put them on the UNet's scale."""
        self._measure_latents()
        model_folder.save_part(self.vae, folder / "vae")

    def _measure_latents(self) -> None:
        scenes = (scene_at(i, seed=self.preset.seed) for i in range(1024))
        latents = []
        for _ in range(32):
            pixels_BCYX = to_tensor(np.stack([draw_scene(next(scenes)) for _ in range(32)])).to(self.vae.device)
            latents.append(self.vae.encode(pixels_BCYX).latent_dist.mode())
        latents_NCYX = torch.cat(latents)
        self.vae.register_to_config(
            latents_mean=[round(v, 4) for v in latents_NCYX.mean(dim=(0, 2, 3)).tolist()],
            latents_std=[round(v, 4) for v in latents_NCYX.std(dim=(0, 2, 3)).tolist()],
        )
