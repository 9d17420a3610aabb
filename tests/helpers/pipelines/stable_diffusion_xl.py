"""A tiny random Stable Diffusion XL, or its Turbo, in diffusers' layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from examples.own_model.tiny_bases import make_clip_tokenizer, make_vae
from tests.helpers.pipelines.clip import make_clip_text
from tests.helpers.pipelines.stable_diffusion import make_consistency

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "turbo": {"is_turbo": True},
    "consistency": {"is_consistency": True},
    "statistics": {"latents_mean": [0.5, -1.0, 0.25, 0.0], "latents_std": [1.0, 2.0, 3.0, 0.5]},
}


def make(folder: Path, *, is_turbo: bool = False, is_consistency: bool = False, **of_vae: Any) -> None:
    """`of_vae`: of its config. A VAE with statistics has a scaling factor beside them, as Playground's has."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = (
        EulerAncestralDiscreteScheduler(**betas, timestep_spacing="trailing")
        if is_turbo
        else EulerDiscreteScheduler(**betas, timestep_spacing="leading", steps_offset=1)
    )
    StableDiffusionXLPipeline(
        vae=make_vae(force_upcast=True, **of_vae),
        unet=unet,
        scheduler=scheduler,
        text_encoder=make_clip_text(),
        text_encoder_2=make_clip_text(projection=24),
        tokenizer=make_clip_tokenizer(),
        tokenizer_2=make_clip_tokenizer(),
        add_watermarker=False,
    ).save_pretrained(folder)
    if is_consistency:
        make_consistency(folder)
