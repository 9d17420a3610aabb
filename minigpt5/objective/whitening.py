"""Voken states of unit covariance for the mapper's first layer, while it is trained.

What sets one voken apart from another, and one phrasing from another, is so much more than what one scene does that
the mapper would hardly learn the latter.

Shape letters: P pictures, V vokens, N voken states of all pictures, H their width, Q condition positions, D condition
width, K directions of the conditions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minigpt5.model.decoders.diffusion import normal_like
from minigpt5.objective.precision import exactly

RIDGE = 0.1
"""Variance that is added to every direction, as a share of the median one."""
GAIN = 3.0
"""Gain of a direction that the caption embeddings explain fully."""
RANK = 128
"""Dimensions of the captions' states that are used."""


class Whitening(nn.Module):
    """A change of basis before a linear layer, whose function stays what it was; `fold_into` undoes it."""

    whiten_HH: Tensor
    mean_H: Tensor

    def __init__(self, layer: nn.Linear, states_PVH: Tensor, conditions_PQD: Tensor, *, noise: float = 0.0) -> None:
        """Let `layer` see states as white as `states_PVH` become, but for the directions that go with
        `conditions_PQD`, which are to come out: they are larger.

        `noise`, in units of that spread, is added wherever gradients flow: it is to the mapper what a ridge is to a
        linear regression, and keeps it from learning few captions by heart."""
        super().__init__()
        self.noise = noise
        states_NH = states_PVH.flatten(0, 1).double()
        mean_H = states_NH.mean(dim=0)
        variance_H, axes_HH = torch.linalg.eigh(torch.cov(states_NH.T))
        variance_H = variance_H + RIDGE * variance_H.median()
        whiten_HH = axes_HH @ (axes_HH / variance_H.sqrt()).T
        white_PVH = (states_PVH.double() - mean_H) @ whiten_HH
        gain_HH = _gain(white_PVH, conditions_PQD)
        self.register_buffer("whiten_HH", (whiten_HH @ gain_HH).float(), persistent=False)
        self.register_buffer("mean_H", mean_H.float(), persistent=False)
        unwhiten_HH = torch.linalg.inv(whiten_HH @ gain_HH).float()
        with torch.no_grad():
            layer.bias.add_(layer.weight @ self.mean_H)
            layer.weight.copy_(layer.weight @ unwhiten_HH.T)
        layer.register_forward_pre_hook(lambda layer, inputs: self.whiten(inputs[0]))

    def whiten(self, states_PVH: Tensor) -> Tensor:
        with exactly(states_PVH.device):
            states_PVH = (states_PVH.float() - self.mean_H) @ self.whiten_HH
        return states_PVH + self.noise * normal_like(states_PVH) if torch.is_grad_enabled() else states_PVH

    @torch.no_grad()
    def fold_into(self, layer: nn.Linear) -> None:
        """Let a copy of the layer, without its hook, take states as they are."""
        layer.weight.copy_(layer.weight @ self.whiten_HH.T)
        layer.bias.sub_(layer.weight @ self.mean_H)


def _gain(white_PVH: Tensor, conditions_PQD: Tensor) -> Tensor:
    """Stretches white voken states by 1 + GAIN times their canonical correlation (Hotelling, 1936) with the
    conditions: (H, H)."""
    num_pictures, num_vokens, width = white_PVH.shape
    centred_PN = conditions_PQD.flatten(1).double()
    centred_PN = centred_PN - centred_PN.mean(dim=0)
    scores_PK = torch.linalg.svd(centred_PN, full_matrices=False).U[:, :RANK] * num_pictures**0.5
    together_HK = torch.einsum("pvh,pk->hk", white_PVH, scores_PK) / (num_pictures * num_vokens)
    axes_HK, correlation_K, _ = torch.linalg.svd(together_HK, full_matrices=False)
    stretch_K = GAIN * correlation_K.clamp(max=1)
    return torch.eye(width, dtype=torch.float64) + axes_HK @ (axes_HK * stretch_K).T
