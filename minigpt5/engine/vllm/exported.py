"""What an exported folder says of itself, beside transformers' files: `minigpt5/export.json` and its tensors.

Shape letters: H hidden width, V vokens of a picture, N states.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from minigpt5.codec import from_json, to_json
from minigpt5.config import ModelConfig
from minigpt5.engine.vllm.settings import Dtype
from minigpt5.errors import ModelFolderError

PART = "minigpt5"
NormKind = Literal["rms", "layer"]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """`minigpt5/export.json`."""

    fingerprint: str
    """Of the model folder that it was made of."""
    dtype: Dtype
    num_layers: int
    norm: NormKind
    eps: float
    check_ids: tuple[int, ...]
    """Token ids whose last states, one for each voken, the check has."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FinalNorm:
    """The norm after the last layer: vLLM gives states as they are before it."""

    kind: NormKind
    eps: float
    weight_H: np.ndarray
    bias_H: np.ndarray

    def __call__(self, states_NH: np.ndarray) -> np.ndarray:
        """(N, H) float32 -> the same."""
        if self.kind == "layer":
            states_NH = states_NH - states_NH.mean(axis=-1, keepdims=True)
        scale_N1 = 1 / np.sqrt(np.square(states_NH).mean(axis=-1, keepdims=True) + self.eps)
        return (states_NH * scale_N1 * self.weight_H + self.bias_H).astype(np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Export:
    """All that the backend reads of a folder, besides what vLLM reads."""

    about: Exported
    norm: FinalNorm
    check_VH: np.ndarray
    """States of the check by the torch engine in float32, after the final norm."""

    def save(self, folder: Path) -> None:
        (folder / PART).mkdir()
        (folder / PART / "export.json").write_text(json.dumps(to_json(self.about), indent=2) + "\n")
        tensors = {"check": self.check_VH, "norm_weight": self.norm.weight_H, "norm_bias": self.norm.bias_H}
        (folder / PART / "states.safetensors").write_bytes(save(tensors))


def load_export(folder: str | Path, config: ModelConfig) -> Export:
    """What `export` wrote of the model of `config`. Raises ModelFolderError where it is another one's, or damaged."""
    part = Path(folder) / PART
    if not (part / "export.json").is_file():
        raise ModelFolderError(
            f"{folder} has no {PART}/export.json: make it with python -m minigpt5.engine.vllm.export MODEL FOLDER"
        )
    try:
        about = from_json(Exported, json.loads((part / "export.json").read_bytes()))
        tensors = load((part / "states.safetensors").read_bytes())
        norm = FinalNorm(kind=about.norm, eps=about.eps, weight_H=tensors["norm_weight"], bias_H=tensors["norm_bias"])
        found = Export(about=about, norm=norm, check_VH=tensors["check"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelFolderError(f"{part} is damaged ({error}): export the model again") from error
    if about.fingerprint != config.fingerprint:
        raise ModelFolderError(
            f"{folder} was exported of model {about.fingerprint[:12]} but {config.name} is {config.fingerprint[:12]}: "
            "export it again"
        )
    if found.check_VH.shape != (config.num_vokens, config.hidden):
        raise ModelFolderError(f"{part} has a check of shape {found.check_VH.shape}: export the model again")
    return found
