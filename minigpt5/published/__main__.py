"""`python -m minigpt5.published import|export|sizes`: the published checkpoints, in and out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from minigpt5.config import minigpt5_7b
from minigpt5.errors import MiniGPT5Error, ModelFolderError
from minigpt5.published import checkpoint
from minigpt5.published.checkpoint import (
    Tensors,
    drift,
    export_checkpoint,
    import_checkpoint,
    published_file_key,
    read_state_dict,
    write_checkpoint,
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minigpt5.published", description=checkpoint.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    reads = commands.add_parser("import", help="published checkpoints -> a model folder")
    reads.add_argument("--stage1", type=Path, help="stage1_cc3m.ckpt, or the same as .safetensors")
    reads.add_argument("--stage2", type=Path, help="stage2_vist.ckpt or stage2_mmdialog.ckpt")
    reads.add_argument(
        "--vision", type=Path, nargs="+", required=True, help="files with visual_encoder, Qformer, llama_proj weights"
    )
    reads.add_argument("--llm", default=minigpt5_7b().language_model, help="base-model id or folder")
    reads.add_argument("--diffusion", default=minigpt5_7b().diffusion, help="base-model id or folder")
    reads.add_argument("--out", type=Path, required=True)
    writes = commands.add_parser("export", help="a model folder -> published checkpoints")
    writes.add_argument("folder", type=Path)
    writes.add_argument("--stage1", type=Path, required=True)
    writes.add_argument("--stage2", type=Path)
    writes.add_argument("--vision", type=Path)
    commands.add_parser("sizes", help="parameters and memory of the full-size system")
    options = parser.parse_args(arguments)
    try:
        {"import": _import, "export": _export, "sizes": _sizes}[options.command](options)
    except MiniGPT5Error as error:
        sys.exit(f"error: {error}")


def _import(options: argparse.Namespace) -> None:
    vision: Tensors = {}
    for path in options.vision:
        vision |= {published_file_key(key): value for key, value in read_state_dict(path).items()}
    config = import_checkpoint(
        options.out,
        stage1=read_state_dict(options.stage1) if options.stage1 else None,
        stage2=read_state_dict(options.stage2) if options.stage2 else None,
        vision=vision,
        llm=options.llm,
        diffusion=options.diffusion,
        tell=print,
    )
    print(f"{options.out}: {config.name}, fingerprint {config.fingerprint[:12]}")
    for part, share in drift(options.out, options.llm).items():
        print(
            f"its old {part} rows differ from the base model's by {share:.2%}; they are kept in vocabulary.safetensors"
        )


def _export(options: argparse.Namespace) -> None:
    stage1, stage2, vision = export_checkpoint(options.folder)
    if (stage2 is None) != (options.stage2 is None):
        have = "has" if stage2 else "has not"
        raise ModelFolderError(f"{options.folder} {have} been through stage 2: {'give' if stage2 else 'drop'} --stage2")
    write_checkpoint(stage1, options.stage1)
    if stage2:
        write_checkpoint(stage2, options.stage2)
    if options.vision:
        write_checkpoint(vision, options.vision)


def _sizes(options: argparse.Namespace) -> None:
    from minigpt5.model.sizes import print_tables

    print_tables()


if __name__ == "__main__":
    main()
