"""Layers that give a picture the same bits in any batch, with any number of threads.

On the CPU, oneDNN takes another kernel for a single row than for several, for a number of rows that its tiles do not
divide, and for convolutions of one pixel by another number of threads. The last bits differ, and twenty guided steps
make two hundred times as much of them. Only a few layers of a latent diffusion model are concerned, so that giving
them enough rows, and doing those convolutions as the linear layers that they are, costs nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt5.model.decoders.diffusion import Diffusion

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


class Pointwise(nn.Module):
    """A convolution of one pixel, as a linear layer over the channels."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight_OI = nn.Parameter(layer.weight.detach()[:, :, 0, 0].contiguous(), requires_grad=False)
        self.bias_O = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.permute(0, 2, 3, 1), self.weight_OI, self.bias_O).permute(0, 3, 1, 2).contiguous()


def make_batch_invariant(diffusion: Diffusion) -> None:
    """For inference: the modules have other names afterwards.

    An unguided picture that is alone in a UNet call still has its own bits: there is nothing that would multiply them.
    """
    unets = [unet for unet in (diffusion.denoiser, diffusion.distilled) if unet is not None]
    for unet in unets:
        for name, layer in list(unet.named_modules()):
            if isinstance(layer, nn.Linear) and ("time_emb_proj" in name or name.startswith("time_embedding.")):
                _replace(unet, name, EvenRows(layer, TILE_ROWS))
    for module in (*unets, diffusion.vae.decoder):
        for name, layer in list(module.named_modules()):
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
                _replace(module, name, Pointwise(layer))
    diffusion.vae.decoder = EvenRows(diffusion.vae.decoder, 2)


def _replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, layer)
