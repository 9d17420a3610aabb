"""`python -m training.train vae|unet|vision|align|learn [key=value ...]`: one stage, resumed where it was left."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from training import data, loop, presets
from training.presets import Preset


def build_stage(preset: Preset, runs: Path, start: Path | None) -> loop.Stage:
    """The stage of a preset, on what earlier ones left under `runs`, or on the model folder `start`."""
    if preset.stage == "vae":
        from training.stage_vae import VaeStage

        return VaeStage(preset, start)
    if preset.stage == "unet":
        from training.stage_unet import UnetStage

        return UnetStage(preset, runs, start)
    from training.stage_model import ModelStage

    return ModelStage(preset, runs, start)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("stage", choices=sorted(presets.STORYBOOK))
    parser.add_argument("settings", nargs="*", help="key=value, see training/presets.py")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs; a stage is runs/<stage>")
    parser.add_argument("--start", type=Path, help="model folder to go on from, such as models/storybook")
    parser.add_argument("--workers", type=int, default=1, help="Ray Train workers; 0: in this process, without Ray")
    options = parser.parse_intermixed_args()
    try:
        preset = presets.override(presets.STORYBOOK[options.stage], options.settings)
    except ValueError as error:
        parser.error(str(error))
    runs, start = options.runs.absolute(), options.start and options.start.absolute()
    if options.workers == 0:
        run(preset, runs, start)
    else:
        from training.cluster import run_on_ray

        run_on_ray(preset, runs, start, options.workers)


def run(preset: Preset, runs: Path, start: Path | None) -> None:
    """The stage in this process."""
    torch.set_num_threads(preset.num_threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    stage = build_stage(preset, runs, start)
    batches = data.local_batches(preset)
    loop.fit(stage, preset, runs / preset.stage, batches, report=lambda metrics: print(metrics, flush=True))


if __name__ == "__main__":
    main()
