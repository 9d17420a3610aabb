"""Pictures that a model draws from texts, as the benches ask for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from benchmarks.pixels import pixels_of
from minigpt5.pipeline import MiniGPT5
from minigpt5.types import DrawRequest, DrawSettings

BATCH_SIZE = 8


def own_size(model: MiniGPT5) -> DrawSettings:
    """The default request for pictures that the VAE itself paints."""
    px = model.config.image_px
    return dataclasses.replace(model.config.default_draw, width=px, height=px)


def draw(model: MiniGPT5, texts: Sequence[str], settings: DrawSettings, *, seeds: Sequence[int]) -> np.ndarray:
    """One picture for each text: (B, Y, X, 3) uint8."""
    requests = [
        DrawRequest(vokens=model.vokens(text), seed=seed, settings=settings)
        for text, seed in zip(texts, seeds, strict=True)
    ]
    batches = (requests[start : start + BATCH_SIZE] for start in range(0, len(requests), BATCH_SIZE))
    return np.stack([pixels_of(picture.png) for batch in batches for picture in model.decoder.draw(batch)])
