"""A tiny random Sana in diffusers' layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

VARIANTS: dict[str, dict[str, Any]] = {"1.0": {}, "scaled-times": {"timestep_scale": 0.5}}
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"abcdefghijklmnopqrstuvwxyz"]


def make(folder: Path, *, timestep_scale: float = 1.0) -> None:
    torch.manual_seed(0)
    text = Gemma2Config(
        vocab_size=len(PIECES),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=4,
        timestep_scale=timestep_scale,
    )
    SanaPipeline(
        tokenizer=GemmaTokenizer(
            vocab={piece: number for number, piece in enumerate(PIECES)}, merges=[], add_bos_token=True
        ),
        text_encoder=Gemma2Model(text).eval(),
        vae=tiny_autoencoder(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ).save_pretrained(folder)


def tiny_autoencoder() -> AutoencoderDC:
    """Six stages, as published: one latent stands for 32 x 32 pixels, and the pipeline asks for multiples of 32."""
    channels, layers, scales = (4, 4, 4, 8, 8, 8), (1,) * 6, ((),) * 6
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        decoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=0.41407,
    )
