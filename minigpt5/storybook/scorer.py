"""Pictures -> the facts that they show, read by a small classifier; and how crisp a sprite in a picture is.

The judge of every picture figure: trained by `training/scorer.py` on scenes, blurred and recoloured ones
included, so that it forgives what an eye forgives. `crispness` is the other half: it forgives nothing.

Shape letters: B pictures, C channels, Y X rows and columns, K names with a map of their own.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt5.errors import ModelFolderError
from minigpt5.model_folder import load_module
from minigpt5.storybook.captions import Facts
from minigpt5.storybook.scenes import CHARACTERS, OBJECTS, PLACES, SPRITE_PX, TIMES, sprite_image

WEIGHTS = "scorer.safetensors"
SIDES = ("left", "right")
CRISPNESS_PX = tuple(range(SPRITE_PX[0], SPRITE_PX[1] + 1, 4))
"""Template sizes. A size between two of them costs a true scene a little: it reaches 0.92, not 1."""


class Scorer(nn.Module):
    """Five strided stages on 64 px; a map for each character and object, read in its left and right half."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256, 384)) -> None:
        super().__init__()
        stages, width = [], 3
        for wider in widths:
            stages.append(_stage(width, wider))
            width = wider
        self.stages = nn.ModuleList(stages)
        self.maps = nn.Conv2d(width, len(CHARACTERS) + len(OBJECTS), 1)
        rows = 4  # of the last but one stage: sky above, ground below
        self.place = nn.Linear(widths[-2] * rows, len(PLACES))
        self.time = nn.Linear(widths[-2] * rows, len(TIMES))

    def forward(self, pictures_BCYX: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures of 128 px in [-1, 1] -> logits: who x side, what x side, place, time.

        The first two are (B, 2 K + 1): each name on the left, each on the right, and nothing that is known.
        """
        x_BCYX = F.avg_pool2d(pictures_BCYX, 2)
        before_BCYX = x_BCYX
        for stage in self.stages:
            before_BCYX, x_BCYX = x_BCYX, stage(x_BCYX)
        maps_BKYX = self.maps(x_BCYX)
        half = maps_BKYX.shape[-1] // 2
        left_BK = maps_BKYX[..., :half].flatten(2).logsumexp(-1)
        right_BK = maps_BKYX[..., half:].flatten(2).logsumexp(-1)
        nothing_B1 = left_BK.new_zeros(len(left_BK), 1)
        num = len(CHARACTERS)
        who = torch.cat([left_BK[:, :num], right_BK[:, :num], nothing_B1], dim=1)
        what = torch.cat([left_BK[:, num:], right_BK[:, num:], nothing_B1], dim=1)
        rows_B = before_BCYX.mean(-1).flatten(1)
        return who, what, self.place(rows_B), self.time(rows_B)

    @torch.no_grad()
    def score(self, pixels: np.ndarray, *, batch_size: int = 64) -> list[Facts]:
        """What pictures (B, 128, 128, 3) uint8 show; who or what is None where nothing known stands there."""
        answers = []
        for start in range(0, len(pixels), batch_size):
            who, what, place, time = self(to_pictures(pixels[start : start + batch_size]))
            for b in range(len(who)):
                character, side = _read(who[b], CHARACTERS)
                answers.append(
                    Facts(
                        who=character,
                        what=_read(what[b], OBJECTS)[0],
                        side=side,
                        place=PLACES[int(place[b].argmax())],
                        time=TIMES[int(time[b].argmax())],
                    )
                )
        return answers


def _stage(width: int, wider: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, wider, 3, stride=2, padding=1), nn.GroupNorm(8, wider), nn.SiLU())


def _read(logits: Tensor, names: list[str]) -> tuple[str | None, str | None]:
    """The likeliest name over both sides, then its likelier side."""
    left_right = logits[:-1].view(2, -1)
    total = left_right.logsumexp(0)
    best = int(total.argmax())
    if total[best] <= logits[-1]:
        return None, None
    return names[best], SIDES[int(left_right[:, best].argmax())]


def to_pictures(pixels: np.ndarray) -> Tensor:
    """(B, Y, X, 3) uint8 -> (B, 3, Y, X) in [-1, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def default_scorer_folder() -> Path:
    """The scorer of the repository that this package is installed from."""
    return Path(__file__).resolve().parents[2] / "models" / "scorer"


def load_scorer(folder: str | Path | None = None) -> Scorer:
    """The trained scorer, ready to score. Raises ModelFolderError."""
    path = Path(folder or default_scorer_folder()) / WEIGHTS
    if not path.is_file():
        raise ModelFolderError(f"{path} does not exist: train the scorer with `python -m training.scorer`")
    scorer = Scorer()
    load_module(scorer, path)
    return scorer.eval()


@torch.no_grad()
def crispness(pixels: np.ndarray, key: str, *, with_colour: bool = False) -> float:
    """How sharply one picture (Y, X, 3) uint8 shows the sprite `key`, at any place and size; at most 1.

    The best normalised correlation of the sprite's template with the picture under the template's opaque pixels, each
    colour channel around its own mean there: details alone. True scenes reach about 0.92 (the sizes between
    CRISPNESS_PX cost them 0.05), a blur of 1.5 px 0.81. `with_colour`: all channels around one mean, so that having the
    sprite's colours counts as well: 0.95 and 0.89.
    """
    picture_1CYX = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].double() / 255
    height, width = pixels.shape[:2]
    spectrum = torch.fft.rfft2(picture_1CYX[0])
    squares = torch.fft.rfft2((picture_1CYX[0] ** 2).sum(0))
    best = 0.0
    for side_px in CRISPNESS_PX:
        template_CYX, mask_YX = _template(key, side_px, with_colour)
        rows, columns = height - mask_YX.shape[0] + 1, width - mask_YX.shape[1] + 1
        of_mask = torch.fft.rfft2(mask_YX, s=(height, width)).conj()
        of_template = torch.fft.rfft2(template_CYX, s=(height, width)).conj()

        def correlate(product: Tensor, rows: int = rows, columns: int = columns) -> Tensor:
            return torch.fft.irfft2(product, s=(height, width))[..., :rows, :columns]

        common = correlate(spectrum * of_template).sum(0)
        sums_CYX = correlate(spectrum * of_mask)
        of_mean = sums_CYX.sum(0) ** 2 / 3 if with_colour else (sums_CYX**2).sum(0)
        variance = correlate(squares * of_mask) - of_mean / mask_YX.sum()
        energy = variance.clamp_min(1e-3) * (template_CYX**2).sum()  # flat regions have no correlation
        best = max(best, float((common / energy.sqrt()).max()))
    return best


@functools.lru_cache(maxsize=1024)
def _template(key: str, side_px: int, with_colour: bool) -> tuple[Tensor, Tensor]:
    """Colours around their mean, see `crispness`: (3, Y, X), zero outside the mask (Y, X) of opaque pixels."""
    sprite = torch.from_numpy(np.array(sprite_image(key, side_px))).double() / 255
    mask_YX = (sprite[..., 3] > 0.5).double()
    colours_CYX = sprite[..., :3].permute(2, 0, 1)
    mean_C11 = (colours_CYX * mask_YX).sum((1, 2), keepdim=True) / mask_YX.sum()
    if with_colour:
        mean_C11 = mean_C11.mean()
    return (colours_CYX - mean_C11) * mask_YX, mask_YX
