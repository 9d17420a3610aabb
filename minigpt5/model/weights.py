"""A module's tensors in a safetensors file."""

from __future__ import annotations

import importlib
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt5.errors import ModelFolderError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


NOT_NEEDED = "requires torchvision"
"""In what transformers says where diffusers imports an image processor, which nothing here uses."""


def load_quietly() -> None:
    """Keep out of every log what says nothing there: the progress bars of transformers and diffusers, of those that are
    imported, and transformers' hint to install torchvision."""
    logging.getLogger("transformers.utils.import_utils").addFilter(_is_needed)
    for library in ("transformers", "diffusers"):
        if library in sys.modules:
            importlib.import_module(f"{library}.utils.logging").disable_progress_bar()


def _is_needed(record: logging.LogRecord) -> bool:
    return NOT_NEEDED not in record.getMessage()


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The type of the largest tensor in a folder's weights; float32 where that is no floating-point type.

    Weights that are loaded as this type are not copied: they lie in the mapped file, whose pages all processes of a
    machine share. Raises ModelFolderError.
    """
    import safetensors
    import torch

    known = {"BF16": torch.bfloat16, "F16": torch.float16}
    path = next(iter(sorted(Path(folder).glob("*.safetensors"))), None)
    if path is None:
        return torch.float32
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
            largest = max(slices, key=lambda one: math.prod(one.get_shape()))
            return known.get(largest.get_dtype(), torch.float32)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelFolderError(f"{path} cannot be read ({error}): restore it") from error


def load_module(module: nn.Module, path: Path) -> None:
    """Fill a module from a file that must hold exactly its tensors. Raises ModelFolderError."""
    import safetensors
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelFolderError(f"{path} cannot be read ({error}): restore the model folder") from error
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != found:
        different = sorted(set(expected.items()) ^ set(found.items()))[:4]
        raise ModelFolderError(f"{path} does not fit config.json: {different}; restore the model folder")
    module.load_state_dict({name: value.float() for name, value in weights.items()})


def save_module(module: nn.Module, path: Path) -> None:
    """Write a module's tensors as float16."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().half().contiguous() for name, value in module.state_dict().items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file's tensors as they are. Raises ModelFolderError."""
    import safetensors
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelFolderError(f"{path} cannot be read ({error}): make the folder again") from error


def load_metadata(path: Path) -> dict[str, str]:
    """Read what a file says beside its tensors. Raises ModelFolderError."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelFolderError(f"{path} cannot be read ({error}): make the folder again") from error


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as they are."""
    from safetensors.torch import save_file

    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path, metadata)
