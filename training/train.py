"""One stage of training, or the rest of it: `python -m training.train STAGE [key=value ...]`.

    python -m training.train align --data /data/cc3m --start models/storybook --out /data/runs/align
    ray job submit --working-dir . -- python -m training.train learn --data s3://b/vist --start s3://b/align/model \\
        --out s3://b/learn --workers 8 zero_stage=2

A stopped run resumes from its newest checkpoint when the same command is given again; `OUT/run.json` says which run a
folder belongs to. `OUT/model` is a model folder, served as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import sys
from functools import partial
from pathlib import Path

import torch
from pyarrow import fs

from minigpt5.commands import check_kept
from minigpt5.config import ModelConfig
from minigpt5.errors import MiniGPT5Error, TrainingError
from minigpt5.model import folder as model_folder
from minigpt5.model.folder_config import load_config
from minigpt5.model.locate import find_part, shared_name
from minigpt5.model.published_template import PUBLISHED
from minigpt5.objective.encoders import find_encoders
from minigpt5.objective.objective import REPLAY_CAPACITY
from training import checkpoint, devices, loop, presets
from training.data import batches as data
from training.data.batches import StageData
from training.data.encoded import check_encoders
from training.data.stored import StoredExamples, open_place
from training.data.tokeniser import Tokeniser
from training.presets import DistillPreset, Preset, VisionPreset, VokenPreset
from training.run_folder import RunFolder
from training.stage import build_stage
from training.weight_sources import PREVIOUS, WeightSources

LEARNS_ROWS = VokenPreset | VisionPreset | DistillPreset
"""Presets of the stages that take stored examples."""
VALIDATION_SEED = 1_000_003
"""Added to the seed of the picture world's examples that are never trained on."""


def find_examples(preset: Preset, sources: WeightSources, uri: str) -> tuple[Preset, StageData]:
    """The stored examples of a data set, and the preset with its steps where it counts epochs. Raises TrainingError."""
    assert isinstance(preset, LEARNS_ROWS)
    start = sources.need_model(preset.stage)
    config = load_config(start)
    if preset.stage == "vision" and config.vision.family == "none":
        raise TrainingError("this model reads no pictures: make one with python -m minigpt5.new --vision")
    if preset.stage == "vision" and config.vision.family == "own":
        raise TrainingError("this model reads pictures as its base model does: begin with the stage align")
    share = preset.story_share if isinstance(preset, VokenPreset) else 0.0
    template = model_folder.load_template(sources.need_model(preset.stage))
    draws_by = preset.draws_by if isinstance(preset, VokenPreset) else "vokens"
    tokeniser = Tokeniser(str(sources.start or start), draws_by)
    stored = StoredExamples(
        uri,
        config,
        seed=preset.seed,
        stage=preset.stage,
        story_share=share,
        template=template,
        tokenise=tokeniser,
        find_windows=tokeniser.windows,
    )
    check_rows(stored, start, config, sources)
    if preset.epochs:
        steps = max(1, round(preset.epochs * len(stored) / data.examples_per_step(preset)))
        preset = dataclasses.replace(preset, steps=steps, epochs=0.0)
    try:
        held_out = stored.held_out()
    except TrainingError as error:
        if preset.validation_batches:
            raise TrainingError(f"{error}, or set validation_batches=0") from None
        held_out = None
    return preset, StageData(training=stored, validation=held_out)


def check_rows(stored: StoredExamples, start: Path, config: ModelConfig, sources: WeightSources) -> None:
    """Check that encoded rows fit the model that the run starts from. Raises TrainingError."""
    from training.stages.model import find_decoder

    vae_of = find_decoder(start, config, sources).parts["vae"]
    is_own_vae = vae_of == find_part(start, config, config.diffusion)
    remedy = f"encode them again with python -m batch_jobs.precompute --model {sources.start or start}"
    if not is_own_vae and stored.stage != "vision":
        remedy = f"name the rows as they were before precompute, since the VAE of this run is that in {vae_of}"
    find_own = partial(find_encoders, start, config, fields=stored.fields_read, vae_of=vae_of)
    check_encoders(stored, find_own, remedy=remedy)


def picture_world(preset: Preset, sources: WeightSources) -> StageData:
    """The picture world's endless examples, and a fresh model where nothing else is there to start from.

    Raises TrainingError.
    """
    from training.storybook.examples import StorybookExamples
    from training.storybook.presets import RetrievePreset
    from training.storybook.start import make_start

    if preset.epochs:
        raise TrainingError("epochs are of stored examples: name some with --data, or set epochs=0 steps=")
    make_start(sources)
    has_prompts = isinstance(preset, VokenPreset | VisionPreset | RetrievePreset)
    template = model_folder.load_template(sources.need_model(preset.stage)) if has_prompts else PUBLISHED
    held_out = dataclasses.replace(preset, seed=preset.seed + VALIDATION_SEED)
    reads_pictures = sources.config().vision.family != "none"
    training, validation = (StorybookExamples(one, template, reads_pictures) for one in (preset, held_out))
    return StageData(training=training, validation=validation)


def check_replay(preset: Preset) -> None:
    """Raise TrainingError where a replay buffer can never hold what replaying needs. Stages whose samples differ in
    size ask their buffers later."""
    if not (isinstance(preset, VokenPreset) and preset.replay.steps):
        return
    for name in ("min_size", "fill"):
        if (asked := getattr(preset.replay, name)) > REPLAY_CAPACITY:
            raise TrainingError(
                f"replay.{name} is {asked} but the replay buffer of {preset.stage} holds {REPLAY_CAPACITY} samples: "
                f"set replay.{name}={REPLAY_CAPACITY} or less"
            )


def identify(preset: Preset, sources: WeightSources, uri: str | None, examples: StageData) -> checkpoint.RunIdentity:
    """What makes a run this run. `uri`: of stored examples, None for the picture world's. Raises TrainingError."""
    has_model = sources.start or preset.stage in PREVIOUS
    data_name, digest = "the picture world", ""
    if uri:
        assert isinstance(examples.training, StoredExamples)
        data_name = f"{uri if '://' in uri else Path(uri).absolute()} ({len(examples.training)} rows)"
        digest = digest_rows(uri)
    elif isinstance(preset, VokenPreset):
        digest = str(preset.num_examples)
    return checkpoint.RunIdentity(
        stage=preset.stage,
        start=load_config(sources.need_model(preset.stage)).fingerprint if has_model else "",
        decoder=str(sources.decoder or ""),
        data=data_name,
        data_digest=digest,
        seed=preset.seed,
        examples_per_step=data.examples_per_step(preset),
    )


def digest_rows(uri: str) -> str:
    """A digest of the names and sizes of a data set's files: it stays when they are moved, and reads none of them."""
    files, folder = open_place(uri)
    infos = files.get_file_info(fs.FileSelector(f"{folder}/rows"))
    names = sorted(f"{info.base_name} {info.size}" for info in infos if info.path.endswith(".parquet"))
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=sorted(presets.STAGES))
    parser.add_argument("settings", nargs="*", metavar="key=value", help="see training/presets.py")
    parser.add_argument(
        "--preset",
        choices=sorted(presets.PRESETS),
        default="published",
        metavar="NAME",
        help="published: the paper's settings, for any model and data; storybook: the shipped model's, which learns a "
        f"picture world where there is no --data; rivals and ablations: {', '.join(presets.RIVALS)} "
        "(default %(default)s)",
    )
    parser.add_argument("--data", help="examples that batch_jobs.prepare or batch_jobs.precompute wrote, path or URI")
    parser.add_argument("--out", help="folder or URI of this run (default: RUNS/STAGE)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default %(default)s)")
    parser.add_argument("--start", help="model folder to start from: path, URI or hub id")
    parser.add_argument("--decoder", type=Path, help="folder whose VAE and denoiser come before the start's")
    parser.add_argument("--workers", type=int, default=1, help="Ray Train workers; 0: in this process, without Ray")
    parser.add_argument("--gpus", type=float, default=0.0, help="of each worker (default %(default)g)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_intermixed_args(arguments)
    known = presets.load_presets(options.preset)
    if options.stage not in known:
        parser.error(f"preset {options.preset} has no stage {options.stage}: it has {', '.join(sorted(known))}")
    is_for_data = isinstance(known[options.stage], LEARNS_ROWS)
    if options.data and not is_for_data:
        parser.error(f"{options.stage} learns the picture world alone: leave out --data")
    if not options.data and options.preset == "published":
        parser.error("examples are missing: name those that python -m batch_jobs.prepare wrote, with --data")
    try:
        preset = presets.for_workers(presets.override(known[options.stage], options.settings), options.workers)
    except ValueError as error:
        parser.error(str(error))
    try:
        start = shared_name(options.start) if options.start else None
        sources = WeightSources(
            runs=options.runs.absolute(), start=start, decoder=options.decoder and options.decoder.absolute()
        )
        check_replay(preset)
        place = str(options.out or options.runs / options.stage)
        check_kept(place, option="--out")
        out = RunFolder(place)
        if options.data:
            preset, examples = find_examples(preset, sources, options.data)
        else:
            examples = picture_world(preset, sources)
        checkpoint.check_identity(out, identify(preset, sources, options.data, examples))
        if options.workers == 0:
            run(preset, sources, out, examples)
        else:
            from training.cluster import Run, run_on_ray

            on_ray = Run(preset=preset, sources=sources, out=out, data=examples)
            run_on_ray(on_ray, options.workers, num_gpus=options.gpus)
    except MiniGPT5Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(preset: Preset, sources: WeightSources, out: RunFolder, examples: StageData) -> None:
    """The stage in this process."""
    device = devices.own_device()
    preset = devices.for_device(preset, device)
    torch.set_num_threads(preset.num_threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loop.fit(
        build_stage(preset, sources, examples),
        preset,
        out,
        data.local_batches(examples.training, preset),
        validation=data.validation_batches(examples.validation, preset),
        owner=checkpoint.claim(out),
        report=lambda metrics: print(metrics, flush=True),
        device=device,
    )


if __name__ == "__main__":
    sys.exit(main())
