"""Stage "unet": caption through the text encoder -> latents. The base that the vokens are later aligned with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minigpt5.model import folder as model_folder
from minigpt5.model.base_models import resolve
from minigpt5.model.decoders.diffusion import load_part
from minigpt5.model.decoders.noise import VariancePreserving
from minigpt5.model.decoders.stable_diffusion import StableDiffusion
from minigpt5.model.pixels import to_tensor
from minigpt5.model.text_encoder import load_text_encoder
from training.data.batches import Batch, StageData
from training.stage import TeachesNoWriting
from training.storybook.examples import CaptionedScene
from training.storybook.new_decoder import new_storybook_noise_schedule, new_storybook_unet
from training.storybook.presets import UnetPreset
from training.storybook.sheets import save_captioned_sheet
from training.weight_sources import WeightSources, prepare_unet

NULL_SHARE = 0.1


class UnetObjective(nn.Module):
    """The denoising loss on fresh scenes, a tenth of them under the null condition; see `UnetPreset`."""

    def __init__(self, diffusion: StableDiffusion, text_encoder: nn.Module, preset: UnetPreset) -> None:
        super().__init__()
        self.diffusion, self.text_encoder, self.preset = diffusion, text_encoder, preset
        diffusion.vae.requires_grad_(False)

    def forward(self, batch: Batch[CaptionedScene], progress: float) -> dict[str, Tensor]:
        with torch.no_grad():
            latents_BCYX = self.diffusion.to_latents(
                to_tensor(np.stack([scene.pixels for scene in batch.examples])).to(self.diffusion.denoiser.device)
            )
        learns_placement = progress < self.preset.placement_until
        captions = [scene.canonical if learns_placement else scene.caption for scene in batch.examples]
        is_null = torch.rand(len(captions)) < NULL_SHARE
        captions = ["" if null else caption for null, caption in zip(is_null.tolist(), captions, strict=True)]
        condition_BQD = self.text_encoder(captions)
        first = self.preset.first_timestep if learns_placement else 0
        return {"loss": self.diffusion.training_loss(latents_BCYX, condition_BQD, first_timestep=first)}


class UnetStage(TeachesNoWriting):
    def __init__(self, preset: UnetPreset, sources: WeightSources, data: StageData) -> None:
        torch.manual_seed(preset.seed)
        config = sources.config()
        continues = sources.start or sources.decoder
        folder = sources.find("unet", stage="unet") if continues else None
        unet = load_part(folder, "unet") if folder else new_storybook_unet(config.condition_width)
        noise = VariancePreserving(new_storybook_noise_schedule())
        self.diffusion = StableDiffusion(load_part(sources.need("vae", stage="unet"), "vae"), unet, noise)
        prepare_unet(self.diffusion.denoiser, preset)
        text_encoder = load_text_encoder(resolve(config.text_encoder), config)
        self.config, self.preset = config, preset
        self.objective = UnetObjective(self.diffusion, text_encoder, preset)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.diffusion.denoiser.parameters()), "lr": self.preset.optimizer.learning_rate}]

    def draw_sheet(self, path: Path) -> None:
        save_captioned_sheet(path, self.diffusion, self.objective.text_encoder, self.config, self.config.draw)

    def saved_parameters(self) -> list[nn.Parameter]:
        return list(self.objective.parameters())

    def save(self, folder: Path) -> None:
        """Without a UNet that was distilled from what this one was before."""
        model_folder.save_diffusion(self.diffusion, folder)
