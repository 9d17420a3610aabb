"""Vokens -> condition of the diffusion model: `fc`, learned queries and a small transformer (arXiv 2310.02239, 3.2).

There are no position encodings and no masks, as published: the order of the vokens is in their states alone.
Shape letters: B pictures, V vokens, H language-model width, Q condition positions, D condition width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minigpt5.config import ModelConfig
from minigpt5.model.decoders.diffusion import join_pooled


class Mapper(nn.Module):
    """(B, V, H) -> (B, Q, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.mapper_width or config.condition_width
        self.num_vokens, self.hidden = config.num_vokens, config.hidden
        self.fc = nn.Sequential(nn.Linear(config.hidden, width), nn.GELU(), nn.Linear(width, width))
        self.queries = nn.Parameter(torch.randn(1, config.condition_positions, width))
        self.transformer = _transformer(config, width) if config.mapper_layers else _Mixing(config, width)
        self.out: nn.Module = nn.Linear(width, config.condition_width) if config.mapper_width else nn.Identity()
        """Not published: a wide condition comes from a narrower transformer."""
        self.pooled: nn.Linear | None = nn.Linear(width, config.condition_pooled) if config.condition_pooled else None
        """Not published: the last query gives the one vector that some families read."""

    def forward(self, vokens_BVH: Tensor) -> Tensor:
        queries_BQW = self.queries.expand(len(vokens_BVH), -1, -1)
        found_BQW = self.transformer(self.fc(vokens_BVH), queries_BQW)
        if self.pooled is None:
            return self.out(found_BQW)
        return join_pooled(self.out(found_BQW[:, :-1]), self.pooled(found_BQW[:, -1]))

    @property
    def first_layer(self) -> nn.Linear:
        """What reads the voken states."""
        layer = self.fc[0]
        assert isinstance(layer, nn.Linear)
        return layer

    @torch.no_grad()
    def begin_at(self, states_ND: Tensor, pooled_NP: Tensor | None = None) -> None:
        """Let a fresh mapper write states of the mean and the spread that each feature of `states_ND` has, and one
        vector of those of `pooled_NP`."""
        norm: Any = self.transformer.decoder.norm
        if isinstance(self.out, nn.Linear):
            _spread(self.out, states_ND)
        else:
            norm.weight.copy_(states_ND.std(dim=0))
            norm.bias.copy_(states_ND.mean(dim=0))
        if self.pooled is not None and pooled_NP is not None:
            _spread(self.pooled, pooled_NP)

    @property
    def is_fresh(self) -> bool:
        """Whether the last norm is as it was made: it moves with the first step of training."""
        norm: Any = self.transformer.decoder.norm
        return bool((norm.weight == 1).all() and (norm.bias == 0).all())

    def null_condition(self) -> Tensor:
        """The condition of no picture in particular: zero states before `fc`. A constant: (1, Q, D)."""
        return self(torch.zeros(1, self.num_vokens, self.hidden, device=self.queries.device))


def _transformer(config: ModelConfig, width: int) -> nn.Transformer:
    layer = nn.TransformerEncoderLayer(
        width, config.mapper_heads, 4 * width, dropout=0.0, norm_first=True, batch_first=True
    )
    return nn.Transformer(
        d_model=width,
        nhead=config.mapper_heads,
        custom_encoder=nn.TransformerEncoder(  # as nn.Transformer would build it, without its warning
            layer, config.mapper_layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
        ),
        num_decoder_layers=config.mapper_layers,
        dim_feedforward=4 * width,
        dropout=0.0,
        norm_first=True,
        batch_first=True,
    )


class _Mixing(nn.Module):
    """In the place of the transformer where the mapper has no layers: each position is a weighted sum of the vokens."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.positions = nn.Linear(config.num_vokens, config.condition_positions)
        self.decoder = nn.ModuleDict({"norm": nn.LayerNorm(width)})

    def forward(self, vokens_BVW: Tensor, queries_BQW: Tensor) -> Tensor:
        return self.decoder["norm"](self.positions(vokens_BVW.mT).mT + queries_BQW)


def _spread(layer: nn.Linear, values_ND: Tensor) -> None:
    """Set a fresh linear layer on normalised inputs to give outputs of the values' mean and spread."""
    gain_D1 = values_ND.std(dim=0, keepdim=True).T / layer.weight.norm(dim=1, keepdim=True)
    layer.weight.mul_(gain_D1)
    layer.bias.copy_(values_ND.mean(dim=0))
