"""Layers that give a row the same bits however many rows there are.

On the CPU, oneDNN takes another kernel for a single row than for several, and for a number of rows that its tiles do
not divide. The last bits differ, and twenty guided steps make two hundred times as much of them. Only a few layers of
a latent diffusion model see so few rows, so filling these up costs nothing, and a picture no longer depends on what is
drawn beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minigpt5.diffusion import Diffusion

TILE_ROWS = 16
"""Rows of a matrix product that every kernel divides."""


class EvenRows(nn.Module):
    """`layer` with its input filled up to a multiple of `multiple` rows, for inference."""

    def __init__(self, layer: nn.Module, multiple: int) -> None:
        super().__init__()
        self.layer, self.multiple = layer, multiple

    def forward(self, input: Tensor) -> Tensor:
        num_rows = len(input)
        if num_missing := -num_rows % self.multiple:
            input = torch.cat([input, input[-1:].expand(num_missing, *input.shape[1:])])
        return self.layer(input)[:num_rows]


def even_rows(diffusion: Diffusion) -> None:
    """Make the UNet's embeddings of the time step, a row a picture, and the VAE's first layer independent of company.

    An unguided picture that is alone in a UNet call still has its own bits: there is nothing that would multiply them.
    """
    for name, layer in list(diffusion.unet.named_modules()):
        if isinstance(layer, nn.Linear) and ("time_emb_proj" in name or name.startswith("time_embedding.")):
            parent, _, last = name.rpartition(".")
            setattr(diffusion.unet.get_submodule(parent), last, EvenRows(layer, TILE_ROWS))
    decoder = diffusion.vae.decoder
    decoder.conv_in = EvenRows(decoder.conv_in, 2)
