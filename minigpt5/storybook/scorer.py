"""Pictures -> the facts that they show, read by a small classifier.

The judge of every picture figure: trained by `training/storybook/scorer.py` on scenes, blurred and recoloured ones
included, so that it forgives what an eye forgives. crispness.py is the other half: it forgives nothing.

Shape letters: B pictures, C channels, Y X rows and columns, K names with a map of their own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt5.errors import ModelFolderError
from minigpt5.model.pixels import to_tensor
from minigpt5.model.weights import load_module
from minigpt5.storybook.captions import Facts
from minigpt5.storybook.scenes import CHARACTERS, IMAGE_PX, OBJECTS, PLACES, TIMES

WEIGHTS = "scorer.safetensors"
SIDES = ("left", "right")


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
        """What pictures (B, Y, X, 3) uint8 show, of 128 x 128 pixels or made smaller to that; who or what is None where
        nothing known stands there."""
        answers = []
        for start in range(0, len(pixels), batch_size):
            who, what, place, time = self(_reduced(to_tensor(pixels[start : start + batch_size])))
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


def _reduced(pixels_BCYX: Tensor) -> Tensor:
    """Each pixel the mean of those that it stands for."""
    is_large = pixels_BCYX.shape[-1] > IMAGE_PX
    return F.interpolate(pixels_BCYX, (IMAGE_PX, IMAGE_PX), mode="area") if is_large else pixels_BCYX


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
