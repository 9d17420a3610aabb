"""Voken states -> the nearest picture of an index, and whether to draw instead: GILL's second half (arXiv 2305.17216,
3.2 and 3.3), at the sizes of the model that it is made for.

A picture's embedding comes from EfficientNet-Lite0's features, averaged over its left and its right part. Over the
whole picture they would not say on which side things stand.

Shape letters: B pictures, N pictures of the index, V vokens, H language-model width, E width of a picture's features,
W width of an embedding, F features of the encoder's square grid, Y X rows and columns.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt5.errors import ModelFolderError
from minigpt5.evaluation.frechet import EfficientNetFeatures
from minigpt5.model.weights import load_module, load_tensors, save_module, save_tensors

EMBEDDING_WIDTH = 256
FEATURES_WIDTH = 2 * 1280
SCALE_AT_START = math.log(1 / 0.07)
MAX_SCALE = math.log(100)
RETRIEVAL = "retrieval.safetensors"
INDEX = "index.safetensors"
BATCH_SIZE = 32


class Retrieval(nn.Module):
    """Two linear maps into one space, and a linear decision on what is found there."""

    states_mean: Tensor
    states_spread: Tensor
    features_mean: Tensor
    features_spread: Tensor

    def __init__(self, num_vokens: int, hidden: int, *, width: int = EMBEDDING_WIDTH) -> None:
        super().__init__()
        self.text, self.picture = nn.Linear(num_vokens * hidden, width), nn.Linear(FEATURES_WIDTH, width)
        self.decide = nn.Linear(width + 1, 1)
        self.scale = nn.Parameter(torch.tensor(SCALE_AT_START))
        """Logarithm of what a cosine is multiplied by, as in CLIP (arXiv 2103.00020)."""
        for name, size in (("states", num_vokens * hidden), ("features", FEATURES_WIDTH)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_spread", torch.ones(size))

    def standardise(self, states_BVH: Tensor, features_BE: Tensor) -> None:
        """Take mean and spread of each input from examples."""
        for name, values in (("states", states_BVH.flatten(1)), ("features", features_BE)):
            getattr(self, f"{name}_mean").copy_(values.mean(dim=0))
            getattr(self, f"{name}_spread").copy_(values.std(dim=0).clamp(min=1e-3))

    def embed_states(self, states_BVH: Tensor) -> Tensor:
        """Voken states -> (B, W), each of length 1."""
        return F.normalize(self.text((states_BVH.flatten(1) - self.states_mean) / self.states_spread), dim=-1)

    def embed_features(self, features_BE: Tensor) -> Tensor:
        """Features of pictures -> (B, W), each of length 1."""
        return F.normalize(self.picture((features_BE - self.features_mean) / self.features_spread), dim=-1)

    def contrast(self, texts_BW: Tensor, pictures_BW: Tensor) -> Tensor:
        """InfoNCE both ways over a batch."""
        logits_BB = self.scale.clamp(max=MAX_SCALE).exp() * texts_BW @ pictures_BW.T
        right_B = torch.arange(len(texts_BW), device=logits_BB.device)
        return (F.cross_entropy(logits_BB, right_B) + F.cross_entropy(logits_BB.T, right_B)) / 2

    def decision(self, texts_BW: Tensor, cosines_B: Tensor) -> Tensor:
        """Logits of retrieving the nearest picture, whose cosine is given, rather than drawing: (B,)."""
        return self.decide(torch.cat([texts_BW, cosines_B[:, None]], dim=1))[:, 0]


class PictureIndex:
    """Pictures with their embeddings."""

    def __init__(self, pictures_NYXC: np.ndarray, embeddings_NW: Tensor) -> None:
        self.pictures_NYXC, self.embeddings_NW = pictures_NYXC, embeddings_NW

    def nearest(self, texts_BW: Tensor) -> tuple[Tensor, Tensor]:
        """The position of the nearest picture to each text, and its cosine: (B,) each."""
        cosines_B, places_B = (texts_BW @ self.embeddings_NW.T).max(dim=1)
        return places_B, cosines_B


@torch.no_grad()
def picture_features(pictures: list[np.ndarray], network: EfficientNetFeatures) -> Tensor:
    """Pictures (Y, X, 3) uint8 of one size -> the left and the right part's mean features, (B, E)."""
    batches = []
    for start in range(0, len(pictures), BATCH_SIZE):
        pixels_BCYX = torch.from_numpy(np.stack(pictures[start : start + BATCH_SIZE])).permute(0, 3, 1, 2)
        features_BFD = network.encoder(network.encoder.prepare(pixels_BCYX.float()))
        side = math.isqrt(features_BFD.shape[1])
        grid_BYXD = features_BFD.unflatten(1, (side, side))
        left, right = grid_BYXD[:, :, : side // 2], grid_BYXD[:, :, -(side // 2) :]
        batches.append(torch.cat([left.mean(dim=(1, 2)), right.mean(dim=(1, 2))], dim=1))
    return torch.cat(batches)


def save_retrieval(folder: Path, retrieval: Retrieval, index: PictureIndex) -> None:
    save_module(retrieval, folder / RETRIEVAL)
    pictures = torch.from_numpy(index.pictures_NYXC)
    save_tensors({"pictures": pictures, "embeddings": index.embeddings_NW}, folder / INDEX)


def load_retrieval(folder: Path, *, num_vokens: int, hidden: int) -> tuple[Retrieval, PictureIndex]:
    """Raises ModelFolderError where a file is missing or does not fit."""
    retrieval = Retrieval(num_vokens, hidden)
    load_module(retrieval, folder / RETRIEVAL)
    tensors = load_tensors(folder / INDEX)
    try:
        index = PictureIndex(tensors["pictures"].numpy(), tensors["embeddings"])
    except KeyError as error:
        raise ModelFolderError(f"{folder / INDEX} has no {error}: train it again") from None
    if index.pictures_NYXC.dtype != np.uint8 or len(index.pictures_NYXC) != len(index.embeddings_NW):
        raise ModelFolderError(f"{folder / INDEX} does not have an embedding for each picture: train it again")
    return retrieval.eval(), index
