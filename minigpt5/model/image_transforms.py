"""Picture files -> pixels as the two sides of the model take them, as published. No torch here.

Serving, training and bulk jobs use this pair alone, so that the model sees what it was trained on.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from minigpt5.pictures import open_picture

MAX_PADDED_PX = 4096
"""Longest side that is padded to a square as it is, which bounds the square at 50 MB."""


def fit_read(data: bytes, px: int) -> np.ndarray:
    """Fit a picture for the language model: the short side to `px`, the middle cut out. Raises BadPicture.

    uint8 (side, side, 3), where `side` is `px`, or the short side where that is smaller: the vision encoder enlarges.
    """
    picture = open_picture(data)
    short = min(picture.size)
    if short <= px:
        left, top = ((length - short) // 2 for length in picture.size)
        return np.asarray(picture.crop((left, top, left + short, top + short)))
    # As if the whole were resized and its middle cut out; only the middle is computed.
    width, height = (round(length * px / short) for length in picture.size)
    left, top = ((length - px) // 2 for length in (width, height))
    across, down = picture.width / width, picture.height / height
    middle = (left * across, top * down, (left + px) * across, (top + px) * down)
    return np.asarray(picture.resize((px, px), Image.Resampling.BILINEAR, box=middle))


def fit_drawn(data: bytes, px: int) -> np.ndarray:
    """Fit a picture for the VAE: padded to a white square and resized. uint8 (px, px, 3). Raises BadPicture."""
    return np.asarray(in_square(data).resize((px, px), Image.Resampling.BILINEAR))


def in_square(data: bytes) -> Image.Image:
    """A picture in the middle of a white square, of at most MAX_PADDED_PX. Raises BadPicture."""
    picture = open_picture(data)
    picture.thumbnail((MAX_PADDED_PX, MAX_PADDED_PX), Image.Resampling.BILINEAR)
    side = max(picture.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square
