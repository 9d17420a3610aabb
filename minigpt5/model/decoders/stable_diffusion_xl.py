"""Stable Diffusion XL and its Turbo: two CLIP text encoders, a pooled vector and sizes as inputs (arXiv 2307.01952)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from minigpt5.errors import ModelFolderError
from minigpt5.model.decoders.diffusion import DecoderSizes, join_pooled, read_config, split_pooled
from minigpt5.model.decoders.pipeline_text import PipelineTextEncoder, load_text_half
from minigpt5.model.decoders.stable_diffusion import (
    StableDiffusion,
    few_step_settings,
    read_schedule,
)
from minigpt5.types import DrawSettings


class StableDiffusionXL(StableDiffusion):
    """The denoiser is told the picture's size, as if nothing of it had been cropped."""

    PIPELINES = ("StableDiffusionXLPipeline",)

    @classmethod
    def read_sizes(cls, folder: Path) -> DecoderSizes:
        unet, vae, text = (read_config(folder / name) for name in ("unet", "vae", "text_encoder_2"))
        schedule = read_schedule(folder)
        if unet.get("addition_embed_type") != "text_time":
            raise ModelFolderError(
                f"the UNet of {folder} reads {unet.get('addition_embed_type')}, not a text and sizes"
            )
        return DecoderSizes(
            condition_length=text.get("max_position_embeddings", 77),
            condition_width=unet["cross_attention_dim"],
            condition_pooled=text["projection_dim"],
            image_px=unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1),
            draw=few_step_settings(unet, schedule) or DrawSettings(steps=50, guidance_scale=5.0, scheduler="euler"),
        )

    @classmethod
    def load_text_encoder(
        cls, folder: str | Path, *, num_positions: int, published_quirks: bool = False
    ) -> PipelineTextEncoder:
        pipeline = load_text_half(StableDiffusionXLPipeline, folder, denoiser=cls.DENOISER)
        encode = partial(_encode, num_positions=num_positions)
        return PipelineTextEncoder(
            pipeline,
            encode=lambda pipeline, captions: encode(pipeline, captions)[0],
            encode_none=lambda pipeline: encode(pipeline, ["."])[1],
        )

    def predict(
        self,
        denoiser: Any,
        latents_BCYX: Tensor,
        timesteps_B: Tensor,
        condition_BQD: Tensor,
        *,
        guidance_B: Tensor | None = None,
    ) -> Tensor:
        states_BQD, pooled_BP = split_pooled(condition_BQD, self._pooled_width)
        rows, columns = (side * self.pixels_per_latent for side in latents_BCYX.shape[2:])
        sizes = torch.tensor([rows, columns, 0, 0, rows, columns], device=latents_BCYX.device)
        added = {"text_embeds": pooled_BP, "time_ids": sizes.to(latents_BCYX.dtype).expand(len(latents_BCYX), -1)}
        return denoiser(
            latents_BCYX,
            timesteps_B,
            encoder_hidden_states=states_BQD,
            added_cond_kwargs=added,
            **self.embed_guidance(guidance_B, latents_BCYX),
        ).sample

    @property
    def _pooled_width(self) -> int:
        """What the size inputs leave of the width that the denoiser adds to its time embedding."""
        config = self.denoiser.config
        return int(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)


def _encode(pipeline: Any, captions: list[str], *, num_positions: int) -> tuple[Tensor, Tensor]:
    """The condition of captions, and of no caption."""
    states, no_states, pooled, no_pooled = pipeline.encode_prompt(
        captions, num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    return (
        join_pooled(states[:, :num_positions], pooled),
        join_pooled(no_states[:1, :num_positions], no_pooled[:1]),
    )
