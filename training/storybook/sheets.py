"""Sample sheets: what a person looks at while a model trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from minigpt5.config import ModelConfig
from minigpt5.engine.denoising import denoise
from minigpt5.model.decoders.diffusion import Diffusion
from minigpt5.model.pixels import to_tensor
from minigpt5.storybook.captions import draw_facts, write_caption
from minigpt5.storybook.scenes import IMAGE_PX, draw_scene, scene_at
from minigpt5.types import DrawSettings
from training.samples import save_sheet


@torch.no_grad()
def save_captioned_sheet(
    path: Path, diffusion: Diffusion, text_encoder: nn.Module, config: ModelConfig, draw: DrawSettings
) -> None:
    """Draw held-out pairs: the asked scenes above what is drawn from their captions."""
    scenes = [scene_at(i, seed=0, split="validation", held_out_pairs=True) for i in range(16)]
    rng = np.random.default_rng(0)
    captions = [write_caption(draw_facts(scene, rng, complete=1.0), rng) for scene in scenes]
    drawn_BCYX = denoise(
        diffusion,
        text_encoder(captions),
        text_encoder([""]),
        seeds=list(range(16)),
        draw=draw,
        guidance_rescale=config.guidance_rescale,
    )
    scale = drawn_BCYX.shape[-1] // IMAGE_PX
    true_BCYX = to_tensor(np.stack([draw_scene(scene, scale=scale) for scene in scenes]))
    save_sheet(path, [true_BCYX[:8], drawn_BCYX[:8], true_BCYX[8:], drawn_BCYX[8:]])
