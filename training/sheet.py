"""Pictures <-> tensors in [-1, 1], and sample sheets: what a person looks at while a model trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_tensor(pixels_BYXC: object) -> Tensor:
    """uint8 pictures -> (B, 3, Y, X) in [-1, 1]."""
    return torch.as_tensor(np.asarray(pixels_BYXC)).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_sheet(path: Path, rows: list[Tensor]) -> None:
    """One PNG; each entry of `rows` is a row of pictures (n, 3, Y, X) in [-1, 1]."""
    lines = [torch.cat(list(row.cpu()), dim=2) for row in rows]
    width = max(line.shape[2] for line in lines)
    lines = [torch.nn.functional.pad(line, (0, width - line.shape[2]), value=1.0) for line in lines]
    pixels = ((torch.cat(lines, dim=1).clamp(-1, 1) + 1) * 127.5).round().byte()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
