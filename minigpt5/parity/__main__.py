"""A folder against its own library: `python -m minigpt5.parity FOLDER`.

FOLDER is a language model of transformers, a text-to-image model of diffusers, or a model folder of ours, which has
both as bases. It prints the deviations, and ends with 0 where all of them are within their bounds.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from minigpt5.errors import MiniGPT5Error, ModelFolderError


def compare(name: str, *, steps: int, seed: int, save: str | None) -> bool:
    """Compare what `name` holds, by its files. Raises ModelFolderError where it is neither kind of model."""
    from minigpt5.model.base_models import resolve

    folder = Path(name) if Path(name).is_dir() else resolve(name)
    if (folder / "model_index.json").is_file():
        return _compare_pictures(folder, steps=steps, seed=seed, save=save)
    config = _read_config(folder)
    if "model_type" in config:
        from minigpt5.parity.text import compare_base

        return compare_base(folder)
    if "language_model" in config:
        return _compare_model_folder(folder, steps=steps, seed=seed, save=save)
    raise ModelFolderError(
        f"{folder} has no model_index.json of diffusers, and no config.json of transformers or of a model folder"
    )


def _compare_model_folder(folder: Path, *, steps: int, seed: int, save: str | None) -> bool:
    """Both bases, and the folder's own vokens."""
    from minigpt5.model.folder_config import check_folder
    from minigpt5.model.locate import find_part
    from minigpt5.parity.text import compare_base, compare_vokens

    config = check_folder(folder)
    results = [compare_base(find_part(folder, config, config.language_model)), compare_vokens(folder)]
    diffusion = find_part(folder, config, config.diffusion)
    return all([*results, _compare_pictures(diffusion, steps=steps, seed=seed, save=save)])


def _compare_pictures(folder: Path, *, steps: int, seed: int, save: str | None) -> bool:
    from minigpt5.parity import pictures

    return pictures.compare(folder, steps=steps, seed=seed, save=Path(save).expanduser() if save else None)


def _read_config(folder: Path) -> dict[str, object]:
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ModelFolderError(f"{path} is no JSON ({error})") from error
    return found if isinstance(found, dict) else {}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minigpt5.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", help="a folder or a hub id")
    parser.add_argument("--steps", type=int, default=6, help="denoising steps of the compared pictures (default 6)")
    parser.add_argument("--seed", type=int, default=5, help="seed of the compared pictures (default 5)")
    parser.add_argument("--save", metavar="FILE", help="a safetensors file for our first latents, as `latents`")
    options = parser.parse_args(arguments)
    try:
        is_equal = compare(options.folder, steps=options.steps, seed=options.seed, save=options.save)
    except MiniGPT5Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
