"""How good a model is: `python -m benchmarks.quality [--num 500] [--stories 50] [--references 50] [--scenes 100]
[--phrasings 100] [--model FOLDER]`.

Scenes are asked for by captions of the held-out split that say every fact and drawn by the shipped folder's
default request, one seed for each caption, no selection; the scorer reads them. Held-out, seen pairs apart.
Beside them the ceilings: what the scorer reads from true scenes, from their VAE reconstructions, and from pictures of
the same facts and noise through the diffusion model's own text encoder; its lead is the alignment gap, in points. How
near the reconstructions come to true scenes, and drawn pictures to themselves with new sprites at the same places:
minigpt5/evaluation/perceptual.py. All of these are of the size that the VAE itself paints; larger ones: upscaling.py.

Stories are written by the model itself from held-out prompts (stories.py), and kept beside the figures: all of their
texts in books.json, the pictures of the best and the worst in books.png. Given stories say how well pictures show what
their pages only refer to (referring.py). The model describes scenes. Last, people ask, and not the
world's own captions (phrasings.py). What is asked of the figures: goals.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import phrasings
from benchmarks import upscaling as larger
from benchmarks.drawing import draw, own_size
from benchmarks.goals import compare, to_text
from benchmarks.phrasings import describe_questions, draw_phrasings
from benchmarks.pixels import png_of
from benchmarks.referring import reference
from benchmarks.shares import mean, points_lost, share
from benchmarks.stories import save_books, summary, tell
from benchmarks.upscaling import upscaling
from minigpt5.config import default_model_folder
from minigpt5.engine.denoising import denoise
from minigpt5.evaluation.perceptual import Lpips, psnr_db
from minigpt5.evaluation.world import facts_shown
from minigpt5.model.base_models import resolve
from minigpt5.model.decoders.diffusion import Diffusion
from minigpt5.model.pixels import to_pixels, to_tensor
from minigpt5.model.text_encoder import load_text_encoder
from minigpt5.pipeline import MiniGPT5
from minigpt5.storybook.captions import Facts, canonical_caption, facts_in, write_caption
from minigpt5.storybook.crispness import crispness
from minigpt5.storybook.scenes import Scene, Split, draw_scene, scene_at
from minigpt5.storybook.scorer import Scorer, load_scorer
from minigpt5.types import DrawSettings
from training.storybook.sprites import find_sprites, redrawn

SEED = 2310
BATCH_SIZE = 8
TINY = 24
NUM_CRISP = 100
"""Pictures of each kind whose crispness is measured."""
STORY_FACTS = ("who", "what", "place", "time")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked for: a scene nobody trained on, and a caption with all its facts."""

    scene: Scene
    caption: str
    seed: int

    @property
    def facts(self) -> Facts:
        return Facts.of(self.scene)


def ask(num: int, *, held_out_pairs: bool, split: Split = "heldout", first_seed: int = 0) -> list[Asked]:
    """The first `num` scenes of a split, of held-out or of seen pairs."""
    asked = []
    for index in range(num):
        scene = scene_at(index, seed=SEED, split=split, held_out_pairs=held_out_pairs)
        caption = write_caption(Facts.of(scene), np.random.default_rng([SEED, index]))
        asked.append(Asked(scene=scene, caption=caption, seed=first_seed + index))
    return asked


@torch.no_grad()
def draw_base(model: MiniGPT5, text_encoder: nn.Module, asked: Sequence[Asked], settings: DrawSettings) -> np.ndarray:
    """Draw as `draw` does, from canonical captions through the text encoder that the vokens are aligned with."""
    pictures = []
    for start in range(0, len(asked), BATCH_SIZE):
        batch = asked[start : start + BATCH_SIZE]
        drawn_BCYX = denoise(
            model.decoder.diffusion,
            text_encoder([canonical_caption(one.facts) for one in batch]),
            text_encoder([""]),
            seeds=[one.seed for one in batch],
            draw=settings,
            guidance_rescale=model.config.guidance_rescale,
        )
        pictures.append(to_pixels(drawn_BCYX))
    return np.concatenate(pictures)


def understanding(model: MiniGPT5, num: int) -> dict[str, dict[str, float]]:
    """Share of `num` held-out scenes of which the model's description names each fact rightly."""
    asked = ask(num, held_out_pairs=True)
    said = [facts_in(model.describe(png_of(draw_scene(one.scene)))) for one in asked]
    return {
        name: share(
            sum(getattr(facts, name) == getattr(one.facts, name) for facts, one in zip(said, asked, strict=True)), num
        )
        for name in STORY_FACTS
    }


@torch.no_grad()
def reconstruct(diffusion: Diffusion, pixels: np.ndarray) -> np.ndarray:
    """Pictures through the VAE and back."""
    batches = [
        diffusion.to_pixels(diffusion.to_latents(to_tensor(pixels[start : start + BATCH_SIZE])))
        for start in range(0, len(pixels), BATCH_SIZE)
    ]
    return to_pixels(torch.cat(batches))


def rights(scorer: Scorer, pixels: np.ndarray, asked: Sequence[Asked]) -> dict[str, np.ndarray]:
    """Whether each picture shows each fact as it was asked for, and all of them: (B,) bool each."""
    return facts_shown(pixels, [one.facts for one in asked], scorer)


def accuracy(right: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """The shares of what is right."""
    return {name: share(int(values.sum()), len(values)) for name, values in right.items()}


def crisp(pixels: np.ndarray, asked: Sequence[Asked], *, with_colour: bool = False) -> dict[str, dict[str, float]]:
    """Mean crispness of the asked character, of the asked object and of both."""
    values_BN = np.array(
        [
            [crispness(picture, name, with_colour=with_colour) for name in (one.scene.who, one.scene.what)]
            for picture, one in zip(pixels[:NUM_CRISP], asked, strict=False)
        ]
    )
    who_B, what_B = values_BN.T
    return {"who": mean(who_B), "what": mean(what_B), "both": mean(values_BN.mean(axis=1))}


def nearness(true: np.ndarray, again: np.ndarray) -> dict[str, dict[str, float]]:
    """How near the VAE comes to pictures: `psnr_db` the larger and `lpips` the smaller the nearer."""
    one_BCYX, other_BCYX = to_tensor(true), to_tensor(again)
    values = {"psnr_db": psnr_db(one_BCYX, other_BCYX), "lpips": Lpips()(one_BCYX, other_BCYX)}
    return {name: mean(value.double().numpy()) for name, value in values.items()}


def softness(pixels: np.ndarray, asked: Sequence[Asked]) -> dict[str, float] | None:
    """Measure LPIPS between pictures and the same pictures with new sprites: a second opinion on crispness, of a
    network that no training has used. Counts pictures that show both of their sprites; None where fewer than two do."""
    found = [
        (picture, find_sprites(picture, one.scene)) for picture, one in zip(pixels[:NUM_CRISP], asked, strict=False)
    ]
    whole = [(picture, sprites) for picture, sprites in found if len(sprites) == 2]
    if len(whole) < 2:
        return None
    before, after = (to_tensor(np.stack(both)) for both in zip(*((p, redrawn(p, s)) for p, s in whole), strict=True))
    return mean(Lpips()(before, after).double().numpy())


@dataclass(frozen=True, kw_only=True)
class Nums:
    """Numbers of what is measured; 0: not at all, but for the captions."""

    captions: int
    stories: int
    references: int
    scenes: int
    phrasings: int = 0


def measure(
    model: MiniGPT5, scorer: Scorer, text_encoder: nn.Module, nums: Nums, *, books: Path | None = None
) -> dict[str, object]:
    """All figures of this bench. `text_encoder`: the diffusion model's own; `books`: where stories are kept."""
    num = nums.captions
    figures: dict[str, object] = {
        "model": model.config.name,
        "fingerprint": model.config.fingerprint,
        "draw": dataclasses.asdict(model.config.default_draw),
    }
    for name, held_out_pairs in (("held_out_pairs", True), ("seen_pairs", False)):
        print(f"{num} captions, {name.replace('_', ' ')}", file=sys.stderr)
        asked = ask(num, held_out_pairs=held_out_pairs)
        true = np.stack([draw_scene(one.scene) for one in asked])
        again = reconstruct(model.decoder.diffusion, true)
        start = time.monotonic()
        drawn = draw(model, [one.caption for one in asked], own_size(model), seeds=[one.seed for one in asked])
        seconds = (time.monotonic() - start) / num
        base = draw_base(model, text_encoder, asked, own_size(model))
        kinds = {"drawn": drawn, "reconstructed": again, "true": true, "base": base}
        right = {kind: rights(scorer, pixels, asked) for kind, pixels in kinds.items()}
        figures[name] = {
            "accuracy": {kind: accuracy(of_kind) for kind, of_kind in right.items()},
            "alignment_gap": {name: points_lost(right["base"][name], right["drawn"][name]) for name in right["drawn"]},
            "crispness": {kind: crisp(pixels, asked) for kind, pixels in kinds.items()},
            "crispness_with_colour": {kind: crisp(pixels, asked, with_colour=True) for kind, pixels in kinds.items()},
            "reconstruction": nearness(true[:NUM_CRISP], again[:NUM_CRISP]),
            "lpips_to_redrawn": softness(drawn, asked),
            "seconds_a_caption": round(seconds, 3),
        }
    if model.config.upscale > 1:
        print("larger pictures", file=sys.stderr)
        figures["upscaling"] = upscaling(model, ask(min(num, NUM_CRISP), held_out_pairs=True))
    if nums.stories:
        print(f"{nums.stories} stories are told", file=sys.stderr)
        told = tell(model, scorer, nums.stories)
        figures["stories"] = summary(told)
        if books:
            save_books(told, books)
    if nums.references:
        print(f"{nums.references} given stories, four ways", file=sys.stderr)
        figures["reference"] = reference(model, scorer, text_encoder, nums.references)
    if nums.scenes:
        print(f"{nums.scenes} scenes are described", file=sys.stderr)
        figures["understanding"] = understanding(model, nums.scenes)
    if nums.phrasings:
        print(f"{nums.phrasings} scenes in phrasings of each kind", file=sys.stderr)
        figures["phrasings"] = draw_phrasings(model, scorer, nums.phrasings)
        figures["questions"] = describe_questions(model, nums.phrasings)
    figures["goals"] = compare(figures)
    return figures


def save_report(path: Path, figures: dict[str, Any], *, command: str) -> None:
    found = phrasings.ratios(figures) if "phrasings" in figures else {}
    found |= larger.ratios(figures["upscaling"]) if "upscaling" in figures else {}
    report = {"ratios": found, "figures": figures, "machine": machine(), "command": command}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


def machine() -> dict[str, object]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--num", type=int, default=500, help="captions of held-out pairs, and as many of seen pairs")
    parser.add_argument("--stories", type=int, default=50, help="stories that the model writes; 0: none")
    parser.add_argument("--references", type=int, default=50, help="given stories whose pages refer; 0: none")
    parser.add_argument("--scenes", type=int, default=100, help="scenes that the model describes; 0: none")
    parser.add_argument("--phrasings", type=int, default=100, help="scenes asked for as people ask; 0: none")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help=f"{TINY} captions, a story and four scenes: a check that the bench runs",
    )
    parser.add_argument("--model", type=Path, default=default_model_folder())
    parser.add_argument("--out", type=Path, default=Path("benchmarks") / "results" / "quality.json")
    parser.add_argument("--undistilled", action="store_true", help="draw with the UNet itself by default")
    parser.add_argument("--threads", type=int, help="torch threads; as torch chooses where it is not given")
    options = parser.parse_args(arguments)
    nums = Nums(
        captions=options.num,
        stories=options.stories,
        references=options.references,
        scenes=options.scenes,
        phrasings=options.phrasings,
    )
    if nums.captions < 2 or min(nums.stories, nums.references, nums.scenes, nums.phrasings) < 0 or nums.references == 1:
        parser.error("--num must be at least 2, --stories, --scenes and --phrasings 0, --references 0 or at least 2")
    if options.tiny:
        nums = Nums(captions=TINY, stories=1, references=2, scenes=4, phrasings=2)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = MiniGPT5.from_pretrained(options.model, num_cores=options.threads)
    if options.undistilled:
        model.generator.config = dataclasses.replace(model.config, prefers_distilled=False)
    text_encoder = load_text_encoder(resolve(model.config.text_encoder), model.config)
    figures = measure(model, load_scorer(), text_encoder, nums, books=options.out.parent)
    given = sys.argv[1:] if arguments is None else arguments
    save_report(options.out, figures, command=" ".join(["python -m benchmarks.quality", *given]))
    print(to_text(figures["goals"]))
    print(f"all figures: {options.out}")


if __name__ == "__main__":
    main()
