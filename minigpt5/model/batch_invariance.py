"""Layers that give a picture the same bits in any batch, with any number of threads.

On the CPU, oneDNN takes another kernel for a single row than for several, for a number of rows that its tiles do not
divide, and for convolutions of one pixel by another number of threads. The last bits differ, and twenty guided steps
make two hundred times as much of them. Only a few layers of a latent diffusion model are concerned, so that giving
them enough rows, and doing those convolutions as the linear layers that they are, costs nothing.

These layers are a UNet's. A transformer's matrix products keep their kernels: the last bits of its pictures depend on
their batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt5.model.decoders.diffusion import Diffusion

TILE_ROWS = 16
"""Rows of a matrix product that every kernel divides."""
MOST_LATENTS = 64 * 64
"""Of a picture that the VAE decodes beside a copy of itself; a larger one would take too much time and memory."""


class EvenRows(nn.Module):
    """`layer` with its input filled up to a multiple of `multiple` rows, for inference. Rows that are pictures of more
    than MOST_LATENTS positions stay as many as they are."""

    def __init__(self, layer: nn.Module, multiple: int) -> None:
        super().__init__()
        self.layer, self.multiple = layer, multiple

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 4 and input.shape[2] * input.shape[3] > MOST_LATENTS:
            return self.layer(input)
        return self.layer(_filled_up(input, self.multiple))[: len(input)]


class EvenLinear(nn.Linear):
    """A linear layer with its input filled up to a multiple of TILE_ROWS rows, for inference."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(_filled_up(input, TILE_ROWS))[: len(input)]


class Pointwise(nn.Conv2d):
    """A convolution of one pixel, computed as a linear layer over the channels."""

    def forward(self, input: Tensor) -> Tensor:
        weight_OI = self.weight[:, :, 0, 0]
        return F.linear(input.permute(0, 2, 3, 1), weight_OI, self.bias).permute(0, 3, 1, 2).contiguous()


def _filled_up(input: Tensor, multiple: int) -> Tensor:
    num_missing = -len(input) % multiple
    return torch.cat([input, input[-1:].expand(num_missing, *input.shape[1:])]) if num_missing else input


def make_batch_invariant(diffusion: Diffusion) -> None:
    """For inference. Layers of the denoiser keep their names, so that adapters find them.

    An unguided picture that is alone in a UNet call still has its own bits: there is nothing that would multiply them.
    """
    for denoiser in (diffusion.denoiser, diffusion.distilled):
        if denoiser is not None:
            mend_denoiser(denoiser)
    for vae in (diffusion.vae, diffusion.upscaling):
        if vae is None:
            continue
        _mend_convolutions(vae.decoder)
        vae.decoder = EvenRows(vae.decoder, 2)
        if getattr(vae, "post_quant_conv", None) is not None:  # it stands before the decoder
            vae.post_quant_conv = EvenRows(vae.post_quant_conv, 2)


def mend_denoiser(denoiser: nn.Module) -> None:
    """Do so with the layers that concern it, or those that an adapter has added."""
    for name, layer in denoiser.named_modules():
        if type(layer) is nn.Linear and ("time_emb_proj" in name or name.startswith("time_embedding.")):
            layer.__class__ = EvenLinear
    _mend_convolutions(denoiser)


def _mend_convolutions(module: nn.Module) -> None:
    for layer in module.modules():
        if type(layer) is nn.Conv2d and layer.kernel_size == (1, 1):
            layer.__class__ = Pointwise
