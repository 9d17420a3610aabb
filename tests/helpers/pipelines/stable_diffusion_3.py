"""A tiny random Stable Diffusion 3 or 3.5 in diffusers' layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from examples.own_model.tiny_bases import make_clip_tokenizer, make_vae
from tests.helpers.pipelines.clip import make_clip_text
from tests.helpers.pipelines.t5 import make_t5_text, make_t5_tokenizer

NEWER = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}
VARIANTS: dict[str, dict[str, Any]] = {
    "3": {},
    "3.5": {"transformer": NEWER},
    "shifted-by-size": {"transformer": NEWER, "schedule": {"use_dynamic_shifting": True, "max_shift": 1.15}},
    "without-t5": {"has_t5": False},
}


def make(
    folder: Path,
    *,
    transformer: dict[str, Any] | None = None,
    schedule: dict[str, Any] | None = None,
    has_t5: bool = True,
) -> None:
    """`transformer`, `schedule`: what their configs have beside the sizes."""
    torch.manual_seed(0)
    denoiser = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=48,
        pos_embed_max_size=16,
        **(transformer or {}),
    )
    StableDiffusion3Pipeline(
        vae=make_vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **(schedule or {})),
        text_encoder=make_clip_text(hidden=16, projection=24),
        text_encoder_2=make_clip_text(projection=24),
        text_encoder_3=make_t5_text(hidden=64) if has_t5 else None,
        tokenizer=make_clip_tokenizer(),
        tokenizer_2=make_clip_tokenizer(),
        tokenizer_3=make_t5_tokenizer() if has_t5 else None,
    ).save_pretrained(folder)
