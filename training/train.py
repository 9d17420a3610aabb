"""`python -m training.train vae|unet|vision|align|learn|refine [key=value ...]`: one stage, or the rest of it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from training import data, loop, presets
from training.parts import Parts
from training.presets import Preset


def build_stage(preset: Preset, parts: Parts) -> loop.Stage:
    """The stage of a preset, on the weights that it goes on from."""
    if preset.stage == "vae":
        from training.stage_vae import VaeStage

        return VaeStage(preset, parts)
    if preset.stage == "unet":
        from training.stage_unet import UnetStage

        return UnetStage(preset, parts)
    from training.stage_model import ModelStage

    return ModelStage(preset, parts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("stage", choices=sorted(presets.STORYBOOK))
    parser.add_argument("settings", nargs="*", help="key=value, see training/presets.py")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs; a stage is runs/<stage>")
    parser.add_argument("--start", type=Path, help="model folder to go on from, such as models/storybook")
    parser.add_argument("--decoder", type=Path, help="folder whose vae/ and unet/ come before the start's")
    parser.add_argument("--workers", type=int, default=1, help="Ray Train workers; 0: in this process, without Ray")
    options = parser.parse_intermixed_args()
    try:
        preset = presets.override(presets.STORYBOOK[options.stage], options.settings)
    except ValueError as error:
        parser.error(str(error))
    runs, start, decoder = (path and path.absolute() for path in (options.runs, options.start, options.decoder))
    parts = Parts(runs=runs, start=start, decoder=decoder)
    if options.workers == 0:
        run(preset, parts)
    else:
        from training.cluster import run_on_ray

        run_on_ray(preset, parts, options.workers)


def run(preset: Preset, parts: Parts) -> None:
    """The stage in this process."""
    torch.set_num_threads(preset.num_threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    stage = build_stage(preset, parts)
    batches = data.local_batches(preset)
    loop.fit(stage, preset, parts.runs / preset.stage, batches, report=lambda metrics: print(metrics, flush=True))


if __name__ == "__main__":
    main()
