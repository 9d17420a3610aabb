"""Encoded pictures -> pixels as the two sides of the model take them, as published. No torch here."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def on_white(picture: Image.Image) -> Image.Image:
    """Without transparency."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        ground.alpha_composite(picture)
        picture = ground
    return picture.convert("RGB")


def fit_read(data: bytes, px: int) -> np.ndarray:
    """For the language model: the short side to `px`, the middle cut out. uint8 (px, px, 3)."""
    picture = on_white(Image.open(io.BytesIO(data)))
    scale = px / min(picture.size)
    width, height = (max(px, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - px) // 2, (height - px) // 2
    return np.asarray(picture.crop((left, top, left + px, top + px)))


def fit_drawn(data: bytes, px: int) -> np.ndarray:
    """For the VAE: padded to a white square and resized. uint8 (px, px, 3)."""
    picture = on_white(Image.open(io.BytesIO(data)))
    side = max(picture.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square.resize((px, px), Image.Resampling.BILINEAR))
