"""Sheets of the shipped model for the eye: `python -m benchmarks.sheets [--out docs/assets]`.

- phrasings.webp: twelve held-out scenes, a row each, asked for in twelve phrasings; the first six columns are of
  families that were trained on, the others have a part that was not.
- sizes.webp: six of the scenes as the VAE paints them, enlarged, above the same latents through the second
  decoder, where the model has one.
- outside.webp: what prompts outside of the picture world get.
- sheet.webp: eight held-out scenes, what the text encoder makes of them, and what the vokens make.
- story.png: the pictures of the story in docs/quickstart.md, whose texts are printed.

`--examples` draws the pictures of the model's examples again, in its folder. One seed for each picture, no selection.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.drawing import draw, own_size
from benchmarks.phrasings import SEED
from benchmarks.pixels import pixels_of
from benchmarks.quality import ask, draw_base
from minigpt5.config import default_model_folder
from minigpt5.model.base_models import resolve
from minigpt5.model.text_encoder import load_text_encoder
from minigpt5.pipeline import MiniGPT5
from minigpt5.storybook.captions import Facts
from minigpt5.storybook.phrasings import phrase
from minigpt5.storybook.scenes import draw_scene, scene_at
from training.storybook.sprites import enlarged

NUM_SCENES, NUM_PHRASINGS, NUM_SIZES = 12, 12, 6
CELL_PX, GAP_PX = 80, 2
OUTSIDE = ("A giraffe plays the piano", "An astronaut rides a bicycle on the moon")
"""Neither a giraffe, a piano, an astronaut nor the moon's ground is in the picture world; a bicycle is."""
SHEET_PX = 192
EXAMPLE_PX = 128
STORY = ("A fox who finds a balloon", 7)
"""Prompt and seed of the story in docs/quickstart.md."""
QUALITY = 90


def texts_of(scene_number: int, num: int) -> list[str]:
    """A held-out scene in `num` phrasings, the first half of seen families."""
    facts = Facts.of(scene_at(scene_number, seed=SEED, split="heldout", held_out_pairs=True))
    return [
        phrase(facts, np.random.default_rng([SEED, scene_number, column]), "seen" if column < num // 2 else "unseen")
        for column in range(num)
    ]


def sheet(rows: Sequence[Sequence[np.ndarray] | np.ndarray], cell_px: int) -> Image.Image:
    """Rows of pictures with gaps between them."""
    step = cell_px + GAP_PX
    canvas = Image.new("RGB", (len(rows[0]) * step - GAP_PX, len(rows) * step - GAP_PX), "white")
    for y, row in enumerate(rows):
        for x, pixels in enumerate(row):
            picture = Image.fromarray(pixels).resize((cell_px, cell_px), Image.Resampling.LANCZOS)
            canvas.paste(picture, (x * step, y * step))
    return canvas


def save_phrasings(model: MiniGPT5, path: Path, *, num_scenes: int = NUM_SCENES, num: int = NUM_PHRASINGS) -> None:
    rows = [draw(model, texts_of(number, num), own_size(model), seeds=range(num)) for number in range(num_scenes)]
    sheet(rows, CELL_PX).save(path, quality=QUALITY)


def save_sizes(model: MiniGPT5, path: Path, *, num: int = NUM_SIZES) -> None:
    """Of a model with a second decoder."""
    texts = [texts_of(number, NUM_PHRASINGS)[0] for number in range(num)]
    small = [enlarged(pixels, model.config.upscale) for pixels in draw(model, texts, own_size(model), seeds=range(num))]
    large = draw(model, texts, model.config.default_draw, seeds=range(num))
    sheet([small, large], large[0].shape[0]).save(path, quality=QUALITY)


def save_outside(model: MiniGPT5, path: Path) -> None:
    drawn = draw(model, OUTSIDE, model.config.default_draw, seeds=range(len(OUTSIDE)))
    sheet([drawn], drawn[0].shape[0]).save(path, quality=QUALITY)


def save_held_out(model: MiniGPT5, path: Path, *, num: int = 8) -> None:
    asked = ask(num, held_out_pairs=True)
    settings = model.config.default_draw
    text_encoder = load_text_encoder(resolve(model.config.text_encoder), model.config)
    true = [draw_scene(one.scene, scale=model.config.upscale) for one in asked]
    base = draw_base(model, text_encoder, asked, settings)
    drawn = draw(model, [one.caption for one in asked], settings, seeds=[one.seed for one in asked])
    sheet([true, base, drawn], SHEET_PX).save(path, quality=QUALITY)


def save_story(model: MiniGPT5, path: Path) -> None:
    story = model.write(STORY[0], pages=4, seed=STORY[1], progress=False)
    pictures = [pixels_of(page.picture.png) for page in story.pages if page.picture]
    sheet([pictures], pictures[0].shape[0]).save(path, optimize=True)
    for page in story.pages:
        print(f"{page.index}. {page.text.strip()}")


def save_examples(model: MiniGPT5, folder: Path) -> None:
    examples = model.config.examples
    pictures = draw(model, examples, model.config.default_draw, seeds=range(len(examples)))
    for number, pixels in enumerate(pictures, 1):
        small = Image.fromarray(pixels).resize((EXAMPLE_PX, EXAMPLE_PX), Image.Resampling.LANCZOS)
        small.save(folder / f"{number}.webp", quality=QUALITY)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sheets", description=__doc__)
    parser.add_argument("--model", type=Path, default=default_model_folder())
    parser.add_argument("--out", type=Path, default=Path("docs") / "assets", help="folder (default %(default)s)")
    parser.add_argument("--examples", action="store_true", help="draw the pictures of the model's examples, too")
    options = parser.parse_args(arguments)
    model = MiniGPT5.from_pretrained(options.model)
    save_phrasings(model, options.out / "phrasings.webp")
    if model.config.upscale > 1:
        save_sizes(model, options.out / "sizes.webp")
    save_outside(model, options.out / "outside.webp")
    save_held_out(model, options.out / "sheet.webp")
    save_story(model, options.out / "story.png")
    if options.examples:
        save_examples(model, options.model / "examples")


if __name__ == "__main__":
    main()
