"""A base model's own quantised weights: `quantised.safetensors`, beside the float32 weights that they stand for.

For a matrix NAME of O rows and I columns, by its name in the float32 file, it holds:

    NAME.codes    uint8 (O, I / 2)     two 4-bit codes in a byte, the first column's in the low half
    NAME.scales   float16 (O, I / 32)  one for each group of 32 columns
    NAME.minima   float16 (O, I / 32)

A weight is `scale * code + minimum`, which is what GGUF's Q4_1 blocks say (Q4_0: the minimum is -8 scales). A matrix
that is not in the file is read from the float32 weights. Any base model's folder may carry such a file. Its metadata
has `weights_sha256`, the hash of the float32 weights by `cache.hash_weights`: codes of other weights are left alone.

Shape letters: O outputs, I inputs, K groups of 32 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigpt5.errors import ModelFolderError
from minigpt5.model.cache import QUANTISED, hash_weights
from minigpt5.model.weights import load_metadata, load_tensors, save_tensors

GROUP = 32
"""Columns that share a scale and a minimum."""
WEIGHTS_SHA256 = "weights_sha256"


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """A matrix of 4-bit codes."""

    codes_OI: Tensor
    """uint8, 0 to 15."""
    scales_OK: Tensor
    minima_OK: Tensor

    def dequantise(self) -> Tensor:
        """The weights in float32: (O, I)."""
        codes_OKG = self.codes_OI.float().unflatten(1, (-1, GROUP))
        return (self.scales_OK.float()[..., None] * codes_OKG + self.minima_OK.float()[..., None]).flatten(1)


def save_codes(matrices: dict[str, Codes], folder: Path) -> None:
    """Write the quantised matrices of a base model into its folder, beside the float32 weights that they stand for."""
    tensors = {}
    for name, matrix in matrices.items():
        low, high = matrix.codes_OI[:, 0::2], matrix.codes_OI[:, 1::2]
        tensors[f"{name}.codes"] = low | high << 4
        tensors[f"{name}.scales"], tensors[f"{name}.minima"] = matrix.scales_OK, matrix.minima_OK
    save_tensors(tensors, folder / QUANTISED, metadata={WEIGHTS_SHA256: hash_weights(folder)})


def has_codes(folder: Path) -> bool:
    """Whether a base model's folder carries quantised weights that stand for its float32 ones.

    Raises ModelFolderError where the file is damaged.
    """
    path = folder / QUANTISED
    return path.is_file() and load_metadata(path).get(WEIGHTS_SHA256) == hash_weights(folder)


def load_codes(folder: Path) -> dict[str, Codes]:
    """Read the quantised matrices of a base model's folder that `has_codes`. Raises ModelFolderError where the file is
    damaged."""
    tensors = load_tensors(folder / QUANTISED)
    matrices = {}
    for name in sorted(key.removesuffix(".codes") for key in tensors if key.endswith(".codes")):
        try:
            packed, scales, minima = (tensors[f"{name}.{part}"] for part in ("codes", "scales", "minima"))
        except KeyError as error:
            raise ModelFolderError(
                f"{folder / QUANTISED} has no {error.args[0]}: convert the base model again"
            ) from error
        rows, columns = len(packed), 2 * packed.shape[1]
        if scales.shape != minima.shape or scales.shape != (rows, columns // GROUP):
            raise ModelFolderError(
                f"{folder / QUANTISED}: {name} has {rows} x {columns} codes but {tuple(scales.shape)} scales and "
                f"{tuple(minima.shape)} minima: a group is {GROUP} columns"
            )
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
        matrices[name] = Codes(codes_OI=codes, scales_OK=scales, minima_OK=minima)
    return matrices


def read_gguf(path: Path, names: dict[str, str], *, num_heads: int, num_key_heads: int) -> dict[str, Codes]:
    """The Q4_1 matrices of a GGUF file of the Llama architecture. `names`: GGUF's name -> the name in the float32 file.

    GGUF keeps the two halves of a query's and a key's rotary pairs side by side; here they lie as transformers has
    them.
    """
    from gguf import GGMLQuantizationType, GGUFReader

    matrices = {}
    for tensor in GGUFReader(path).tensors:
        if tensor.tensor_type != GGMLQuantizationType.Q4_1 or tensor.name not in names:
            continue
        matrix = _read_blocks(tensor)
        heads = {"attn_q": num_heads, "attn_k": num_key_heads}.get(tensor.name.split(".")[-2])
        if heads:
            order = torch.arange(len(matrix.codes_OI)).view(heads, -1, 2).transpose(1, 2).flatten()
            matrix = Codes(
                codes_OI=matrix.codes_OI[order], scales_OK=matrix.scales_OK[order], minima_OK=matrix.minima_OK[order]
            )
        matrices[names[tensor.name]] = matrix
    return matrices


def _read_blocks(tensor: Any) -> Codes:
    """A block: scale and minimum in float16, then 16 bytes with columns 0 to 15 in their low halves and 16 to 31 in
    their high ones."""
    blocks = np.array(tensor.data).view(np.uint8).reshape(int(tensor.shape[1]), -1, 20)
    halves = blocks[..., :4].copy().view(np.float16)
    codes = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1).reshape(len(blocks), -1)
    scales, minima = (torch.from_numpy(halves[..., part].copy()) for part in (0, 1))
    return Codes(codes_OI=torch.from_numpy(codes), scales_OK=scales, minima_OK=minima)
