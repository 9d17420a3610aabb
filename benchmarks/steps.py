"""What UNet calls buy: `python -m benchmarks.steps [--num 48]`.

Accuracy, crispness and seconds of a picture by sampler, steps and guidance, with the UNet and with the distilled one,
through the vokens of a model folder, whose default is chosen from this table: of held-out pairs, but of the validation
split, since quality.py reports of the default on the held-out one.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.drawing import own_size
from benchmarks.pixels import pixels_of
from benchmarks.quality import Asked, accuracy, ask, crisp, machine, rights
from minigpt5.config import default_model_folder, fits_distilled
from minigpt5.engine.denoising import Denoising
from minigpt5.model.decoders.noise import SAMPLERS
from minigpt5.pipeline import MiniGPT5
from minigpt5.storybook.captions import FACTS
from minigpt5.storybook.scorer import Scorer, load_scorer
from minigpt5.types import DISTILLED, DrawRequest, DrawSettings, Vokens

STEPS = (1, 2, 4, 8, 20, 50)
BATCH_SIZE = 8


def count_calls(model: MiniGPT5, settings: DrawSettings) -> int:
    """UNet samples of one picture: calls, and twice as many with guidance."""
    width = model.config.condition_width
    picture = Denoising(
        model.decoder.diffusion,
        torch.zeros(model.config.condition_length, width),
        seed=0,
        draw=settings,
        guidance_rescale=0.0,
    )
    return picture.num_calls_left * (2 if picture.is_guided else 1)


def measure_one(
    model: MiniGPT5, scorer: Scorer, asked: Sequence[Asked], vokens: Sequence[Vokens], settings: DrawSettings
) -> dict[str, object]:
    began = time.perf_counter()
    pictures = []
    for start in range(0, len(asked), BATCH_SIZE):
        batch = zip(asked[start : start + BATCH_SIZE], vokens[start : start + BATCH_SIZE], strict=True)
        requests = [DrawRequest(vokens=one, seed=ask.seed, settings=settings) for ask, one in batch]
        pictures += [pixels_of(picture.png) for picture in model.decoder.draw(requests)]
    seconds = (time.perf_counter() - began) / len(asked)
    pixels = np.stack(pictures)
    shares = accuracy(rights(scorer, pixels, asked))
    return {
        **dataclasses.asdict(settings),
        "unet_samples": count_calls(model, settings),
        "seconds_a_picture": round(seconds, 4),
        "accuracy": {name: shares[name]["share"] for name in (*FACTS, "all")},
        "crispness": crisp(pixels, asked)["both"]["mean"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    parser.add_argument("--model", type=Path, default=default_model_folder())
    parser.add_argument("--num", type=int, default=48, help="captions of held-out pairs")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--guidance", type=float, nargs="+", help="default: 1 and the folder's own")
    parser.add_argument("--schedulers", nargs="+", default=list(SAMPLERS), choices=list(SAMPLERS))
    parser.add_argument("--threads", type=int, help="torch threads; as torch chooses where it is not given")
    parser.add_argument("--out", type=Path, default=Path("benchmarks") / "results" / "steps.json")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = MiniGPT5.from_pretrained(options.model, num_cores=options.threads)
    scorer, asked = load_scorer(), ask(options.num, held_out_pairs=True, split="validation")
    vokens = [model.vokens(one.caption) for one in asked]
    scales = options.guidance or [1.0, model.config.draw.guidance_scale]
    asked_for = [
        dataclasses.replace(own_size(model), steps=steps, guidance_scale=scale, scheduler=scheduler)
        for scheduler, scale, steps in itertools.product(options.schedulers, scales, options.steps)
    ]
    has_distilled = model.config.draw_distilled is not None
    rows = []
    print(
        f"{'sampler':<13} {'steps':>5} {'guidance':>8} {'samples':>7} {'s':>7}  "
        + " ".join(f"{n:>5}" for n in (*FACTS, "all", "crisp"))
    )
    for settings in asked_for:
        if settings.scheduler == DISTILLED and not (has_distilled and fits_distilled(settings)):
            continue
        row = measure_one(model, scorer, asked, vokens, settings)
        rows.append(row)
        shares = [*dict(row["accuracy"]).values(), row["crispness"]]  # type: ignore[call-overload]
        print(
            f"{settings.scheduler:<13} {settings.steps:>5} {settings.guidance_scale:>8g} {row['unet_samples']:>7} "
            f"{row['seconds_a_picture']:>7}  " + " ".join(f"{share:5.2f}" for share in shares),
            flush=True,
        )
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m benchmarks.steps", *given])
    report = {
        "ratios": {},
        "figures": {"num": options.num, "fingerprint": model.config.fingerprint, "rows": rows},
        "machine": machine(),
        "command": command,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
