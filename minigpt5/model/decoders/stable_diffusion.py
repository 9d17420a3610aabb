"""Stable Diffusion 1.x and 2.x: a UNet that predicts noise or velocity, conditioned by CLIP (arXiv 2112.10752)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from minigpt5.errors import ModelFolderError
from minigpt5.model.decoders.diffusion import DecoderSizes, Diffusion, read_config
from minigpt5.model.decoders.ip_adapter import IpAdapter
from minigpt5.model.decoders.noise import VariancePreserving
from minigpt5.types import DrawSettings


class StableDiffusion(Diffusion):
    """The family of the published system, and of the model that ships with this project."""

    PIPELINES: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    DENOISER = "unet"
    SHARES_ATTENTION = True

    @classmethod
    def load_noise(cls, folder: str | Path) -> VariancePreserving:
        return VariancePreserving(DDIMScheduler.from_pretrained(Path(folder) / "scheduler"))

    @classmethod
    def read_sizes(cls, folder: Path) -> DecoderSizes:
        unet, vae, text = (read_config(folder / part) for part in ("unet", "vae", "text_encoder"))
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
            draw=DrawSettings(steps=50, guidance_scale=7.5, scheduler="ddim"),
        )

    @classmethod
    def load_text_encoder(cls, folder: str | Path, *, num_positions: int, published_quirks: bool = False) -> nn.Module:
        return ClipTextEncoder(folder, num_positions=num_positions, published_quirks=published_quirks)

    def load_ip_adapter(self, folder: Path) -> None:
        self.ip_adapter = IpAdapter.from_folder(folder, self.denoiser)

    def predict(
        self,
        denoiser: Any,
        latents_BCYX: Tensor,
        timesteps_B: Tensor,
        condition_BQD: Tensor,
        *,
        guidance_B: Tensor | None = None,
    ) -> Tensor:
        return denoiser(latents_BCYX, timesteps_B, encoder_hidden_states=condition_BQD).sample


class ClipTextEncoder(nn.Module):
    """The frozen text encoder of a Stable Diffusion folder; padding is what the model makes of its padding token.

    `published_quirks`: the caption's padding is hidden from attention, as Stable Diffusion never had it: the states
    of the padding differ strongly, those of the caption do not.
    """

    def __init__(self, folder: str | Path, *, num_positions: int, published_quirks: bool = False) -> None:
        super().__init__()
        self.tokenizer = CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer")
        self.model = CLIPTextModel.from_pretrained(Path(folder) / "text_encoder", dtype=torch.float32)
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
