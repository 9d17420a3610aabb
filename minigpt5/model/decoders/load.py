"""Folder -> its family of latent diffusion models, by `model_index.json`.

Every module beside this one may hold a family: a new family is one new file.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path

from minigpt5.errors import ModelFolderError
from minigpt5.model import decoders
from minigpt5.model.decoders.diffusion import Diffusion
from minigpt5.model.decoders.stable_diffusion import StableDiffusion


def families() -> dict[str, type[Diffusion]]:
    """The families by the pipelines that diffusers draws their folders with."""
    for module in pkgutil.iter_modules(decoders.__path__):
        importlib.import_module(f"{decoders.__name__}.{module.name}")
    return {
        pipeline: family
        for family in _subclasses(Diffusion)  # type: ignore[type-abstract]
        for pipeline in getattr(family, "PIPELINES", ())
    }


def _subclasses(family: type[Diffusion]) -> list[type[Diffusion]]:
    return [one for child in family.__subclasses__() for one in (child, *_subclasses(child))]


def find_family(folder: str | Path) -> type[Diffusion]:
    """The family of a folder; one without `model_index.json` is a Stable Diffusion's parts. Raises ModelFolderError."""
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        return StableDiffusion
    pipeline = str(json.loads(index.read_text()).get("_class_name"))
    known = families()
    if pipeline not in known:
        raise ModelFolderError(f"{folder} is drawn by diffusers' {pipeline}: name a folder of {', '.join(known)}")
    return known[pipeline]


def load_diffusion(folder: str | Path) -> Diffusion:
    """Read a folder in diffusers' layout as float32. Raises ModelFolderError."""
    return find_family(folder).from_pretrained(folder)
