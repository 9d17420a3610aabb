"""Stable Diffusion 1.x and 2.x: a UNet that predicts noise or velocity, conditioned by CLIP (arXiv 2112.10752)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from minigpt5.errors import ModelFolderError
from minigpt5.model.decoders.diffusion import DecoderSizes, Diffusion, read_config
from minigpt5.model.decoders.ip_adapter import IpAdapter
from minigpt5.model.decoders.noise import VariancePreserving
from minigpt5.model.decoders.shared_attention import shared_layers
from minigpt5.model.libraries import load_whole
from minigpt5.types import DrawSettings

PREDICTED = ("epsilon", "v_prediction")
OTHER_NOISE = ("EDM", "FlowMatch")
"""How the names of schedulers begin whose noise is added otherwise (arXiv 2206.00364, 2209.03003)."""


class StableDiffusion(Diffusion):
    """The family of the published system, and of the model that ships with this project.

    A consistency model's denoiser takes the guidance scale as an input (arXiv 2310.04378), and is drawn by "lcm" alone.
    """

    PIPELINES: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    DENOISER = "unet"

    @property
    def shares_attention(self) -> bool:
        return bool(shared_layers(self.denoiser))

    @classmethod
    def load_noise(cls, folder: str | Path) -> VariancePreserving:
        read_schedule(Path(folder))
        noise = VariancePreserving(DDIMScheduler.from_pretrained(Path(folder) / "scheduler"))
        if read_config(Path(folder) / "unet").get("time_cond_proj_dim"):
            noise.samplers = {"lcm": noise.samplers["lcm"]}
        return noise

    @classmethod
    def read_sizes(cls, folder: Path) -> DecoderSizes:
        unet, vae, text = (read_config(folder / part) for part in ("unet", "vae", "text_encoder"))
        schedule = read_schedule(folder)
        width, channels = unet.get("cross_attention_dim"), unet.get("in_channels", 4)
        if unet.get("addition_embed_type") or not isinstance(width, int) or channels != vae.get("latent_channels", 4):
            kind = unet.get("addition_embed_type") or f"{channels} input channels and condition width {width}"
            raise ModelFolderError(f"{folder} is no Stable Diffusion 1.x or 2.x (its UNet has {kind}): name another")
        if text["hidden_size"] != width:
            raise ModelFolderError(
                f"the text encoder of {folder} has width {text['hidden_size']} but its UNet reads {width}"
            )
        return DecoderSizes(
            condition_length=text.get("max_position_embeddings", 77),
            condition_width=width,
            image_px=unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1),
            draw=few_step_settings(unet, schedule) or DrawSettings(steps=50, guidance_scale=7.5, scheduler="ddim"),
        )

    @classmethod
    def load_text_encoder(cls, folder: str | Path, *, num_positions: int, published_quirks: bool = False) -> nn.Module:
        return ClipTextEncoder(folder, num_positions=num_positions, published_quirks=published_quirks)

    def load_ip_adapter(self, folder: Path) -> None:
        self.ip_adapter = IpAdapter.from_folder(folder, self.denoiser)

    def is_guided(self, draw: DrawSettings) -> bool:
        return super().is_guided(draw) and not self.denoiser.config.get("time_cond_proj_dim")

    def predict(
        self,
        denoiser: Any,
        latents_BCYX: Tensor,
        timesteps_B: Tensor,
        condition_BQD: Tensor,
        *,
        guidance_B: Tensor | None = None,
    ) -> Tensor:
        scales = self.embed_guidance(guidance_B, latents_BCYX)
        return denoiser(latents_BCYX, timesteps_B, encoder_hidden_states=condition_BQD, **scales).sample

    def embed_guidance(self, guidance_B: Tensor | None, like_BCYX: Tensor) -> dict[str, Tensor]:
        """A further input of a consistency model's denoiser; without `guidance_B` the scale is 1. None of any other."""
        width = self.denoiser.config.get("time_cond_proj_dim")
        if not width:
            return {}
        scale_B = torch.ones(len(like_BCYX), device=like_BCYX.device) if guidance_B is None else guidance_B
        embedded_BW = get_timestep_embedding(1000 * (scale_B.float() - 1), width, downscale_freq_shift=1)
        return {"timestep_cond": embedded_BW.to(like_BCYX)}


def read_schedule(folder: Path) -> dict[str, Any]:
    """The config of a folder's scheduler. Raises ModelFolderError where its noise is not added as in arXiv 2006.11239,
    or the denoiser does not predict the noise or the velocity."""
    schedule = read_config(folder / "scheduler")
    kind, predicted = schedule["_class_name"], schedule.get("prediction_type", "epsilon")
    if kind.startswith(OTHER_NOISE) or predicted not in PREDICTED:
        raise ModelFolderError(
            f"the scheduler of {folder} is a {kind} that predicts {predicted}: name a model with DDPM's noise that "
            f"predicts {' or '.join(PREDICTED)}"
        )
    return schedule


def few_step_settings(unet: Mapping[str, Any], schedule: Mapping[str, Any]) -> DrawSettings | None:
    """How a consistency model, SD-Turbo or SDXL-Turbo is drawn, as their cards say; None: the model needs many steps.
    A Turbo has an Euler sampler that begins at the last timestep, and predicts the noise."""
    if unet.get("time_cond_proj_dim"):
        return DrawSettings(steps=4, guidance_scale=8.5, scheduler="lcm")
    sampler = {"EulerDiscreteScheduler": "euler", "EulerAncestralDiscreteScheduler": "euler-ancestral"}
    is_turbo = (
        schedule["_class_name"] in sampler
        and schedule.get("timestep_spacing") == "trailing"
        and schedule.get("prediction_type", "epsilon") == "epsilon"
        and not schedule.get("rescale_betas_zero_snr")
    )
    return DrawSettings(steps=1, guidance_scale=1.0, scheduler=sampler[schedule["_class_name"]]) if is_turbo else None


class ClipTextEncoder(nn.Module):
    """The frozen text encoder of a Stable Diffusion folder; padding is what the model makes of its padding token.

    `published_quirks`: the caption's padding is hidden from attention, as Stable Diffusion never had it: the states
    of the padding differ strongly, those of the caption do not.
    """

    def __init__(self, folder: str | Path, *, num_positions: int, published_quirks: bool = False) -> None:
        super().__init__()
        self.tokenizer = CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer")
        self.model = load_whole(CLIPTextModel, Path(folder) / "text_encoder", dtype=torch.float32)
        self.model.eval().requires_grad_(False)
        self.num_positions, self.published_quirks = num_positions, published_quirks

    @torch.no_grad()
    def forward(self, captions: list[str]) -> Tensor:
        """Captions -> (B, num_positions, D); longer captions are cut."""
        tokens = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.num_positions, return_tensors="pt"
        ).to(self.model.device)
        mask = tokens["attention_mask"] if self.published_quirks else None
        return self.model(tokens["input_ids"], attention_mask=mask).last_hidden_state
