"""Style adapters of a tiny denoiser, as diffusers' pipeline saves them."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EVERYWHERE = (*ATTENTION, "proj_in", "proj_out", "time_emb_proj", "conv1", "conv_shortcut", "ff.net.0.proj")


def save_style(
    folder: Path, unet: UNet2DConditionModel, *, seed: int, rank: int = 4, targets: tuple[str, ...] = EVERYWHERE
) -> None:
    """Write a random adapter, whose alpha is not its rank, to a style's folder."""
    torch.manual_seed(seed)
    unet = copy.deepcopy(unet)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        **_collate_lora_metadata({"unet": unet}),
    )
