"""Folder -> its family of latent diffusion models, by `model_index.json`.

Every module beside this one may hold a family: a new family is one new file.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from minigpt5.errors import ModelFolderError
from minigpt5.model import decoders, libraries
from minigpt5.model.decoders.diffusion import Diffusion, load_part, read_config
from minigpt5.model.decoders.stable_diffusion import StableDiffusion
from minigpt5.model.weights import load_quietly

INDEX = "model_index.json"
"""The file in which diffusers names a folder's pipeline."""


def families() -> dict[str, type[Diffusion]]:
    """The families by the pipelines that diffusers draws their folders with."""
    for module in pkgutil.iter_modules(decoders.__path__):
        importlib.import_module(f"{decoders.__name__}.{module.name}")
    return {
        pipeline: family
        for family in _with_subclasses(Diffusion.__subclasses__())
        for pipeline in getattr(family, "PIPELINES", ())
    }


def _with_subclasses(families: list[type[Diffusion]]) -> list[type[Diffusion]]:
    return [one for family in families for one in (family, *_with_subclasses(family.__subclasses__()))]


def find_family(folder: str | Path) -> type[Diffusion]:
    """The family of a folder; one without `model_index.json` is a Stable Diffusion's parts. Raises ModelFolderError."""
    index = Path(folder) / INDEX
    if not index.is_file():
        return StableDiffusion
    pipeline = str(json.loads(index.read_text()).get("_class_name"))
    known = families()
    if pipeline not in known:
        raise ModelFolderError(f"{folder} is drawn by diffusers' {pipeline}: name a folder of {', '.join(known)}")
    return known[pipeline]


def load_diffusion(folder: str | Path, *, has_denoiser: bool = True, distilled: str | Path | None = None) -> Diffusion:
    """Read a folder in diffusers' layout as float32. Without `has_denoiser`, only the VAE's weights are read, and the
    denoiser stays on the meta device. `distilled`: see `Diffusion.from_folders`. Raises ModelFolderError."""
    load_quietly()
    family, folder = find_family(folder), Path(folder)
    if has_denoiser:
        return family.from_folders(vae=folder, denoiser=folder, distilled=distilled)
    return family(load_part(folder, "vae"), _sketch(folder / family.DENOISER), family.load_noise(folder))


def sketch_diffusion(folder: Path) -> Diffusion:
    """The model that `load_diffusion` would read, on the meta device, from config files alone."""
    family = find_family(folder)
    return family(_sketch(folder / "vae"), _sketch(folder / family.DENOISER), family.load_noise(folder))


def sketch_text_encoder(folder: Path) -> nn.Module:
    """The text encoders of a folder on the meta device, from config files alone."""
    parts = []
    for path in sorted(folder.glob("text_encoder*")):
        config = libraries.load_base_config(path)
        model = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            parts.append(model(config) if model else transformers.AutoModel.from_config(config))
    return nn.ModuleList(parts)


def _sketch(path: Path) -> Any:
    model: Any = getattr(diffusers, str(read_config(path)["_class_name"]))
    with torch.device("meta"):
        return model.from_config(model.load_config(path))
