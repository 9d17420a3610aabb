"""Pixels, uint8, <-> tensors in [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_tensor(pixels_BYXC: object) -> Tensor:
    """Pictures (B, Y, X, 3) uint8, of numpy or torch -> (B, 3, Y, X), on the device where they are."""
    pixels = pixels_BYXC if isinstance(pixels_BYXC, Tensor) else torch.from_numpy(np.array(pixels_BYXC))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(pictures_BCYX: Tensor) -> np.ndarray:
    """Convert pictures back: (B, 3, Y, X) -> (B, Y, X, 3) uint8."""
    return ((pictures_BCYX.float() + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
