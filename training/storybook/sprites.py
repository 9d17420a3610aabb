"""The sprites of a picture: where they are, how much an error counts there, and the picture with new ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from minigpt5.storybook.crispness import find_sprite
from minigpt5.storybook.scenes import IMAGE_PX, Scene, sprite_boxes, sprite_contrast, sprite_image

SPRITE_WEIGHT = 3.0
"""How much an error counts within a sprite of TYPICAL_CONTRAST."""
TYPICAL_CONTRAST = 0.2
MIN_CORRELATION = 0.42
"""Lowest correlation of a sprite that is there, even if not crisp; another sprite seldom reaches it."""
REACH_PX = 4
"""How far a sprite may stand beyond the middle of its picture."""
HALO_PX = 8
"""How far from a sprite there may be what was drawn in doubt of its place."""
MIN_BACKGROUND_PX = 4
"""Pixels of a row beside all sprites, at least, to tell what is behind them."""
MAX_SPREAD = 32.0
"""Levels within which four in five of them lie: tree tops or the sun beside a sprite do not say what is behind it."""


@dataclass(frozen=True, kw_only=True)
class Sprite:
    """A sprite at its place in a picture."""

    name: str
    side_px: int
    left: int
    top: int
    scale: int = 1
    """How many times as large the picture is; all other numbers are those of scale 1."""

    @property
    def image(self) -> Image.Image:
        return sprite_image(self.name, self.side_px, scale=self.scale)

    @property
    def corner(self) -> tuple[int, int]:
        """Column and row of the picture where it begins."""
        return self.left * self.scale, self.top * self.scale

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns."""
        image, (left, top) = self.image, self.corner
        return slice(top, top + image.height), slice(left, left + image.width)

    def mask(self) -> np.ndarray:
        """Its opaque pixels: (Y, X) bool."""
        mask_YX = np.zeros((IMAGE_PX * self.scale,) * 2, bool)
        mask_YX[self.window] = np.asarray(self.image.getchannel("A")) > 127
        return mask_YX


def sprites_of(scene: Scene, *, scale: int = 1) -> list[Sprite]:
    """The object, then the character that may stand before it."""
    return [
        Sprite(name=name, side_px=max(right - left, bottom - top), left=left, top=top, scale=scale)
        for name, (left, top, right, bottom) in sprite_boxes(scene).items()
    ]


def find_sprites(pixels: np.ndarray, scene: Scene) -> list[Sprite]:
    """As `sprites_of`, where they stand in a picture (Y, X, 3) uint8 that was drawn of the scene's facts; without those
    that are not to be seen in it."""
    half, found = IMAGE_PX // 2, []
    for name, on_left in ((scene.what, scene.side == "right"), (scene.who, scene.side == "left")):
        columns = (0, half + REACH_PX) if on_left else (half - REACH_PX, IMAGE_PX)
        place = find_sprite(pixels, name, columns=columns)
        if place.correlation >= MIN_CORRELATION:
            found.append(Sprite(name=name, side_px=place.side_px, left=place.left, top=place.top))
    return found


def error_weight(sprites: Sequence[Sprite], *, around: float, scale: int = 1) -> np.ndarray:
    """How much an error counts at each pixel of a picture of a scale: (1, Y, X), `around` the sprites in their boxes.

    The more on a sprite, the less its colours differ: an elephant's folds are no less of it than a panda's patches. The
    power lies between those that would count absolute (1) and squared errors (2) relative to the contrast."""
    weight = np.ones((1, IMAGE_PX * scale, IMAGE_PX * scale), np.float32)
    for sprite in sprites:
        weight[0][sprite.window] = around
    for sprite in sprites:
        weight[0][sprite.mask()] = SPRITE_WEIGHT * (TYPICAL_CONTRAST / sprite_contrast(sprite.name)) ** 1.5
    return weight


def cleared(pixels: np.ndarray, sprites: Sequence[Sprite]) -> np.ndarray:
    """A picture without its sprites and their halos: in each row, what is behind them is taken for the median of what
    is beside them all, if that is of one colour."""
    mask = Image.fromarray(np.any([sprite.mask() for sprite in sprites], axis=0).astype(np.uint8))
    is_beside_YX = np.array(mask.filter(ImageFilter.MaxFilter(2 * HALO_PX + 1))) == 0
    clear = pixels.copy()
    for row, beside, is_beside in zip(clear, pixels, is_beside_YX, strict=True):
        if is_beside.all() or is_beside.sum() < MIN_BACKGROUND_PX:
            continue
        low, middle, high = np.quantile(beside[is_beside], (0.1, 0.5, 0.9), axis=0)
        if (high - low).max() <= MAX_SPREAD:
            row[~is_beside] = np.rint(middle)
    return clear


def redrawn(pixels: np.ndarray, sprites: Sequence[Sprite]) -> np.ndarray:
    """A picture with sprites as they are in place of what it shows there."""
    canvas = Image.fromarray(pixels)
    for sprite in sprites:
        canvas.paste(sprite.image, sprite.corner, sprite.image)
    return np.array(canvas)


def enlarged(pixels: np.ndarray, scale: int) -> np.ndarray:
    """A picture resampled to more pixels."""
    picture = Image.fromarray(pixels)
    return np.array(picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC))
