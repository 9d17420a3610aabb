"""Pictures: pixels, PNG."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def png_of(pixels_YXC: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_YXC).save(file, "PNG")
    return file.getvalue()


def pixels_of(png: bytes) -> np.ndarray:
    """(Y, X, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
