"""One stage of training, or the rest of it: `python -m training.train STAGE [key=value ...]`.

    python -m training.train align --data /data/cc3m --start models/storybook --out /data/runs/align
    ray job submit --working-dir . -- python -m training.train learn --data s3://b/vist --start s3://b/align/model \\
        --out s3://b/learn --workers 8 zero_stage=2

Without --data the rows are those of the picture world. A run that was stopped goes on from its newest checkpoint when
it is started again with the same --out. `OUT/model` is a model folder, served as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

import torch

from minigpt5.config import storybook
from minigpt5.errors import MiniGPT5Error, TrainingError
from minigpt5.model import folder as model_folder
from training import checkpoint, devices, loop, presets
from training.data import batches as data
from training.data.batches import Rows, RowsOfStage, StorybookRows
from training.data.stored import StoredRows
from training.presets import Preset
from training.run_folder import RunFolder, fetch_model
from training.weight_sources import WeightSources

PRESETS = {"storybook": presets.STORYBOOK, "published": presets.PUBLISHED}
STORED_STAGES = ("align", "learn", "refine")
"""Those that learn from stored rows as well."""
VALIDATION_SEED = 1_000_003
"""Added to the seed of the picture world's rows that are never trained on."""


def build_stage(preset: Preset, sources: WeightSources, rows: Rows) -> loop.Stage:
    """The stage of a preset, on the weights that it goes on from."""
    if preset.stage == "vae":
        from training.storybook.vae import VaeStage

        return VaeStage(preset, sources)
    if preset.stage == "unet":
        from training.storybook.unet import UnetStage

        return UnetStage(preset, sources)
    if preset.stage == "decoder":
        from training.storybook.decoder import DecoderStage

        return DecoderStage(preset, sources)
    if preset.stage == "sharpen":
        from training.storybook.sharpen import SharpenStage

        return SharpenStage(preset, sources)
    if preset.stage == "distill":
        from training.storybook.distill import DistillStage

        return DistillStage(preset, sources)
    from training.stages.model import ModelStage

    return ModelStage(preset, sources, rows)


def find_rows(preset: Preset, sources: WeightSources, uri: str | None) -> tuple[Preset, Rows, Rows | None]:
    """Rows to train on and to validate with; the preset with its steps, where it counts epochs. Raises
    TrainingError."""
    if uri is None:
        if preset.epochs:
            raise TrainingError("epochs are of stored rows: name some with --data, or set epochs=0 steps=")
        held_back = dataclasses.replace(preset, seed=preset.seed + VALIDATION_SEED)
        return preset, StorybookRows(preset), StorybookRows(held_back) if preset.validation_batches else None
    previous = sources.model(preset.stage)
    config = model_folder.load_config(previous) if previous else storybook()
    stored = StoredRows(uri, config, seed=preset.seed)
    if preset.epochs:
        steps = max(1, round(preset.epochs * len(stored) / data.rows_per_step(preset)))
        preset = dataclasses.replace(preset, steps=steps, epochs=0.0)
    validation = None
    if preset.validation_batches:
        validation = RowsOfStage(StoredRows(uri, config, seed=preset.seed, is_validation=True), preset)
    return preset, RowsOfStage(stored, preset), validation


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=sorted(presets.STORYBOOK))
    parser.add_argument("settings", nargs="*", metavar="key=value", help="see training/presets.py")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="storybook", help="(default %(default)s)")
    parser.add_argument("--data", help="rows that batch_jobs.prepare or batch_jobs.precompute wrote, path or URI")
    parser.add_argument("--out", help="folder or URI of this run (default: RUNS/STAGE)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default %(default)s)")
    parser.add_argument("--start", help="model folder to go on from, path or URI, such as models/storybook")
    parser.add_argument("--decoder", type=Path, help="folder whose vae/ and unet/ come before the start's")
    parser.add_argument("--workers", type=int, default=1, help="Ray Train workers; 0: in this process, without Ray")
    parser.add_argument("--gpus", type=float, default=0.0, help="of each worker (default %(default)g)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_intermixed_args(arguments)
    known = PRESETS[options.preset]
    if options.stage not in known:
        parser.error(f"preset {options.preset} has no stage {options.stage}: it has {', '.join(sorted(known))}")
    if options.data and options.stage not in STORED_STAGES:
        parser.error(f"{options.stage} learns the picture world: --data is for {', '.join(STORED_STAGES)}")
    try:
        preset = presets.override(known[options.stage], options.settings)
    except ValueError as error:
        parser.error(str(error))
    try:
        start = fetch_model(options.start) if options.start else None
        sources = WeightSources(
            runs=options.runs.absolute(), start=start, decoder=options.decoder and options.decoder.absolute()
        )
        out = RunFolder(options.out or options.runs / options.stage)
        preset, rows, validation = find_rows(preset, sources, options.data)
        if options.workers == 0:
            run(preset, sources, out, rows, validation)
        else:
            from training.cluster import Run, run_on_ray

            on_ray = Run(preset=preset, sources=sources, out=out, rows=rows, validation=validation)
            run_on_ray(on_ray, options.workers, num_gpus=options.gpus)
    except MiniGPT5Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(preset: Preset, sources: WeightSources, out: RunFolder, rows: Rows, validation: Rows | None) -> None:
    """The stage in this process."""
    device = devices.own_device()
    preset = devices.for_device(preset, device)
    torch.set_num_threads(preset.num_threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loop.fit(
        build_stage(preset, sources, rows),
        preset,
        out,
        data.local_batches(rows, preset),
        validation=data.validation_batches(validation, preset) if validation else (),
        owner=checkpoint.claim(out),
        report=lambda metrics: print(metrics, flush=True),
        device=device,
    )


if __name__ == "__main__":
    sys.exit(main())
