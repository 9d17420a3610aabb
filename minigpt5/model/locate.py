"""Names -> folders of this machine: model folders by path, URI or hub id, and the parts that their configs name."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt5.codec import from_json
from minigpt5.config import ModelConfig
from minigpt5.errors import BaseModelNotFound, ModelFolderError, StorageError
from minigpt5.model.base_models import is_hub_id, pin, resolve
from minigpt5.model.cache import hash_weights, keep_in_cache
from minigpt5.model.folder_config import PICKLES, check_folder

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

COPIED_BYTES = 2**24
"""Bytes of a fetched file that are held at once."""
FINGERPRINT = re.compile("[0-9a-f]{64}")


def locate(model: str | Path) -> Path:
    """A model folder by its path, its URI or its hub id (owner/name, owner/name@revision), as a folder of this machine.

    What is not here is fetched once, into the user's cache, by one process at a time. Raises ModelFolderError.
    """
    name = str(model)
    if "://" in name:
        return fetch_folder(name)
    path = Path(name).expanduser().absolute()
    if path.is_dir() or not is_hub_id(name):
        return path
    try:
        return resolve(name)
    except BaseModelNotFound as error:
        raise ModelFolderError(f"there is no model folder {path}, and no model {name} on the hub: {error}") from None


def shared_name(model: str | Path) -> str:
    """The name by which every machine of a cluster can `locate` the same model: a path is made absolute, and a hub id
    gets its revision. Raises ModelFolderError."""
    path = Path(model).expanduser().absolute()
    if path.is_dir():
        return str(path)
    return pin(str(model), locate(model)) if is_hub_id(str(model)) else str(model)


def fetch_folder(uri: str) -> Path:
    """The model folder at a URI, copied into the cache under its fingerprint. Raises ModelFolderError."""
    import pyarrow as pa
    from pyarrow import fs

    from minigpt5.storage import open_place, read_whole

    try:
        files, path = open_place(uri.rstrip("/"))
        if files.type_name == "local":
            return Path(path)
        raw = read_whole(files, f"{path}/config.json")
        if raw is None:
            raise ValueError("it has no config.json")
        config = from_json(ModelConfig, json.loads(raw))
        if not FINGERPRINT.fullmatch(config.fingerprint):
            raise ValueError(f"its fingerprint is {config.fingerprint[:80]!r}")

        def fill(target: Path) -> None:
            for info in files.get_file_info(fs.FileSelector(path, recursive=True)):
                place = target / info.path[len(path) :].lstrip("/")
                if ".." in place.parts:  # a store's keys may hold any text
                    raise ValueError(f"it has a file named {info.path[:200]!r}")
                if not info.is_file or place.suffix in PICKLES:
                    continue
                place.parent.mkdir(parents=True, exist_ok=True)
                _copy(files, info.path, place)
            check_folder(target)  # it may be written at this moment

        # A changed config, which the fingerprint does not hold, is another folder.
        return keep_in_cache(f"models/{config.fingerprint}-{hashlib.sha256(raw).hexdigest()[:12]}", fill)
    except (OSError, ValueError, StorageError, pa.ArrowException) as error:
        raise ModelFolderError(f"{uri} cannot be read as a model folder: {error}") from error


def _copy(files: FileSystem, path: str, place: Path) -> None:
    with files.open_input_stream(path, compression=None) as stream, place.open("wb") as file:
        shutil.copyfileobj(stream, file, COPIED_BYTES)


def find_part(folder: str | Path, config: ModelConfig, name: str) -> Path:
    """The folder of a part that a config names: inside the model folder, else a base model.

    Raises BaseModelNotFound, and ModelFolderError where the base model is not the one that the folder was made with.
    """
    if contains(folder, name):
        return Path(folder) / name
    found = resolve(name)
    if config.bases and name not in {base.id for base in config.bases}:
        raise ModelFolderError(f"{name} is not among the bases of {folder}/config.json: correct its id there too")
    for base in config.bases:
        if base.id == name and (digest := hash_weights(found)) != base.sha256:
            raise ModelFolderError(
                f"the weights of base model {name} have the hash {digest[:12]} but {folder} was made with "
                f"{base.sha256[:12]}: name the revision that it was made with, as in owner/name@revision"
            )
    return found


def contains(folder: str | Path, name: str) -> bool:
    """Tell whether a part is inside a model folder, and no base model."""
    local = Path(folder) / name
    return bool(name) and local.is_dir() and local.resolve().is_relative_to(Path(folder).resolve())


def check_bases(folder: str | Path, config: ModelConfig) -> None:
    """Find all base models that writing and drawing need. Raises as `find_part` does."""
    for name in (config.language_model, config.vision.encoder, config.diffusion):
        if name:
            find_part(folder, config, name)
