"""A tiny random Stable Diffusion 1.x or 2.x in diffusers' layout, or a consistency model of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, UNet2DConditionModel

from examples.own_model.tiny_bases import make_stable_diffusion

VARIANTS: dict[str, dict[str, Any]] = {
    "noise": {},
    "velocity": {"prediction_type": "v_prediction"},
    "consistency": {"is_consistency": True},
}


def make(folder: Path, *, prediction_type: str = "epsilon", is_consistency: bool = False) -> None:
    make_stable_diffusion(folder, prediction_type=prediction_type)
    if is_consistency:
        make_consistency(folder)
        index = folder / "model_index.json"
        values = json.loads(index.read_text()) | {
            "_class_name": "LatentConsistencyModelPipeline",
            "scheduler": ["diffusers", "LCMScheduler"],
        }
        index.write_text(json.dumps(values))


def make_consistency(folder: Path) -> None:
    """Give a tiny folder a UNet that reads the guidance scale, and the sampler that goes with it."""
    torch.manual_seed(0)
    config = UNet2DConditionModel.load_config(folder / "unet")
    unet = UNet2DConditionModel.from_config(config, time_cond_proj_dim=32)
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight)  # as small as it begins, it would hardly be seen
    unet.save_pretrained(folder / "unet")
    LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        folder / "scheduler"
    )
