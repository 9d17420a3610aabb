"""What the installed commands share: one line instead of a traceback where an extra or the default model is missing."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from minigpt5.config import default_model_folder
from minigpt5.errors import ModelFolderError, StorageError

MODULES = {
    "serve": ("ray", "fastapi", "pydantic", "httpx", "tqdm", "starlette", "uvicorn", "aiohttp"),
    "train": ("ray", "deepspeed", "tensorboard"),
    "batch": ("ray",),
}
"""Modules that an extra of pyproject.toml brings."""
JOB_FOLDER = "working_dir_files"
"""Where Ray unpacks what `ray job submit --working-dir` sent."""


@contextlib.contextmanager
def needs_extra(command: str, extra: str, *, modules: tuple[str, ...], ray: str = "Ray") -> Iterator[None]:
    """Exit with 2 where a module of the extra is missing: one of `modules` now, or any of them when it is imported.

    `ray` is what a person calls the part of Ray that the command uses.
    """
    try:
        for module in modules:
            if importlib.util.find_spec(module) is None:
                raise ModuleNotFoundError(name=module)
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in MODULES[extra]:
            raise
        name = ray if missing == "ray" else missing
        print(f"{command} needs {name}: pip install 'minigpt5[{extra}]'", file=sys.stderr)
        raise SystemExit(2) from None


def check_default_model(folder: str | Path) -> None:
    """Raise ModelFolderError where the folder is the default one and is missing, as it is beside an installed wheel."""
    folder = Path(folder)
    if folder == default_model_folder() and not folder.exists():
        raise ModelFolderError(
            f"there is no model in {folder}: clone the repository, which has the storybook model in models/storybook, "
            "and pass --model FOLDER or set MINIGPT5_MODEL; `ray job submit` sends no models, so name a folder that "
            "every node has"
        )


def check_kept(place: str, *, option: str) -> None:
    """Raise StorageError where `place` is a relative path in a submitted job: what it writes there would be lost."""
    is_relative = "://" not in place and not Path(place).expanduser().is_absolute()
    if is_relative and JOB_FOLDER in Path.cwd().parts:
        raise StorageError(
            f"{option} is {place}, but a submitted job runs in a copy of its folder that Ray deletes: give an absolute "
            "path or a URI"
        )


def positive(text: str) -> int:
    """Read a number from 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} but must be 1 or more")
    return number
