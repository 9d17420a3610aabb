"""Losses by themselves: their weights, and how far a condition is from the text encoder's (arXiv 2310.02239, 3.3).

Shape letters: P pictures, K captions that are not true of a picture, N states of any captions, Q condition positions,
D condition width, E width of a caption's one vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt5.config import ModelConfig
from minigpt5.model.decoders.diffusion import split_pooled

CONTRAST_SHARPNESS = 40.0
"""One fact changes some hundredths to a fifth of a caption's mean squared features."""


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the losses."""

    text: float
    picture: float
    caption: float
    contrast: float = 0.0
    """Weight of telling a picture's caption from those that differ in one fact."""

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of those that there are."""
        return torch.stack([vars(self)[name] * loss for name, loss in losses.items()]).sum()


STAGE1 = LossWeights(text=0.01, picture=1.0, caption=0.1)
STAGE2 = LossWeights(text=0.01, picture=1.0, caption=0.0)


class CaptionLoss(nn.Module):
    """Mean squared error to the text encoder's states of the caption; plain, as published, until standardised.

    Where the caption has one vector too, the mean of the states' error and the vector's. Positions of zeros count:
    the mapper learns to write next to nothing there.
    """

    scale_D: Tensor
    pooled_scale_E: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._pooled_width = config.condition_pooled
        self.register_buffer("scale_D", torch.ones(config.condition_width), persistent=False)
        self.register_buffer("pooled_scale_E", torch.ones(config.condition_pooled), persistent=False)

    def forward(self, condition_PQD: Tensor, target_PQD: Tensor) -> Tensor:
        return torch.stack([error.mean() for error in self._squared_errors(condition_PQD, target_PQD)]).mean()

    def contrast(self, condition_PQD: Tensor, target_PQD: Tensor, others_PKQD: Tensor) -> Tensor:
        """Cross-entropy of the nearest caption being the right one: a mean squared error is content with a blend of
        captions that share most of their words, and a single word is what the picture depends on."""
        candidates = torch.cat([target_PQD[:, None], others_PKQD], dim=1)
        errors = self._squared_errors(condition_PQD[:, None], candidates)
        distance_PK = torch.stack([error.mean(dim=tuple(range(2, error.ndim))) for error in errors]).mean(dim=0)
        right_P = torch.zeros(len(distance_PK), dtype=torch.long, device=distance_PK.device)
        return F.cross_entropy(-CONTRAST_SHARPNESS * distance_PK, right_P)

    def standardise(self, states_ND: Tensor, pooled_PE: Tensor | None) -> None:
        """Count errors in units of each feature's spread from now on: unscaled, predicting the mean is already a small
        loss. The captions' one vectors have a spread of their own, and none where `pooled_PE` is None."""
        self.scale_D = _spread(states_ND)
        if pooled_PE is not None:
            self.pooled_scale_E = _spread(pooled_PE)

    def split(self, condition_PQD: Tensor) -> tuple[Tensor, Tensor | None]:
        """A condition -> its states, and the caption's one vector where the model has one."""
        return split_pooled(condition_PQD, self._pooled_width) if self._pooled_width else (condition_PQD, None)

    def _squared_errors(self, condition_PQD: Tensor, target_PQD: Tensor) -> list[Tensor]:
        """Of the states and, where there is one, of the caption's one vector, each in units of its spread."""
        states_PQD, pooled_PE = self.split(condition_PQD)
        true_states_PQD, true_pooled_PE = self.split(target_PQD)
        errors = [((states_PQD - true_states_PQD) / self.scale_D).square()]
        if pooled_PE is not None and true_pooled_PE is not None:
            errors.append(((pooled_PE - true_pooled_PE) / self.pooled_scale_E).square())
        return errors


def _spread(values_ND: Tensor) -> Tensor:
    """The standard deviation of each feature, at least a tenth of the median of those that vary: a feature may be
    constant, as half of Stable Diffusion 3's are without T5."""
    spread_D = values_ND.std(dim=0)
    varying = spread_D[spread_D > 0]
    return spread_D.clamp(min=0.1 * float(varying.median()) if len(varying) else 1.0)
