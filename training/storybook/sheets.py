"""Sample sheets: what a person looks at while a model trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from minigpt5.config import ModelConfig
from minigpt5.engine.denoising import denoise
from minigpt5.model.diffusion import Diffusion
from minigpt5.model.pixels import to_pixels, to_tensor
from minigpt5.storybook.captions import draw_facts, write_caption
from minigpt5.storybook.scenes import draw_scene, scene_at
from minigpt5.types import DrawSettings


def save_sheet(path: Path, rows: list[Tensor]) -> None:
    """One PNG; each entry of `rows` is a row of pictures (n, 3, Y, X) in [-1, 1]."""
    lines = [torch.cat(list(row.cpu()), dim=2) for row in rows]
    width = max(line.shape[2] for line in lines)
    lines = [torch.nn.functional.pad(line, (0, width - line.shape[2]), value=1.0) for line in lines]
    Image.fromarray(to_pixels(torch.cat(lines, dim=1)[None].clamp(-1, 1))[0]).save(path)


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
    true_BCYX = to_tensor(np.stack([draw_scene(scene) for scene in scenes]))
    save_sheet(path, [true_BCYX[:8], drawn_BCYX[:8], true_BCYX[8:], drawn_BCYX[8:]])
