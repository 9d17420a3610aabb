"""Sets of pictures against each other: FID, Inception Score, and the Frechet distance on EfficientNet features.

Only a distance on Inception-v3's features is an FID. Where these weights are not, the distance on EfficientNet features
compares models with each other; its values are on another scale.

Inception-v3 comes as a graph in an ONNX or OpenVINO file. Such a file holds operations and numbers and runs no Python,
as a pickle would. OpenVINO, which draws here too, computes it. docs/evaluation.md says how to make one.

Shape letters: B pictures, D features, C channels, Y and X rows and columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minigpt5.config import VisionConfig
from minigpt5.errors import BaseModelNotFound, InvalidRequest, ModelFolderError
from minigpt5.model.backends.openvino import core
from minigpt5.model.base_models import load_tensors, resolve

PUBLISHED_PX = 256
"""Side to which the published code brings pictures before Inception-v3."""


class Graph(nn.Module):
    """A network in a file: pictures (B, 3, Y, X) uint8 -> (B, D) float32."""

    def __init__(self, path: str | Path, *, output: int = 0) -> None:
        """`path`: an .onnx file, or an .xml file of OpenVINO with its .bin; `output`: which of its outputs to take.
        Raises BaseModelNotFound, ModelFolderError, Unconvertible."""
        super().__init__()
        if not Path(path).is_file():
            raise BaseModelNotFound(f"there is no file {path}: export Inception-v3 as docs/evaluation.md says")
        try:
            model = core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except RuntimeError as error:
            raise ModelFolderError(f"{path} cannot be read as ONNX or OpenVINO ({error}): export it again") from error
        if not output < len(model.outputs):
            raise ModelFolderError(f"{path} has {len(model.outputs)} outputs, output {output} was asked for")
        self._model, self._output = model, output
        self.num_features = int(model.outputs[output].get_partial_shape()[1].get_length())

    def forward(self, pictures_BCYX: Tensor) -> Tensor:
        return torch.from_numpy(self._model([pictures_BCYX.numpy()])[self._output].copy())


class EfficientNetFeatures(nn.Module):
    """EfficientNet-Lite0's features, averaged over a picture: (B, 3, Y, X) uint8 -> (B, 1280). The weights are one of
    the base models. Raises BaseModelNotFound."""

    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        from minigpt5.model.vision import EfficientNetEncoder

        config = VisionConfig(
            encoder="efficientnet-lite0", encoder_width=1280, num_features=49, hidden=1, num_layers=1, num_heads=1
        )
        self.encoder = EfficientNetEncoder(config)
        self.encoder.network.load_state_dict(load_tensors(resolve("efficientnet-lite0")))

    def forward(self, pictures_BCYX: Tensor) -> Tensor:
        return self.encoder(self.encoder.prepare(pictures_BCYX.float())).mean(1)


def extract(
    pictures: Sequence[np.ndarray], network: nn.Module, *, batch_size: int = 16, px: int | None = None
) -> Tensor:
    """Pictures (Y, X, 3) uint8 -> their features (B, D). `px`: bring all to this side first, bilinearly; without it
    they must be of one size."""
    if not len(pictures):
        raise InvalidRequest("pictures", "there are no pictures: give at least one")
    batches = []
    for start in range(0, len(pictures), batch_size):
        batch = [_to_uint8(one, px) for one in pictures[start : start + batch_size]]
        if len({one.shape for one in batch}) > 1:
            raise InvalidRequest(
                "pictures", f"pictures of sizes {sorted({tuple(one.shape[1:]) for one in batch})}: give px"
            )
        batches.append(network(torch.stack(batch)).float())
    return torch.cat(batches)


def _to_uint8(picture: np.ndarray, px: int | None) -> Tensor:
    pixels_CYX = torch.from_numpy(picture.copy()).permute(2, 0, 1)
    if px is None:
        return pixels_CYX
    resized = nn.functional.interpolate(pixels_CYX[None].float(), size=(px, px), mode="bilinear", antialias=True)
    return resized[0].round().clamp(0, 255).byte()


class _Given(nn.Module):
    """Stands for the network where torchmetrics is given features instead of pictures."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features_BD: Tensor) -> Tensor:
        return features_BD


def frechet_distance(features_BD: Tensor, other_BD: Tensor) -> float:
    """Frechet distance between the Gaussians of two sets of features, each of at least two, by torchmetrics in double
    precision: |mean - mean'|^2 + trace(cov + cov' - 2 (cov cov')^1/2)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(len(features_BD), len(other_BD)) < 2:
        raise InvalidRequest(
            "pictures", f"{len(features_BD)} and {len(other_BD)} pictures: at least two of each needed"
        )
    metric = FrechetInceptionDistance(feature=_Given(features_BD.shape[1]))
    metric.update(features_BD.double(), real=True)
    metric.update(other_BD.double(), real=False)
    return float(metric.compute())


def fid(
    drawn: Sequence[np.ndarray], true: Sequence[np.ndarray], inception: nn.Module, *, px: int | None = PUBLISHED_PX
) -> float:
    """FID; `inception` gives Inception-v3's 2048 features. `px`: None as torchmetrics, 256 as published."""
    return frechet_distance(extract(true, inception, px=px), extract(drawn, inception, px=px))


def in_their_span(features_BD: Tensor) -> Tensor:
    """Features in the space that they span, (B, R) with R at most B, in double precision: a Frechet distance between
    parts of them does not change, and takes much less time where they are fewer than their dimensions."""
    features_BD = features_BD.double()
    if features_BD.shape[0] >= features_BD.shape[1]:
        return features_BD
    _, _, basis_RD = torch.linalg.svd(features_BD, full_matrices=False)
    return features_BD @ basis_RD.T


def story_fid_published(
    drawn: Sequence[Sequence[np.ndarray]], true: Sequence[Sequence[np.ndarray]], inception: nn.Module
) -> float:
    """Mean over stories of the FID between a story's own pictures, at most five of each: the published code's
    "task-level" FID on VIST. A story of one picture is left out, as there; raises InvalidRequest if all are."""
    scores = []
    for one, other in zip(drawn, true, strict=True):
        if len(one) > 1:
            features_BD = in_their_span(extract([*one, *other], inception, px=PUBLISHED_PX))
            scores.append(frechet_distance(features_BD[len(one) :], features_BD[: len(one)]))
    if not scores:
        raise InvalidRequest("drawn", f"none of {len(drawn)} stories has two pictures: this FID needs two of each")
    return float(np.mean(scores))


def inception_score(
    drawn: Sequence[np.ndarray], inception: nn.Module, *, splits: int = 10, px: int | None = None
) -> tuple[float, float]:
    """Inception Score: mean and standard deviation over `splits` random parts, by torchmetrics; `inception` gives the
    1008 logits without the bias. Reproducible with torch.manual_seed: the parts are random."""
    return inception_score_of(extract(drawn, inception, px=px), splits=splits)


def inception_score_of(logits_BD: Tensor, *, splits: int = 10) -> tuple[float, float]:
    """As `inception_score`, of logits that were extracted before."""
    from torchmetrics.image.inception import InceptionScore

    if len(logits_BD) < splits or splits < 2:
        raise InvalidRequest(
            "drawn", f"{len(logits_BD)} pictures in {splits} parts: at least two parts of one picture each"
        )
    with warnings.catch_warnings():  # torchmetrics warns that it keeps the logits
        warnings.simplefilter("ignore", UserWarning)
        metric = InceptionScore(feature=_Given(logits_BD.shape[1]), splits=splits)
    metric.update(logits_BD)
    mean, std = metric.compute()
    return float(mean), float(std)


def efficientnet_distance(
    drawn: Sequence[np.ndarray], true: Sequence[np.ndarray], network: nn.Module | None = None
) -> float:
    """Frechet distance on EfficientNet-Lite0 features. It is not an FID."""
    features = network or EfficientNetFeatures()
    return frechet_distance(extract(true, features), extract(drawn, features))
