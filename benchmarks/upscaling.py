"""Pictures that a second decoder paints twice as large, beside those of the VAE itself.

How crisp the default request draws the asked sprites at the larger size; how near scenes that were encoded come to the
same scenes drawn at that size, beside the VAE's reconstructions enlarged by resampling (LPIPS); and what a picture of
each size takes, in turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.drawing import BATCH_SIZE, draw, own_size
from benchmarks.shares import mean
from minigpt5.evaluation.perceptual import Lpips
from minigpt5.model.decoders.diffusion import Diffusion
from minigpt5.model.pixels import to_pixels, to_tensor
from minigpt5.pipeline import MiniGPT5
from minigpt5.storybook.crispness import crispness
from minigpt5.storybook.scenes import draw_scene
from minigpt5.types import DrawRequest
from training.storybook.sprites import enlarged

if TYPE_CHECKING:
    from benchmarks.quality import Asked

TIMED = 15
"""Pictures of each size whose seconds are measured."""


def upscaling(model: MiniGPT5, asked: Sequence[Asked]) -> dict[str, Any]:
    """All figures of this part. The model has a second decoder."""
    settings = model.config.default_draw
    drawn = draw(model, [one.caption for one in asked], settings, seeds=[one.seed for one in asked])
    crisp = [
        [crispness(picture, key) for key in (one.scene.who, one.scene.what)]
        for picture, one in zip(drawn, asked, strict=True)
    ]
    near = nearness(model.decoder.diffusion, asked, scale=model.config.upscale)
    seconds = time_in_turns(model, asked[0])
    return {
        "side_px": drawn.shape[2],
        "crispness": mean(np.mean(crisp, axis=1)),
        "lpips": {name: mean(values) for name, values in near.items()},
        "lpips_vs_enlarged": float(near["upscaled"].mean() / near["enlarged"].mean()),
        "seconds": seconds,
        "seconds_vs_own": seconds["upscaled"] / seconds["own"],
    }


@torch.no_grad()
def nearness(diffusion: Diffusion, asked: Sequence[Asked], *, scale: int) -> dict[str, np.ndarray]:
    """LPIPS to true scenes, drawn larger, of what is painted from their latents: (B,) by the way of painting."""
    found: dict[str, list[np.ndarray]] = {"upscaled": [], "enlarged": []}
    measure = Lpips()
    for start in range(0, len(asked), BATCH_SIZE):
        scenes = [one.scene for one in asked[start : start + BATCH_SIZE]]
        latents_BCYX = diffusion.to_latents(to_tensor(np.stack([draw_scene(scene) for scene in scenes])))
        true_BCYX = to_tensor(np.stack([draw_scene(scene, scale=scale) for scene in scenes]))
        small = to_pixels(diffusion.to_pixels(latents_BCYX))
        large = to_pixels(diffusion.to_pixels(latents_BCYX, scale=scale))
        ways = {"upscaled": large, "enlarged": np.stack([enlarged(picture, scale) for picture in small])}
        for name, pictures in ways.items():
            found[name].append(measure(to_tensor(pictures), true_BCYX).double().numpy())
    return {name: np.concatenate(values) for name, values in found.items()}


def time_in_turns(model: MiniGPT5, one: Asked) -> dict[str, float]:
    """Median seconds of a picture alone, PNG included, of each size."""
    vokens = model.vokens(one.caption)
    seconds: dict[str, list[float]] = {"own": [], "upscaled": []}
    for turn in range(TIMED + 1):
        for name, settings in (("own", own_size(model)), ("upscaled", model.config.default_draw)):
            began = time.perf_counter()
            model.decoder.draw([DrawRequest(vokens=vokens, seed=turn, settings=settings)])
            seconds[name] += [time.perf_counter() - began] if turn else []  # the first ones compile
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """What quality.json says of larger pictures in short."""
    return {
        f"crispness_{found['side_px']}": found["crispness"]["mean"],
        f"lpips_{found['side_px']}_vs_enlarged": found["lpips_vs_enlarged"],
        f"seconds_{found['side_px']}_vs_{found['side_px'] // 2}": found["seconds_vs_own"],
    }
