"""Picture -> embeddings that the language model reads: a frozen encoder, a Q-Former and a projection.

Shape letters: N pictures, F encoder features, E encoder width, Q queries, H language-model width.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch import Tensor, nn

from minigpt5.base_models import load_tensors
from minigpt5.config import ModelConfig


class PictureEncoder(nn.Module):
    """EfficientNet-Lite0, frozen: pixels -> a grid of features."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(load_tensors(Path(folder)))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> PictureEncoder:
        """Always in evaluation mode: its batch statistics are frozen too."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels_NCYX: Tensor) -> Tensor:
        """(N, 3, 224, 224), scaled as (x - 127) / 128 -> (N, F, E)."""
        return self.network.extract_features(pixels_NCYX).flatten(2).transpose(1, 2)


class QFormer(nn.Module):
    """Learned queries that attend to the encoder's features (arXiv 2301.12597), then a projection to the model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vision = config.vision
        self.features = nn.Sequential(
            nn.LayerNorm(vision.encoder_width), nn.Linear(vision.encoder_width, vision.hidden)
        )
        self.positions = nn.Parameter(0.02 * torch.randn(1, vision.num_features, vision.hidden))
        self.queries = nn.Parameter(torch.randn(1, vision.num_queries, vision.hidden))
        layer = nn.TransformerDecoderLayer(
            vision.hidden,
            vision.num_heads,
            dim_feedforward=4 * vision.hidden,
            dropout=0.0,
            activation="gelu",
            norm_first=True,
            batch_first=True,
        )
        self.layers = nn.TransformerDecoder(layer, vision.num_layers, norm=nn.LayerNorm(vision.hidden))
        self.projection = nn.Linear(vision.hidden, config.hidden)

    def forward(self, features_NFE: Tensor) -> Tensor:
        """(N, F, E) -> (N, Q, H)."""
        memory = self.features(features_NFE) + self.positions
        return self.projection(self.layers(self.queries.expand(len(memory), -1, -1), memory))


class Vision(nn.Module):
    """The whole path."""

    def __init__(self, encoder: PictureEncoder, qformer: QFormer, *, image_px: int) -> None:
        super().__init__()
        self.encoder, self.qformer, self.image_px = encoder, qformer, image_px

    def forward(self, pixels_NYXC: np.ndarray) -> Tensor:
        """uint8 pictures of any one size -> (N, Q, H)."""
        return self.qformer(self.encoder(self.prepare(pixels_NYXC)))

    def prepare(self, pixels_NYXC: np.ndarray) -> Tensor:
        pixels = torch.as_tensor(pixels_NYXC).permute(0, 3, 1, 2).float()
        size = (self.image_px, self.image_px)
        return (nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True) - 127) / 128

    @torch.no_grad()
    def read(self, pictures: list[bytes]) -> Tensor:
        """Encoded pictures (PNG, JPEG) -> (N, Q, H)."""
        side = (self.image_px, self.image_px)
        pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize(side)) for data in pictures]
        return self(np.stack(pixels))
