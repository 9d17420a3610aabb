"""How far pictures are apart for EfficientNet-Lite0, a frozen network that saw photographs alone.

The idea is that of perceptual losses (arXiv 1603.08155), in the form of LPIPS without its learnt heads (arXiv
1801.03924). LPIPS itself, whose network is another one, judges what was trained with this, and trains nothing.

Shape letters: B pictures, C channels, Y X rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minigpt5.evaluation.frechet import EfficientNetFeatures

SEEN_AFTER = (0, 2, 4)
"""Blocks whose outputs are compared, beside the stem's: 1/2, 1/4 and 1/8 of a side."""


class FeatureLoss(nn.Module):
    """Raises BaseModelNotFound where the network's weights are not installed."""

    def __init__(self) -> None:
        super().__init__()
        self.network = EfficientNetFeatures().encoder.requires_grad_(False).network

    def train(self, mode: bool = True) -> FeatureLoss:
        """Always in evaluation mode: its batch statistics are frozen too."""
        return super().train(False)

    def forward(self, drawn_BCYX: Tensor, true_BCYX: Tensor) -> Tensor:
        """Pictures in [-1, 1] -> the mean squared distance of their features, each of length 1."""
        with torch.no_grad():
            true = self._features(true_BCYX)
        distances = [
            (one - other).square().sum(1).mean() for one, other in zip(self._features(drawn_BCYX), true, strict=True)
        ]
        return torch.stack(distances).mean()

    def _features(self, pictures_BCYX: Tensor) -> list[Tensor]:
        network = self.network
        x_BCYX = network._swish(network._bn0(network._conv_stem(pictures_BCYX)))
        found = [x_BCYX]
        for index, block in enumerate(network._blocks[: SEEN_AFTER[-1] + 1]):
            x_BCYX = block(x_BCYX)
            found += [x_BCYX] if index in SEEN_AFTER else []
        return [one * one.square().sum(1, keepdim=True).add(1e-10).rsqrt() for one in found]
