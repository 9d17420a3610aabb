"""Self-attention that a picture shares with another one, so that both show the same character.

StoryDiffusion's consistent self-attention (arXiv 2405.01434, section 3.1), which needs no training: in the
self-attention of a UNet's up blocks, as in the authors' code, a picture's keys and values are its own and some of its
reference's. Here the reference is one earlier page, and attends to itself alone: it is what it is without others.

Shape letters: B rows of a call, N positions of one layer, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SHARE = 0.5
"""Of a reference's positions, those that are attended to: the paper's sampling rate."""


class _SharedProcessor:
    """Stands for the `plain` processor of one self-attention, during one call of the denoiser."""

    def __init__(self, plain: Any, reference_of: Mapping[int, int], share: float) -> None:
        self._plain, self._reference_of, self._share = plain, reference_of, share

    def __call__(
        self, attention: nn.Module, hidden_states: Tensor, encoder_hidden_states: None = None, **options: Any
    ) -> Tensor:
        """(B, N, C) -> (B, N, C). Rows without a reference are computed as they are without this processor."""
        pages = list(self._reference_of)
        others = [row for row in range(len(hidden_states)) if row not in self._reference_of]
        own_BNC = hidden_states[pages]
        shown_BNC = hidden_states[list(self._reference_of.values())][:, self._positions(own_BNC)]
        result_BNC = torch.empty_like(hidden_states)
        result_BNC[others] = self._plain(attention, hidden_states[others], **options)
        result_BNC[pages] = self._plain(
            attention, own_BNC, encoder_hidden_states=torch.cat([own_BNC, shown_BNC], dim=1), **options
        )
        return result_BNC

    def _positions(self, hidden_BNC: Tensor) -> Tensor:
        """Of the reference, at random but the same in each step and batch."""
        num = hidden_BNC.shape[1]
        order = torch.randperm(num, generator=torch.Generator().manual_seed(num))
        return order[: round(self._share * num)].sort().values.to(hidden_BNC.device)


def shared_layers(denoiser: nn.Module) -> list[Any]:
    """The self-attentions that pictures can share: none of a UNet whose up blocks have none, or attend to the condition
    alone."""
    return [
        block.attn1
        for name, block in denoiser.named_modules()
        if name.startswith("up_blocks.") and hasattr(block, "attn1") and not block.only_cross_attention
    ]


@contextmanager
def shared_attention(denoiser: Any, reference_of: Mapping[int, int], *, share: float = SHARE) -> Iterator[None]:
    """Within it, rows of `denoiser`'s calls attend to their references too. `reference_of`: row -> the reference's row;
    where it is empty, nothing is changed. One thread uses a denoiser."""
    if not reference_of:
        yield
        return
    layers = shared_layers(denoiser)
    plain = [layer.processor for layer in layers]
    for layer, processor in zip(layers, plain, strict=True):
        layer.processor = _SharedProcessor(processor, reference_of, share)
    try:
        yield
    finally:
        for layer, processor in zip(layers, plain, strict=True):
            layer.processor = processor
