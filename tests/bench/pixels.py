"""Pictures: tensors, pixels, PNG."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from torch import Tensor


def png_of(pixels_YXC: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_YXC).save(file, "PNG")
    return file.getvalue()


def pixels_of(png: bytes) -> np.ndarray:
    """(Y, X, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def to_pixels(pictures_BCYX: Tensor) -> np.ndarray:
    """[-1, 1] -> uint8."""
    return ((pictures_BCYX + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
