"""`python -m training.scorer [minutes=8]`: train and measure the judge of pictures in models/scorer/.

On one thread, from scenes drawn on the fly: blurred, recoloured, compressed, on foreign backgrounds, and some
with a sprite missing, which it must not name. The pairs that every training holds out are held out here too.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from minigpt5.model.pixels import to_tensor
from minigpt5.model.weights import save_module
from minigpt5.storybook.captions import FACTS, Facts
from minigpt5.storybook.scenes import (
    CHARACTERS,
    IMAGE_PX,
    OBJECTS,
    PLACES,
    TIMES,
    Scene,
    draw_scene,
    is_held_out,
    scene_at,
    sprite_boxes,
    sprite_image,
)
from minigpt5.storybook.scorer import SIDES, WEIGHTS, Scorer, default_scorer_folder, load_scorer

SEED = 11
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
FOREIGN, MISSING = 0.25, 0.08
"""Shares of scenes on a background that is no place, and of each sprite left out."""
UNKNOWN = -100
"""A label without a loss."""


@dataclass(frozen=True, kw_only=True)
class Example:
    pixels: np.ndarray
    labels: tuple[int, int, int, int]
    """Labels, numbered as the logits of `Scorer.forward`."""


def example_at(index: int) -> Example:
    """Training picture number `index`."""
    rng = np.random.default_rng([SEED, index])
    scene = scene_at(index, seed=SEED)
    shown = {scene.who: rng.random() >= MISSING, scene.what: rng.random() >= MISSING}
    is_foreign = rng.random() < FOREIGN
    pixels = draw_scene(scene)
    if is_foreign or not all(shown.values()):
        background = foreign_background(rng) if is_foreign else without_sprites(pixels, scene)
        pixels = with_sprites(background, scene, [name for name, is_shown in shown.items() if is_shown])
    side = SIDES.index(scene.side)
    labels = (
        side * len(CHARACTERS) + CHARACTERS.index(scene.who) if shown[scene.who] else 2 * len(CHARACTERS),
        (1 - side) * len(OBJECTS) + OBJECTS.index(scene.what) if shown[scene.what] else 2 * len(OBJECTS),
        UNKNOWN if is_foreign else PLACES.index(scene.place),
        UNKNOWN if is_foreign else TIMES.index(scene.time),
    )
    return Example(pixels=disturb(pixels, rng), labels=labels)


def without_sprites(pixels: np.ndarray, scene: Scene) -> np.ndarray:
    """The empty background: each row inside a sprite's box becomes that row's median outside all boxes."""
    empty = pixels.copy()
    boxes = sprite_boxes(scene).values()
    is_free_X = np.ones(IMAGE_PX, bool)
    for left, _, right, _ in boxes:
        is_free_X[left:right] = False
    free = pixels[:, is_free_X] if is_free_X.any() else pixels[:, :1]
    median_YC = np.median(free, axis=1).astype(np.uint8)
    for left, top, right, bottom in boxes:
        empty[top:bottom, left:right] = median_YC[top:bottom, None]
    return empty


def with_sprites(background: np.ndarray, scene: Scene, names: list[str]) -> np.ndarray:
    """The named sprites of a scene, where they stand, on another background."""
    canvas = Image.fromarray(background)
    for name, (left, top, right, bottom) in sprite_boxes(scene).items():
        if name in names:
            sprite = sprite_image(name, max(right - left, bottom - top))
            canvas.paste(sprite, (left, top), sprite)
    return np.asarray(canvas)


def foreign_background(rng: np.random.Generator) -> np.ndarray:
    """Soft random colours."""
    cells = int(rng.integers(2, 9))
    colours = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return np.asarray(colours.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC))


def disturb(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur, coarse pixels, other colours, compression and noise, each by chance."""
    image = Image.fromarray(pixels)
    if rng.random() < 0.6:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 2.2)))
    if rng.random() < 0.15:
        coarse = int(rng.integers(40, 100))
        image = image.resize((coarse, coarse), Image.Resampling.BILINEAR).resize((IMAGE_PX, IMAGE_PX))
    if rng.random() < 0.25:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(rng.integers(20, 90)))
        image = Image.open(file)
    values: np.ndarray = np.asarray(image).astype(np.float32)
    if rng.random() < 0.6:
        values = values * rng.uniform(0.85, 1.15, 3) + rng.uniform(-14, 14, 3)
    if rng.random() < 0.3:
        values = values + rng.normal(0, rng.uniform(1, 10), values.shape)
    return values.clip(0, 255).astype(np.uint8)


def train(scorer: Scorer, *, minutes: float, report: Callable[[str], None] = print) -> int:
    """Cosine schedule over the time given; returns the number of pictures seen."""
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    start = time.monotonic()
    step, done = 0, 0.0
    while done < 1:
        rows = [example_at(step * BATCH_SIZE + number) for number in range(BATCH_SIZE)]
        labels = torch.tensor([row.labels for row in rows])
        logits = scorer(to_tensor(np.stack([row.pixels for row in rows])))
        losses = [
            F.cross_entropy(logit, label, ignore_index=UNKNOWN, reduction="sum") / len(label)
            for logit, label in zip(logits, labels.T, strict=True)
        ]
        done = (time.monotonic() - start) / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * min(done, 1)))
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            named = " ".join(
                f"{name} {loss:.3f}" for name, loss in zip(("who", "what", "place", "time"), losses, strict=True)
            )
            report(f"step {step} {done:.0%} {named}")
    return step * BATCH_SIZE


def measure(scorer: Scorer, *, num: int = 1000) -> dict[str, dict[str, float]]:
    """Shares of facts read rightly on scenes it has not seen, and of wrong pictures it takes for right."""
    seen = [scene_at(index, seed=SEED, split="validation") for index in range(num)]
    held_out = [scene_at(index, seed=SEED, split="heldout", held_out_pairs=True) for index in range(num)]
    figures = {
        "true scenes, seen pairs": shares(scorer, seen),
        "true scenes, held-out pairs": shares(scorer, held_out),
    }
    for radius in (1.0, 1.5, 2.0):
        figures[f"blur {radius} px, held-out pairs"] = shares(scorer, held_out, blur_px=radius)
    rng = np.random.default_rng(SEED)
    for name in ("who", "what"):
        others = [swapped(scene, name, rng) for scene in seen]
        for kind, radius in (("", 0.0), (", blur 1.5 px", 1.5)):
            answers = scorer.score(np.stack([blur(draw_scene(scene), radius) for scene in others]))
            wrong = [vars(a)[name] == vars(s)[name] for a, s in zip(answers, seen, strict=True)]
            figures[f"{name} swapped{kind}"] = {"accepted": float(np.mean(wrong))}
        emptied = [
            with_sprites(without_sprites(draw_scene(s), s), s, [s.what if name == "who" else s.who]) for s in seen
        ]
        named = [vars(answer)[name] is not None for answer in scorer.score(np.stack(emptied))]
        figures[f"{name} missing"] = {"named": float(np.mean(named))}
    return figures


def shares(scorer: Scorer, scenes: list[Scene], *, blur_px: float = 0.0) -> dict[str, float]:
    answers = scorer.score(np.stack([blur(draw_scene(scene), blur_px) for scene in scenes]))
    facts = [Facts.of(scene) for scene in scenes]
    right = {
        name: float(np.mean([vars(a)[name] == vars(f)[name] for a, f in zip(answers, facts, strict=True)]))
        for name in FACTS
    }
    return {**right, "all": float(np.mean([a == f for a, f in zip(answers, facts, strict=True)]))}


def swapped(scene: Scene, name: str, rng: np.random.Generator) -> Scene:
    """The same scene with another character or object: a picture that does not show what is asked for."""
    names = CHARACTERS if name == "who" else OBJECTS
    while True:
        chosen = names[rng.integers(len(names))]
        other = replace(scene, who=chosen) if name == "who" else replace(scene, what=chosen)
        if other != scene and not is_held_out(other.who, other.what):
            return other


def blur(pixels: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def readme(figures: dict[str, dict[str, float]], *, num_pictures: int, minutes: float) -> str:
    lines = [f"| {name} | {', '.join(f'{k} {v:.3f}' for k, v in values.items())} |" for name, values in figures.items()]
    table = "\n".join(["| pictures | |", "| --- | --- |", *lines])
    return (
        "# The scorer\n\nReads from a picture who, what, side, place and time: "
        "the judge of this project's picture figures.\n\n"
        f"    python -m training.scorer minutes={minutes:g}\n\n"
        f"One thread, {num_pictures:,} pictures, all of the training split. "
        f"Shares of 1,000 scenes never seen, by the float16 weights in this folder:\n\n{table}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.scorer", description=__doc__)
    parser.add_argument("settings", nargs="*", help="minutes=8")
    parser.add_argument("--out", type=Path, default=default_scorer_folder())
    options = parser.parse_intermixed_args()
    settings = dict(setting.partition("=")[::2] for setting in options.settings)
    try:
        minutes = float(settings.pop("minutes", 8))
    except ValueError as error:
        parser.error(f"minutes is not a number: {error}")
    if settings:
        parser.error(f"unknown setting {', '.join(settings)}; there is only minutes=8")
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    scorer = Scorer()
    num_pictures = train(scorer, minutes=minutes, report=lambda line: print(line, flush=True))
    save_module(scorer, options.out / WEIGHTS)
    figures = measure(load_scorer(options.out))
    for name, values in figures.items():
        print(name, {key: round(value, 4) for key, value in values.items()}, flush=True)
    (options.out / "README.md").write_text(readme(figures, num_pictures=num_pictures, minutes=minutes))


if __name__ == "__main__":
    main()
