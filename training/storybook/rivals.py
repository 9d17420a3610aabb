"""Rivals of the model and ablations, at one reduced budget: `--preset NAME`, and what each starts from.

    python -m training.storybook.rivals gill --out runs/gill/start
    python -m training.train align --preset gill --start runs/gill/start --out runs/gill/align

All start from the VAE, denoiser, text encoder, vision path and base language model of one folder (default: the shipped
one), with fresh vokens, mapper and adapter. A rival is settings alone: what is trained, on which losses, and what
stands in its texts where a picture is drawn.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minigpt5.config import NO_VISION, ModelConfig, default_model_folder
from minigpt5.errors import MiniGPT5Error, TrainingError
from minigpt5.model import folder as model_folder
from minigpt5.model.folder_config import load_config
from minigpt5.model.language import LanguageModel
from minigpt5.model.locate import find_part, locate
from minigpt5.model.mapper import Mapper
from training.presets import OptimizerConfig, Preset, ReplayConfig, VokenPreset
from training.storybook.presets import RetrievePreset, UnetPreset

STAGE_2_EXAMPLES = 640
"""Examples of stage 2, of which the data-* presets have a share."""


@dataclass(frozen=True, kw_only=True)
class Rival:
    """One row of the comparison."""

    stages: Mapping[str, Preset]
    """In their order; each starts from the one before it."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig that differ from the base's."""
    system: str = ""
    """A name in minigpt5/evaluation/systems/load.py; empty: a model folder of ours."""


_QUIET: dict[str, Any] = {"draws_samples": False, "num_threads": 1, "log_every": 10, "keeps_states": True}
ALIGN = VokenPreset(
    stage="align",
    steps=1_800,
    batch_size=16,
    optimizer=OptimizerConfig(learning_rate=0.0, ema_decay=0.98, warmup_steps=30),
    mapper_learning_rate=1e-3,
    picture_weight=1.0,
    picture_from=0.9,
    caption_weight=1.0,
    replay=ReplayConfig(steps=1, batch_size=16, fill=4_000),
    **_QUIET,
)
LEARN = VokenPreset(
    stage="learn",
    steps=480,
    batch_size=4,
    optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=20),
    mapper_learning_rate=3e-4,
    voken_learning_rate=5e-4,
    text_weight=0.3,
    picture_weight=1.0,
    picture_from=0.8,
    caption_weight=1.0,
    caption_share=0.15,
    story_share=0.35,
    dialogue_share=0.25,
    num_examples=STAGE_2_EXAMPLES,
    replay=ReplayConfig(steps=2, batch_size=16),
    **_QUIET,
)
WRITE = dataclasses.replace(
    LEARN,
    steps=160,  # as many new batches, and nothing to replay
    mapper_learning_rate=0.0,
    voken_learning_rate=0.0,
    text_weight=1.0,
    picture_weight=0.0,
    caption_weight=0.0,
    caption_share=0.0,
    whitens=False,
    standardises=False,
    replay=ReplayConfig(),
)
"""For what writes text alone."""
TEXTS = {"learn": dataclasses.replace(WRITE, draws_by="mark", story_share=0.65, dialogue_share=0.35)}
"""Stories and dialogues: what needs no picture read."""


def _both(**changes: Any) -> dict[str, Preset]:
    return {name: dataclasses.replace(one, **changes) for name, one in (("align", ALIGN), ("learn", LEARN))}


def _data(share: float) -> dict[str, Preset]:
    num = round(share * STAGE_2_EXAMPLES)
    return {"align": ALIGN, "learn": dataclasses.replace(LEARN, num_examples=num)}


_FROZEN = dataclasses.replace(LEARN, optimizer=dataclasses.replace(LEARN.optimizer, learning_rate=0.0))
RIVALS: dict[str, Rival] = {
    "minigpt5": Rival(stages={"align": ALIGN, "learn": LEARN}),
    # The language model is frozen and the mapper learns captions alone (arXiv 2305.17216).
    "gill": Rival(
        stages={
            "align": dataclasses.replace(ALIGN, picture_weight=0.0),
            "learn": dataclasses.replace(_FROZEN, picture_weight=0.0),
            "retrieve": RetrievePreset(
                stage="retrieve",
                steps=400,
                batch_size=64,
                optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20),
                num_pictures=600,
                num_indexed=600,
                draws_samples=False,
                num_threads=1,
            ),
        },
        system="gill",
    ),
    # The language model writes what the picture shows (arXiv 2110.08515).
    "divter": Rival(
        stages={"learn": dataclasses.replace(WRITE, draws_by="description", caption_share=LEARN.caption_share)},
        system="divter",
    ),
    "two-stage": Rival(stages=TEXTS, config={"vision": NO_VISION}, system="two-stage"),
    "stable-diffusion": Rival(
        stages={
            "unet": UnetPreset(
                stage="unet",
                steps=200,
                batch_size=16,
                optimizer=OptimizerConfig(learning_rate=1e-4, ema_decay=0.98, warmup_steps=20),
                page_share=0.5,
                draws_samples=False,
                num_threads=1,
            )
        },
        system="stable-diffusion",
    ),
    "text-only": Rival(stages=TEXTS, config={"vision": NO_VISION}, system="text-only"),
    "minigpt4": Rival(stages={"learn": dataclasses.replace(WRITE, draws_by="mark")}, system="minigpt4"),
    # Every step passes the UNet: fewer of them, in about the time of the others.
    "no-caption-loss": Rival(
        stages={
            "align": dataclasses.replace(ALIGN, caption_weight=0.0, picture_from=0.0, steps=600),
            "learn": dataclasses.replace(LEARN, caption_weight=0.0, picture_from=0.0),
        }
    ),
    "no-diffusion-loss": Rival(stages=_both(picture_weight=0.0)),
    "no-guidance-dropout": Rival(stages=_both(guidance_dropout=0.0)),
    "no-stage-1": Rival(stages={"learn": LEARN}),
    "no-transformer": Rival(stages={"align": ALIGN, "learn": LEARN}, config={"mapper_layers": 0}),
    "vokens-1": Rival(stages={"align": ALIGN, "learn": LEARN}, config={"num_vokens": 1}),
    "vokens-4": Rival(stages={"align": ALIGN, "learn": LEARN}, config={"num_vokens": 4}),
    "vokens-16": Rival(stages={"align": ALIGN, "learn": LEARN}, config={"num_vokens": 16}),
    "frozen": Rival(stages={"align": ALIGN, "learn": _FROZEN}),
    # Keys and values before every sequence (arXiv 2101.00190), as many as the published code has.
    "prefix": Rival(stages={"align": ALIGN, "learn": dataclasses.replace(LEARN, tunes="prefix")}),
    # All weights of the language model, at a tenth of the adapter's rate.
    "full": Rival(
        stages={
            "align": ALIGN,
            "learn": dataclasses.replace(
                LEARN, tunes="body", optimizer=dataclasses.replace(LEARN.optimizer, learning_rate=5e-5)
            ),
        }
    ),
    "data-10": Rival(stages=_data(0.1)),
    "data-30": Rival(stages=_data(0.3)),
}


def make_start(name: str, out: Path, *, base: str | Path, seed: int = 1) -> ModelConfig:
    """Write the model folder that a rival starts from, and return its config. `base`: a model folder, of which all but
    vokens, mapper and adapter are taken. Raises ModelFolderError, and TrainingError where `out` is taken."""
    if out.exists():
        raise TrainingError(f"{out} exists: name a new folder with --out")
    base = locate(base)
    torch.manual_seed(seed)
    config = dataclasses.replace(load_config(base), about="", examples=(), **RIVALS[name].config)
    language = LanguageModel.from_base(find_part(base, config, config.language_model), config)
    language.initialise_vokens(seed=seed - 1)
    return model_folder.save(
        out,
        config,
        language=language,
        mapper=Mapper(config),
        vision=model_folder.load_vision(base, config),
        start=base,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.storybook.rivals", description="What a rival starts from")
    parser.add_argument("name", choices=RIVALS)
    parser.add_argument("--out", type=Path, required=True, help="the new model folder")
    parser.add_argument("--base", default=str(default_model_folder()), help="model folder (default: the shipped one)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    try:
        make_start(options.name, options.out, base=options.base, seed=options.seed)
    except MiniGPT5Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
