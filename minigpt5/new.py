"""A model folder from base models: `python -m minigpt5.new --language BASE --diffusion BASE --out FOLDER`.

A BASE is a folder or a hub id, which may name a revision (owner/name@revision). Base models are read and never written:
the new folder names them, with the hashes of their weights, and holds what training will change. With --dry-run only
their config files are read, and nothing is written: sizes and memory are known before any weights are downloaded.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from minigpt5.combine import Parts, combine, sketch
from minigpt5.config import TemplateName
from minigpt5.errors import MiniGPT5Error, ModelFolderError
from minigpt5.footprint import report
from minigpt5.model.base_models import find_ip_adapter
from minigpt5.model.base_sizes import DEFAULT_CONTEXT
from minigpt5.model.decoders.ip_adapter import ENCODER, WEIGHTS
from minigpt5.model.folder_config import IP_ADAPTER


def make_folder(
    out: str | Path,
    *,
    language: str,
    diffusion: str,
    vision: str | None = None,
    image_px: int | None = None,
    context_tokens: int | None = None,
    condition_length: int | None = None,
    template: TemplateName | None = None,
    ip_adapter: str | None = None,
) -> Parts:
    """Write a model folder that names its base models, and return the model.

    `vision`: a tower, "own" for that of a vision-language model, or "none"; without it, "own" where there is one.
    `image_px`: side of the pictures that "own" reads. `condition_length`: positions of a condition, without the vector;
    by default as many as the pipeline reads. `template`: by default "chat" where the tokenizer has a chat
    template. `ip_adapter`: what `find_ip_adapter` takes; it is copied into the folder. The language model, the denoiser
    and the vision tower are each run once. Raises ModelFolderError where a base model or the adapter does not fit or
    `out` is taken, BaseModelNotFound where it is not there.
    """
    from minigpt5.model import folder as model_folder

    out = Path(out).expanduser().absolute()
    if out.exists():
        raise ModelFolderError(f"{out} exists: name a new folder with --out")
    adapter = find_ip_adapter(ip_adapter) if ip_adapter else None
    parts = combine(
        language=language,
        diffusion=diffusion,
        vision=vision,
        image_px=image_px,
        context_tokens=context_tokens,
        condition_length=condition_length,
        template=template,
        name=out.name,
    )
    with model_folder.new_folder(out) as folder:
        model_folder.save(folder, parts.config, language=parts.language, mapper=parts.mapper, vision=parts.vision)
        if adapter:
            add_ip_adapter(folder, adapter)
            parts.diffusion.load_ip_adapter(folder / IP_ADAPTER)
    return parts


def add_ip_adapter(folder: Path, file: Path) -> None:
    """Copy an IP-Adapter and the image encoder beside it into a model folder."""
    place = folder / IP_ADAPTER
    place.mkdir()
    shutil.copyfile(file, place / WEIGHTS)
    (place / ENCODER).mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(file.parent / ENCODER / name, place / ENCODER / name)


def main(arguments: list[str] | None = None, *, show: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minigpt5.new", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--language",
        required=True,
        metavar="BASE",
        help="causal language model of transformers, or a vision-language model",
    )
    parser.add_argument(
        "--diffusion", required=True, metavar="BASE", help="text-to-image model in the layout of diffusers"
    )
    parser.add_argument(
        "--vision",
        metavar="BASE",
        help="reads pictures: own (the vision-language model's, the default where there is one), none, or a tower: "
        "CLIP, SigLIP, DINOv2, EfficientNet-Lite0",
    )
    parser.add_argument("--image-px", type=int, help="side of a picture that own reads: more pixels take more tokens")
    parser.add_argument("--context", type=int, help=f"tokens of a story with its prompt (default {DEFAULT_CONTEXT})")
    parser.add_argument(
        "--condition", type=int, help="positions of a condition, fewer than the pipeline's: the mapper writes as many"
    )
    parser.add_argument(
        "--template",
        choices=get_args(TemplateName),
        help="of prompts: the paper's, or the language model's own (default \"chat\" where its tokenizer has one)",
    )
    parser.add_argument(
        "--ip-adapter",
        metavar="FILE",
        help="lets stories show characters as given pictures do: a .safetensors file with image_encoder/ beside it, by "
        "its path or as owner/name/PATH.safetensors of the hub",
    )
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--out", help="the new model folder")
    goal.add_argument("--dry-run", action="store_true", help="print sizes and memory, from config files alone")
    options = parser.parse_args(arguments)
    given: dict[str, Any] = {
        "language": options.language,
        "diffusion": options.diffusion,
        "vision": options.vision,
        "image_px": options.image_px,
        "context_tokens": options.context,
        "condition_length": options.condition,
    }
    try:
        if options.dry_run:
            show(report(sketch(**given)))
            return 0
        parts = make_folder(options.out, **given, template=options.template, ip_adapter=options.ip_adapter)
    except MiniGPT5Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(f"{report(parts)}\ntemplate {parts.config.template}")
    show(f"\n{options.out} is ready to be trained: python -m training.train align --start {options.out} --data ROWS")
    return 0


if __name__ == "__main__":
    sys.exit(main())
