"""How sharply a picture shows a sprite, and where: the best correlation with the sprite itself. It forgives nothing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minigpt5.storybook.scenes import IMAGE_PX, SPRITE_PX, sprite_image

CRISPNESS_PX = tuple(range(SPRITE_PX[0], SPRITE_PX[1] + 1, 4))
"""Template sizes. A size between two of them costs a true scene a little: it reaches 0.92, not 1."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where a sprite fits a picture best."""

    correlation: float
    side_px: int
    """The sprite's longer side."""
    top: int
    left: int


def crispness(pixels: np.ndarray, key: str, *, with_colour: bool = False) -> float:
    """How sharply one picture (Y, X, 3) uint8 of any scale shows the sprite `key`, at any place and size; at most 1.

    The best normalised correlation of the sprite's template with the picture under the template's opaque pixels, each
    colour channel around its own mean there: details alone. True scenes reach about 0.92 (the sizes between
    CRISPNESS_PX cost them 0.05), a blur of 1.5 px 0.81. `with_colour`: all channels around one mean, so that having the
    sprite's colours counts as well: 0.95 and 0.89.
    """
    spectra = _Spectra.of(pixels)
    found = (_best_place(spectra, key, side_px, with_colour=with_colour) for side_px in CRISPNESS_PX)
    return max(0.0, *(place.correlation for place in found))


def find_sprite(pixels: np.ndarray, key: str, *, columns: tuple[int, int]) -> Found:
    """Where the sprite `key` fits best between two columns of a picture (Y, X, 3) uint8, at any size of a scene's
    sprites to the pixel."""
    spectra = _Spectra.of(pixels)

    def best(sizes: Sequence[int]) -> Found:
        found = [_best_place(spectra, key, side_px, columns=columns) for side_px in sizes]
        return max(found, key=lambda place: place.correlation)

    near = best(CRISPNESS_PX).side_px
    smallest, largest = SPRITE_PX
    return best(range(max(smallest, near - 3), min(largest, near + 3) + 1))


@dataclass(frozen=True, kw_only=True)
class _Spectra:
    """Spectra of a picture's channels, and of the sum of their squares."""

    shape: tuple[int, int]
    scale: int
    """Pixels for each one of a scene of scale 1."""
    channels_CYX: Tensor
    squares_YX: Tensor

    @classmethod
    def of(cls, pixels: np.ndarray) -> _Spectra:
        picture_CYX = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).double() / 255
        return cls(
            shape=pixels.shape[:2],
            scale=pixels.shape[1] // IMAGE_PX,
            channels_CYX=torch.fft.rfft2(picture_CYX),
            squares_YX=torch.fft.rfft2((picture_CYX**2).sum(0)),
        )


@torch.no_grad()
def _best_place(
    spectra: _Spectra, key: str, side_px: int, *, columns: tuple[int, int] | None = None, with_colour: bool = False
) -> Found:
    template_CYX, mask_YX = _template(key, side_px, with_colour, spectra.scale)
    height, width = spectra.shape
    rows, row_columns = mask_YX.shape
    of_mask = torch.fft.rfft2(mask_YX, s=spectra.shape).conj()
    of_template = torch.fft.rfft2(template_CYX, s=spectra.shape).conj()

    def correlate(product: Tensor) -> Tensor:
        """The places at which all of the template lies in the picture."""
        return torch.fft.irfft2(product, s=spectra.shape)[..., : height - rows + 1, : width - row_columns + 1]

    common_YX = correlate((spectra.channels_CYX * of_template).sum(0))
    sums_CYX = correlate(spectra.channels_CYX * of_mask)
    of_mean_YX = sums_CYX.sum(0) ** 2 / 3 if with_colour else (sums_CYX**2).sum(0)
    variance_YX = correlate(spectra.squares_YX * of_mask) - of_mean_YX / mask_YX.sum()
    energy_YX = variance_YX.clamp_min(1e-3) * (template_CYX**2).sum()  # flat regions have no correlation
    first, last = columns or (0, width)
    correlation_YX = (common_YX / energy_YX.sqrt())[:, first : max(first, last - row_columns + 1)]
    if not correlation_YX.numel():  # wider than the columns
        return Found(correlation=-1.0, side_px=side_px, top=0, left=first)
    best = int(correlation_YX.argmax())
    top, left = divmod(best, correlation_YX.shape[1])
    return Found(correlation=float(correlation_YX[top, left]), side_px=side_px, top=top, left=first + left)


@functools.lru_cache(maxsize=2048)
def _template(key: str, side_px: int, with_colour: bool, scale: int) -> tuple[Tensor, Tensor]:
    """Colours around their mean, see `crispness`: (3, Y, X), zero outside the mask (Y, X) of opaque pixels."""
    sprite = torch.from_numpy(np.array(sprite_image(key, side_px, scale=scale))).double() / 255
    mask_YX = (sprite[..., 3] > 0.5).double()
    colours_CYX = sprite[..., :3].permute(2, 0, 1)
    mean_C11 = (colours_CYX * mask_YX).sum((1, 2), keepdim=True) / mask_YX.sum()
    if with_colour:
        mean_C11 = mean_C11.mean()
    return (colours_CYX - mean_C11) * mask_YX, mask_YX
