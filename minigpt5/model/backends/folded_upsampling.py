"""Upsampling layers as transposed convolutions, which need four ninths of the multiplications.

diffusers' `Upsample2D` doubles rows and columns and then convolves 3 x 3. Of the nine values under the kernel, some are
copies of one another. A transposed convolution of 4 x 4 with stride 2 adds their weights up instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


class FoldedUpsample(nn.Module):
    """What `layer` computes where it doubles a picture: (B, C, Y, X) -> (B, C', 2 Y, 2 X)."""

    def __init__(self, layer: Upsample2D) -> None:
        super().__init__()
        convolution: nn.Conv2d = layer.conv
        num_out, num_in = convolution.weight.shape[:2]
        self.folded = nn.ConvTranspose2d(num_in, num_out, 4, stride=2, padding=1, bias=convolution.bias is not None)
        flipped = convolution.weight.detach().double().flip(2, 3).reshape(num_out * num_in, 1, 3, 3)
        summed = F.conv2d(flipped, torch.ones(1, 1, 2, 2, dtype=torch.float64), padding=1)
        weight_IOYX = summed.reshape(num_out, num_in, 4, 4).transpose(0, 1)
        self.folded.weight = nn.Parameter(weight_IOYX.to(convolution.weight.dtype).contiguous())
        if convolution.bias is not None:
            self.folded.bias = nn.Parameter(convolution.bias.detach())

    def forward(self, input: Tensor, output_size: object = None) -> Tensor:
        if output_size is not None:
            raise ValueError("a folded layer doubles a picture, and cannot give it another size")
        return self.folded(input)


@contextlib.contextmanager
def folded_upsampling(module: nn.Module) -> Iterator[None]:
    """Let all upsampling layers of `module` that can be folded be so meanwhile."""
    found = [
        (parent, name, layer)
        for parent in module.modules()
        for name, layer in parent.named_children()
        if is_foldable(layer)
    ]
    try:
        for parent, name, layer in found:
            setattr(parent, name, FoldedUpsample(layer))
        yield
    finally:
        for parent, name, layer in found:
            setattr(parent, name, layer)


def is_foldable(layer: nn.Module) -> bool:
    if type(layer) is not Upsample2D or layer.norm is not None or not layer.interpolate:
        return False
    convolution = getattr(layer, "conv", None)
    return type(convolution) is nn.Conv2d and convolution.kernel_size == (3, 3) and convolution.padding == (1, 1)
