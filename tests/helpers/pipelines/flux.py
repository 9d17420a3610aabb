"""A tiny random FLUX.1 in diffusers' layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from examples.own_model.tiny_bases import make_clip_tokenizer, make_vae
from tests.helpers.pipelines.clip import make_clip_text
from tests.helpers.pipelines.t5 import make_t5_text, make_t5_tokenizer

VARIANTS: dict[str, dict[str, Any]] = {"dev": {"is_dev": True}, "schnell": {"is_dev": False}}


def make(folder: Path, *, is_dev: bool) -> None:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        pooled_projection_dim=32,
        guidance_embeds=is_dev,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = (
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
        if is_dev
        else FlowMatchEulerDiscreteScheduler(shift=1.0)
    )
    FluxPipeline(
        vae=make_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
        transformer=transformer,
        scheduler=scheduler,
        text_encoder=make_clip_text(),
        tokenizer=make_clip_tokenizer(),
        text_encoder_2=make_t5_text(hidden=48),
        tokenizer_2=make_t5_tokenizer(),
    ).save_pretrained(folder)
