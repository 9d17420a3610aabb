"""Captions -> the condition, by the text half of diffusers' own pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from minigpt5.model.libraries import load_whole


class PipelineTextEncoder(nn.Module):
    """The frozen text encoders of a pipeline, called as it calls them; "" is what it is guided away from.

    `encode(pipeline, captions)` and `encode_none(pipeline)` give conditions, (B, Q, D) and (1, Q, D).
    """

    def __init__(
        self, pipeline: Any, *, encode: Callable[[Any, list[str]], Tensor], encode_none: Callable[[Any], Tensor]
    ) -> None:
        super().__init__()
        self._pipeline, self._encode, self._encode_none = pipeline, encode, encode_none
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part.eval().requires_grad_(False))

    @torch.no_grad()
    def forward(self, captions: list[str]) -> Tensor:
        """Captions -> (B, Q, D); longer captions are cut."""
        none_1QD = self._encode_none(self._pipeline) if "" in captions else None
        encoded = [none_1QD if caption == "" else self._encode(self._pipeline, [caption]) for caption in captions]
        return torch.cat([one_1QD for one_1QD in encoded if one_1QD is not None])


def load_text_half(pipeline: type[Any], folder: str | Path, *, denoiser: str, left_out: tuple[str, ...] = ()) -> Any:
    """A pipeline without its VAE, its denoiser and the parts `left_out`, as float32."""
    absent = absent_parts(folder) | dict.fromkeys(("vae", denoiser, *left_out))
    encoders = {
        name: load_whole(getattr(transformers, kind), Path(folder) / name, dtype=torch.float32)
        for name, (library, kind) in _parts(folder).items()
        if library == "transformers" and name.startswith("text_encoder") and name not in absent
    }
    return pipeline.from_pretrained(folder, **absent, **encoders)


def absent_parts(folder: str | Path) -> dict[str, None]:
    """The parts that `model_index.json` says a folder goes without. diffusers wants them named."""
    return {name: None for name, part in _parts(folder).items() if part == [None, None]}


def _parts(folder: str | Path) -> dict[str, list[Any]]:
    """Name of each part in `model_index.json` -> its library and class."""
    index = json.loads((Path(folder) / "model_index.json").read_text())
    return {name: part for name, part in index.items() if isinstance(part, list) and len(part) == 2}
