"""Models, configs and tokenizers of transformers and diffusers in a folder: from safetensors alone, whole, and without
running code that lies in the folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from minigpt5.errors import ModelFolderError

NUM_NAMED = 4
"""Weights that an error names."""


@contextmanager
def _without_foreign_code(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "custom code" not in str(error):
            raise
        raise ModelFolderError(
            f"{folder} needs code of its own, which is never run: name a model whose classes transformers has"
        ) from error


def load_whole(kind: Any, folder: str | Path, *, may_lack: tuple[str, ...] = (), **options: Any) -> Any:
    """A model of transformers or diffusers, of the class `kind`. `may_lack`: parts of names of weights that nothing
    here reads.

    Raises ModelFolderError where the folder lacks weights: both libraries fill them with random numbers, others each
    time.
    """
    try:
        model, found = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    except SafetensorError as error:
        raise ModelFolderError(f"the weights in {folder} cannot be read ({error}): restore them") from error
    missing = sorted(name for name in found["missing_keys"] if not any(part in name for part in may_lack))
    if missing:
        more = f" and {len(missing) - NUM_NAMED} more" if len(missing) > NUM_NAMED else ""
        raise ModelFolderError(
            f"{folder} lacks the weights {', '.join(missing[:NUM_NAMED])}{more}: restore them, or name a whole model"
        )
    return model


def load_auto(kind: Any, folder: str | Path, *, may_lack: tuple[str, ...] = (), **options: Any) -> Any:
    """As `load_whole`, by one of transformers' `Auto` classes."""
    with _without_foreign_code(folder):
        return load_whole(kind, folder, may_lack=may_lack, trust_remote_code=False, **options)


def load_base_config(folder: str | Path) -> Any:
    """transformers' config. Raises ModelFolderError."""
    with _without_foreign_code(folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_base_tokenizer(folder: str | Path) -> Any:
    """transformers' tokenizer. Raises ModelFolderError where the folder has none: transformers makes an empty one."""
    with _without_foreign_code(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.encode("A fox in the snow", add_special_tokens=False):
        raise ModelFolderError(
            f"{folder} has no tokenizer (the one that was made of its files has {len(tokenizer)} tokens and reads no "
            "word): copy the base model's tokenizer.json and tokenizer_config.json beside its weights"
        )
    return tokenizer


def load_image_processor(folder: str | Path) -> Any:
    """transformers' image processor, the one that needs no torchvision. Raises ModelFolderError."""
    with _without_foreign_code(folder):
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
