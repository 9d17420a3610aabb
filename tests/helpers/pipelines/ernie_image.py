"""A tiny random ERNIE-Image in diffusers' layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import Mistral3Config, Mistral3Model, MistralConfig, PixtralVisionConfig

from tests.helpers.pipelines.t5 import PIECES, make_t5_tokenizer

VARIANTS: dict[str, dict[str, Any]] = {"1.0": {}}


def make(folder: Path) -> None:
    torch.manual_seed(0)
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=48,
        in_channels=16,
        out_channels=16,
        text_in_dim=24,
        rope_axes_dim=(4, 6, 6),
    )
    for part in (transformer.adaLN_modulation[-1], transformer.final_linear):  # zero where training begins
        torch.nn.init.normal_(part.weight, std=0.2)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    ErnieImagePipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=_text_encoder(),
        tokenizer=make_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
    ).save_pretrained(folder)


def _text_encoder() -> Mistral3Model:
    """With the vision tower that the published class has, and no caption uses."""
    text = MistralConfig(
        vocab_size=len(PIECES),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
    )
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return Mistral3Model(Mistral3Config(text_config=text, vision_config=vision)).eval()
