"""`config.json` of a model folder, and the fingerprint that says whether the weights beside it are its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from minigpt5.codec import from_json, to_json
from minigpt5.config import BaseHash, ModelConfig
from minigpt5.errors import ModelFolderError
from minigpt5.model.cache import hash_file
from minigpt5.types import STYLE_FILE, UPSCALING_FOLDER

STYLES = "adapters"
"""Folder of the style adapters, each in a folder of its name."""
DECODER = "decoder"
IP_ADAPTER = "ip_adapter"
"""Folder of what lets the denoiser attend to pictures: see decoders/ip_adapter.py."""
STYLE_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}


def load_config(folder: str | Path) -> ModelConfig:
    """Read and check `config.json`; the weights are not touched. Raises ModelFolderError."""
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ModelFolderError(
            f"{folder} is not a model folder: it has no config.json; name one that training wrote, "
            "on a cluster one that every node has"
        )
    try:
        values = json.loads(path.read_bytes())
        config = from_json(ModelConfig, values)
    except ValueError as error:
        raise ModelFolderError(f"{path} is damaged ({error}): correct it or restore the folder") from error
    if "consistency" not in values and _has_no_unet(folder / config.diffusion):  # a folder of an earlier version
        config = dataclasses.replace(config, consistency="none")
    return _with_adapters(folder, config)


def _has_no_unet(decoder: Path) -> bool:
    """Whether the pipeline in a folder is one that has no UNet; False where it lies elsewhere."""
    return decoder.is_dir() and not (decoder / "unet").is_dir()


def _with_adapters(folder: Path, config: ModelConfig) -> ModelConfig:
    """The config with what the folder holds for its denoiser."""
    return dataclasses.replace(
        config,
        styles=list_styles(folder),
        has_ip_adapter=(folder / IP_ADAPTER).is_dir(),
        upscale=_read_scale(folder / DECODER / UPSCALING_FOLDER),
    )


def _read_scale(folder: Path) -> int:
    """How many times as large a second decoder paints. Raises ModelFolderError where its config does not say it."""
    path = folder / "config.json"
    if not folder.is_dir():
        return 1
    try:
        return int(json.loads(path.read_bytes())["scale"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFolderError(f"{path} is damaged or missing ({error}): restore the folder, or remove it") from error


def list_styles(folder: str | Path) -> tuple[str, ...]:
    """Names of the folder's style adapters, sorted. Raises ModelFolderError where a name is not plain."""
    names = sorted(path.parent.name for path in (Path(folder) / STYLES).glob(f"*/{STYLE_FILE}"))
    for name in names:
        if not STYLE_NAME.fullmatch(name):
            raise ModelFolderError(
                f"{folder}/{STYLES} has a style {name[:80]!r} but a name must be at most 64 letters, digits, - and _: "
                "rename the folder"
            )
    return tuple(names)


def compute_fingerprint(folder: str | Path, bases: Sequence[BaseHash] = ()) -> str:
    """SHA-256 over every weight file's path and content, in order of path, and over the hashes of base models. Adapters
    of the denoiser are left out. A large file that has not changed is not read again: see `hash_file`."""
    folder = Path(folder)
    digest = hashlib.sha256()
    adapters = (folder / STYLES, folder / IP_ADAPTER)  # vokens are the same with and without
    for path in sorted(folder.rglob("*.safetensors")):
        if any(path.is_relative_to(one) for one in adapters):
            continue
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(bytes.fromhex(hash_file(path)))
    for base in bases:  # without their ids: a base may lie elsewhere on another machine
        digest.update(f"{base.sha256}\n".encode())
    return digest.hexdigest()


def check_folder(folder: str | Path) -> ModelConfig:
    """The config of a folder whose weights are those it was saved with. Raises ModelFolderError."""
    folder = Path(folder)
    config = load_config(folder)
    pickles = sorted(path.name for path in folder.rglob("*") if path.suffix in PICKLES)
    if pickles:
        raise ModelFolderError(f"{folder} holds pickled files ({', '.join(pickles)}): convert them to safetensors")
    found = compute_fingerprint(folder, config.bases)
    if found != config.fingerprint:
        raise ModelFolderError(
            f"the weights in {folder} have fingerprint {found[:12]} but config.json says "
            f"{config.fingerprint[:12] or '(none)'}: a file is damaged, missing or foreign; restore the folder"
        )
    return config


def write_config(folder: Path, config: ModelConfig) -> ModelConfig:
    """Write `config.json` with the fingerprint of what is in the folder, and return the config."""
    config = dataclasses.replace(config, fingerprint=compute_fingerprint(folder, config.bases))
    values = to_json(config)
    del values["styles"], values["has_ip_adapter"], values["upscale"]  # the folder's own
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    return _with_adapters(folder, config)
