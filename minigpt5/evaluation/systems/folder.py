"""The folder of a rival: `config.json` says which system it is, `model/` is a model folder with its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

from minigpt5.codec import to_json
from minigpt5.model.decoders.upscaling import encode_alike
from minigpt5.model.folder_config import load_config, write_config
from minigpt5.types import DISTILLED_FOLDER, UPSCALING_FOLDER, DrawSettings

MODEL = "model"
CONFIG = "config.json"


def save_system(folder: Path, system: str, model: Path, *, decoder: Path | None = None) -> None:
    """Write the folder of `system` with a copy of the model folder `model`. `decoder`: parts of a diffusion model, in
    diffusers' layout, that take the place of the model's own. Raises ModelFolderError, FileExistsError."""
    shutil.copytree(model, folder / MODEL)
    config = load_config(folder / MODEL)
    if decoder:
        for part in (path for path in sorted(decoder.iterdir()) if path.is_dir()):
            place = folder / MODEL / config.diffusion / part.name
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(part, place)
        known, new = model / config.diffusion / "vae", decoder / "vae"
        if new.is_dir() and not (decoder / UPSCALING_FOLDER).is_dir() and not encode_alike(new, known):
            shutil.rmtree(folder / MODEL / config.diffusion / UPSCALING_FOLDER, ignore_errors=True)
        if not (decoder / DISTILLED_FOLDER).is_dir():  # the model's own was distilled from another denoiser
            shutil.rmtree(folder / MODEL / config.diffusion / DISTILLED_FOLDER, ignore_errors=True)
            config = dataclasses.replace(config, draw_distilled=None, prefers_distilled=False)
        config = write_config(folder / MODEL, config)
    write_system(folder, system, draw=config.draw)


def write_system(folder: Path, system: str, *, draw: DrawSettings) -> None:
    """Write `config.json` of a folder whose `model/` and files beside it are there."""
    config = load_config(folder / MODEL)
    values = {
        "system": system,
        "name": system,
        "version": _version(folder, config.fingerprint),
        "reads_pictures": config.vision.family != "none",
        "sampling": to_json(config.sampling),
        "draw": to_json(draw),
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def _version(folder: Path, fingerprint: str) -> str:
    """The model's fingerprint; where files lie beside `model/`, such as a picture index, a hash of all."""
    beside = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != CONFIG]
    if not beside:
        return fingerprint
    hashes = [fingerprint, *(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in beside)]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()
