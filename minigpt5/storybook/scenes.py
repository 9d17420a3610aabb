"""A seed -> a Scene (its facts), and a Scene -> a picture of 128 x 128 pixels, composed from emoji sprites.

A picture can be drawn `scale` times as large: the same picture, with more detail.

Sprites: Noto emoji (Apache-2.0), one sheet of 96 px tiles and, for larger pictures, one of 128 px tiles that
training/storybook/sprite_sheet.py draws, in the order of SPRITES.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

IMAGE_PX = 128
TILE_PX, LARGE_TILE_PX, TILES_PER_ROW = 96, 128, 10
SPRITE_PX = (44, 60)
"""Smallest and largest side of a sprite in a scene; smaller ones do not survive the VAE."""

CHARACTERS = [
    "fox",
    "rabbit-face",
    "penguin",
    "owl",
    "elephant",
    "lion",
    "cat",
    "dog",
    "cow-face",
    "pig",
    "horse",
    "duck",
    "bird",
    "turtle",
    "frog",
    "whale",
    "bear",
    "panda",
    "tiger",
    "monkey",
    "mouse",
    "chicken",
    "snail",
    "unicorn",
    "dragon",
    "robot",
    "ghost",
    "princess",
    "snowman",
    "butterfly",
]
OBJECTS = [
    "house",
    "castle",
    "tent",
    "evergreen-tree",
    "palm-tree",
    "cactus",
    "mushroom",
    "sunflower",
    "tulip",
    "red-apple",
    "banana",
    "balloon",
    "bicycle",
    "automobile",
    "bus",
    "locomotive",
    "sailboat",
    "rocket",
    "tractor",
    "fire",
    "wrapped-gift",
    "birthday-cake",
    "soccer-ball",
    "umbrella",
]
SKY_SPRITES = ("sun", "crescent-moon", "cloud")
SPRITES = (*CHARACTERS, *OBJECTS, *SKY_SPRITES)
PLACES = ("meadow", "beach", "snow", "forest", "road", "desert")
TIMES = ("day", "sunset", "night", "rain")

Colour = tuple[int, ...]
Split = Literal["train", "validation", "heldout"]
_SPLIT_OFFSET = {"train": 0, "validation": 1, "heldout": 2}

SKY = {  # top and horizon colour
    "day": ((110, 185, 240), (190, 225, 250)),
    "sunset": ((240, 120, 70), (250, 200, 120)),
    "night": ((15, 20, 60), (45, 55, 110)),
    "rain": ((140, 150, 160), (185, 190, 195)),
}
GROUND = {
    "meadow": (112, 178, 76),
    "beach": (240, 214, 150),
    "snow": (240, 246, 252),
    "forest": (56, 108, 58),
    "road": (112, 112, 118),
    "desert": (222, 158, 88),
}
GROUND_LIGHT = {"day": 1.0, "sunset": 0.92, "night": 0.5, "rain": 0.8}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The facts of a picture. `seed` fixes what the facts leave open: sizes, heights, colours' last few levels."""

    who: str
    what: str
    side: Literal["left", "right"]
    """Where the character stands; the object is on the other side."""
    place: str
    time: str
    seed: int


def is_held_out(who: str, what: str) -> bool:
    """Combinations that no training ever sees."""
    return (7 * CHARACTERS.index(who) + OBJECTS.index(what)) % 3 == 0


def scene_at(index: int, *, seed: int, split: Split = "train", held_out_pairs: bool | None = False) -> Scene:
    """Scene number `index`: a pure function of its arguments, and splits never share a random stream.

    `held_out_pairs`: only held-out combinations (True), none of them (False) or both (None).
    """
    rng = np.random.default_rng([_SPLIT_OFFSET[split], seed, index])
    while True:
        who, what = CHARACTERS[rng.integers(len(CHARACTERS))], OBJECTS[rng.integers(len(OBJECTS))]
        if held_out_pairs is None or is_held_out(who, what) == held_out_pairs:
            break
    return Scene(
        who=who,
        what=what,
        side="left" if rng.random() < 0.5 else "right",
        place=PLACES[rng.integers(len(PLACES))],
        time=TIMES[rng.integers(len(TIMES))],
        seed=int(rng.integers(2**31)),
    )


def scenes(seed: int, *, split: Split = "train", held_out_pairs: bool | None = False) -> Iterator[Scene]:
    """Endless scenes, in the order of their index."""
    for index in itertools.count():
        yield scene_at(index, seed=seed, split=split, held_out_pairs=held_out_pairs)


def draw_scene(scene: Scene, *, scale: int = 1) -> np.ndarray:
    """The picture of a scene: (128 scale, 128 scale, 3) uint8."""
    return _compose(scene, scale)[0]


def sprite_boxes(scene: Scene) -> dict[str, tuple[int, int, int, int]]:
    """Where the character and the object stand: name -> (left, top, right, bottom) in pixels of scale 1."""
    return _compose(scene, 1)[1]


def _compose(scene: Scene, scale: int) -> tuple[np.ndarray, dict[str, tuple[int, int, int, int]]]:
    """Boxes are those of scale 1."""
    rng = np.random.default_rng(scene.seed)
    canvas = _background(scene, rng, scale)
    _paste_sky_sprite(canvas, scene.time, rng, scale)
    boxes = {}
    for name, on_left in ((scene.what, scene.side == "right"), (scene.who, scene.side == "left")):
        side_px = int(rng.integers(SPRITE_PX[0], SPRITE_PX[1] + 1))
        width, height = sprite_image(name, side_px).size
        half = IMAGE_PX // 2
        free = half - width
        x = (0 if on_left else half) + int(rng.integers(max(0, free) + 1)) + min(0, free) // 2
        x = min(max(x, 0), IMAGE_PX - width)
        bottom = int(rng.integers(98, 120))
        boxes[name] = (x, bottom - height, x + width, bottom)
        _paste(canvas, name, side_px, (x, bottom - height), scale)
    return np.asarray(canvas), boxes


def _paste(canvas: Image.Image, name: str, side_px: int, corner: tuple[int, int], scale: int) -> None:
    """`side_px` and `corner` are of scale 1."""
    sprite = sprite_image(name, side_px, scale=scale)
    canvas.paste(sprite, (corner[0] * scale, corner[1] * scale), sprite)


def _background(scene: Scene, rng: np.random.Generator, scale: int) -> Image.Image:
    horizon = int(rng.integers(70, 82))
    top, bottom = (np.clip(np.array(c, float) + rng.uniform(-8, 8), 0, 255) for c in SKY[scene.time])
    ramp = np.linspace(0, 1, horizon * scale)[:, None]
    sky_YC = top * (1 - ramp) + bottom * ramp
    near = np.array(GROUND[scene.place], float) * GROUND_LIGHT[scene.time] + rng.uniform(-6, 6)
    depth = np.linspace(0.88, 1.04, (IMAGE_PX - horizon) * scale)[:, None]
    ground_YC = near * depth
    rows_YC = np.clip(np.concatenate([sky_YC, ground_YC]), 0, 255).astype(np.uint8)
    canvas = Image.fromarray(np.repeat(rows_YC[:, None, :], IMAGE_PX * scale, axis=1))
    pen = _Pen(canvas, scale)
    shade = tuple(int(c) for c in np.clip(near * 0.8, 0, 255))
    light = GROUND_LIGHT[scene.time]
    if scene.place == "beach":  # a strip of sea under the horizon
        sea = tuple(int(c * light) for c in (64, 150, 190))
        pen.rectangle((0, horizon, IMAGE_PX, horizon + 9), sea)
    elif scene.place == "road":  # lane marks
        for x in range(int(rng.integers(24)) - 24, IMAGE_PX, 24):
            pen.rectangle((x, 121, x + 12, 123), tuple(int(235 * light) for _ in range(3)))
    elif scene.place == "forest":  # a row of dark tree tops on the horizon
        for x in range(int(rng.integers(12)) - 12, IMAGE_PX, 12):
            height = int(rng.integers(10, 18))
            pen.polygon([(x, horizon), (x + 6, horizon - height), (x + 12, horizon)], shade)
    elif scene.place == "desert":  # a dune
        x = int(rng.integers(0, 90))
        pen.ellipse((x - 40, horizon - 8, x + 60, horizon + 20), tuple(int(c) for c in near * 0.9))
    elif scene.place == "snow":  # hills of snow
        x = int(rng.integers(0, 90))
        pen.ellipse((x - 30, horizon - 10, x + 50, horizon + 24), tuple(int(c) for c in near * 0.96))
    else:  # meadow: tufts of grass
        for _ in range(14):
            x, y = int(rng.integers(IMAGE_PX)), int(rng.integers(horizon + 6, IMAGE_PX))
            pen.line((x, y, x + 2, y - 4), shade)
    if scene.time == "rain":
        for _ in range(26):
            x, y = int(rng.integers(IMAGE_PX)), int(rng.integers(horizon))
            pen.line((x, y, x - 2, y + 6), (112, 128, 150))
    if scene.time == "night":
        for _ in range(9):
            x, y = int(rng.integers(IMAGE_PX)), int(rng.integers(48))
            pen.rectangle((x, y, x + 1, y + 1), (235, 235, 215))
    return canvas


class _Pen:
    """Draws in coordinates of scale 1, whose pixels are squares of `scale`: a box ends with its last pixel."""

    def __init__(self, canvas: Image.Image, scale: int) -> None:
        self._pen, self._scale = ImageDraw.Draw(canvas), scale

    def rectangle(self, box: tuple[int, int, int, int], fill: Colour) -> None:
        self._pen.rectangle(self._box(box), fill=fill)

    def ellipse(self, box: tuple[int, int, int, int], fill: Colour) -> None:
        self._pen.ellipse(self._box(box), fill=fill)

    def polygon(self, corners: Sequence[tuple[int, int]], fill: Colour) -> None:
        self._pen.polygon([(x * self._scale, y * self._scale) for x, y in corners], fill=fill)

    def line(self, ends: tuple[int, int, int, int], fill: Colour) -> None:
        x0, y0, x1, y1 = (value * self._scale for value in ends)
        self._pen.line((x0, y0, x1, y1), fill=fill, width=self._scale)

    def _box(self, box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        left, top, right, bottom = box
        scale = self._scale
        return left * scale, top * scale, (right + 1) * scale - 1, (bottom + 1) * scale - 1


def _paste_sky_sprite(canvas: Image.Image, time: str, rng: np.random.Generator, scale: int) -> None:
    name = {"day": "sun", "sunset": "sun", "night": "crescent-moon", "rain": "cloud"}[time]
    side_px = int(rng.integers(22, 29))
    y = int(rng.integers(30, 40)) if time == "sunset" else int(rng.integers(2, 10))
    x = int(rng.integers(4, IMAGE_PX - sprite_image(name, side_px).width - 4))
    _paste(canvas, name, side_px, (x, y), scale)


@functools.lru_cache(maxsize=4096)
def sprite_image(name: str, side_px: int, *, scale: int = 1) -> Image.Image:
    """A sprite with transparency, its longer side scaled to `side_px`, then `scale` times as large: to the pixel, so
    that it stands where the small one does."""
    tile = _tile(name, "sprites.png", TILE_PX)
    shrink = side_px / max(tile.size)
    width, height = (max(1, round(side * shrink)) for side in tile.size)
    if scale > 1:
        tile = _tile(name, "sprites-large.webp", LARGE_TILE_PX)
    return tile.resize((width * scale, height * scale), Image.Resampling.LANCZOS)


@functools.cache
def sprite_contrast(name: str) -> float:
    """How much a sprite's colours differ: the spread of its opaque pixels, of 1; elephant 0.08, panda 0.36."""
    pixels_YXC = np.asarray(sprite_image(name, SPRITE_PX[1]), float) / 255
    opaque_NC = pixels_YXC[pixels_YXC[..., 3] > 0.5, :3]
    return float(np.sqrt(opaque_NC.var(axis=0).mean()))


def _tile(name: str, sheet: str, tile_px: int) -> Image.Image:
    """A sprite of a sheet, cut to its visible part."""
    row, column = divmod(SPRITES.index(name), TILES_PER_ROW)
    x, y = column * tile_px, row * tile_px
    tile = _sheet(sheet).crop((x, y, x + tile_px, y + tile_px))
    return tile.crop(tile.getchannel("A").getbbox())


@functools.cache
def _sheet(name: str) -> Image.Image:
    with (files("minigpt5.storybook") / name).open("rb") as file:
        return Image.open(file).convert("RGBA")
