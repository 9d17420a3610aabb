"""A second VAE decoder, which paints pictures larger than the VAE's own from the same latents.

As in the asymmetric VAE (arXiv 2306.04632), the encoder and all that reads its latents stay as they are. It lies in
`decoder/vae_upscaling/` of a model folder.

Shape letters: B pictures, C latent channels, Y X latent rows and columns.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput
from torch import Tensor, nn

from minigpt5.errors import ModelFolderError
from minigpt5.model.libraries import load_whole
from minigpt5.model.weights import load_tensors


class UpscalingDecoder(ModelMixin, ConfigMixin):
    """The decoder of an AutoencoderKL with one more block for each doubling of the sides."""

    @register_to_config
    def __init__(
        self,
        scale: int = 2,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        mid_block_add_attention: bool = True,
        force_upcast: bool = True,
    ) -> None:
        """`scale`: how many times as large a picture is as the VAE's; a power of two. The others are those of the VAE,
        with the new blocks first in `block_out_channels`."""
        super().__init__()
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, kernel_size=1)
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=3,
            up_block_types=("UpDecoderBlock2D",) * len(block_out_channels),
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            mid_block_add_attention=mid_block_add_attention,
        )

    @classmethod
    @torch.no_grad()
    def from_vae(cls, vae: AutoencoderKL, *, scale: int = 2) -> UpscalingDecoder:
        """The VAE's decoder with fresh blocks, which at first repeat what each pixel is painted from.

        Raises ModelFolderError where `scale` is no power of two, or the VAE is of another kind.
        """
        num_doublings = round(math.log2(scale)) if scale > 1 else 0
        if 2**num_doublings != scale or not num_doublings:
            raise ModelFolderError(f"scale is {scale} but must be 2, 4 or another power of two")
        if not isinstance(vae, AutoencoderKL) or set(vae.config.up_block_types) != {"UpDecoderBlock2D"}:
            raise ModelFolderError(f"a {type(vae).__name__} cannot be extended: only an AutoencoderKL can be")
        config, channels = vae.config, vae.config.block_out_channels
        larger = cls(
            scale=scale,
            latent_channels=config.latent_channels,
            block_out_channels=(channels[0],) * num_doublings + tuple(channels),
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            act_fn=config.act_fn,
            mid_block_add_attention=config.mid_block_add_attention,
            force_upcast=config.force_upcast,
        )
        if config.use_post_quant_conv:
            larger.post_quant_conv.load_state_dict(vae.post_quant_conv.state_dict())
        else:
            nn.init.dirac_(larger.post_quant_conv.weight)
            nn.init.zeros_(larger.post_quant_conv.bias)
        missing, unexpected = larger.decoder.load_state_dict(vae.decoder.state_dict(), strict=False)
        assert not unexpected and all(name.startswith("up_blocks.") for name in missing), (missing, unexpected)
        first_fresh = len(channels)
        for block in larger.decoder.up_blocks[first_fresh - 1 : -1]:
            nn.init.dirac_(block.upsamplers[0].conv.weight)
            nn.init.zeros_(block.upsamplers[0].conv.bias)
        for block in larger.decoder.up_blocks[first_fresh:]:
            for layer in block.resnets:
                nn.init.zeros_(layer.conv2.weight)
                nn.init.zeros_(layer.conv2.bias)
        return larger

    def forward(self, latents_BCYX: Tensor) -> DecoderOutput:
        return self.decode(latents_BCYX)

    def decode(self, latents_BCYX: Tensor) -> DecoderOutput:
        """Raw latents, as the VAE takes them -> pictures in [-1, 1]: (B, 3, pixels, pixels)."""
        return DecoderOutput(sample=self.decoder(self.post_quant_conv(latents_BCYX)))


def encode_alike(vae: Path, other: Path) -> bool:
    """Whether two folders of VAEs have the same encoder, so that a second decoder of one paints the other's latents.
    Raises ModelFolderError."""
    found = [
        {name: value for name, value in load_tensors(path).items() if name.startswith(("encoder.", "quant_conv."))}
        for folder in (vae, other)
        for path in sorted(folder.glob("*.safetensors"))
    ]
    if len(found) != 2 or found[0].keys() != found[1].keys():
        return False
    return all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def load_upscaling(folder: Path) -> Any:
    """Read a second decoder as float32. Raises ModelFolderError where the folder has another model."""
    values = UpscalingDecoder.load_config(folder)
    if values.get("_class_name") != UpscalingDecoder.__name__:
        raise ModelFolderError(f"{folder} is a {values.get('_class_name')}, not a {UpscalingDecoder.__name__}")
    return load_whole(UpscalingDecoder, folder, torch_dtype=torch.float32)
