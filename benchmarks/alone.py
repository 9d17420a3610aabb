"""One engine alone with all threads: text as the peers write it, and pictures without text.

Shape letters: B pictures, C latent channels, Y X latent rows and columns, Q condition positions, D condition width.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.load import Load
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.generator import VokenGenerator
from minigpt5.model.language import LanguageModel
from minigpt5.types import DrawRequest, StoryRequest, Vokens

UNET_BATCH = 8
UNET_CALLS = 10


class Text:
    """What the bench asks the generator for.

    A text is one page of greedy tokens. The pass that reads its picture's vokens takes time and counts as no token.
    """

    def __init__(self, generator: VokenGenerator, load: Load) -> None:
        self.generator, self.load = generator, load
        self._num_asked = 0

    def text(self, num: int) -> float:
        """Seconds of texts that are written at once."""
        first, self._num_asked = self._num_asked, self._num_asked + num
        requests = [self.load.text(index, self.generator.config) for index in range(first, first + num)]
        began = time.perf_counter()
        asyncio.run(self._write(requests))
        return time.perf_counter() - began

    async def _write(self, requests: Sequence[StoryRequest]) -> None:
        async def one(request: StoryRequest) -> None:
            async for _ in self.generator.generate(request):
                pass

        await asyncio.gather(*map(one, requests))

    def weight_bytes(self) -> int:
        """Bytes of the weights that one token reads."""
        return weight_bytes(self.generator.language)


def weight_bytes(language: LanguageModel) -> int:
    """Bytes of the weights that a token reads, as they lie in memory: all but the embedding, of which it reads one
    row, and but for layers that others have taken the place of."""
    skipped = {id(language.embedding)}
    if language._packed_head is None:
        skipped.discard(id(language.head.weight))  # an embedding that is the head too is read whole
    head = language._packed_head or language.head
    found = {id(tensor): tensor for part in (language.body, head) for tensor in held_tensors(part)}
    return sum(tensor.numel() * tensor.element_size() for key, tensor in found.items() if key not in skipped)


def held_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and packed weights, which are attributes."""
    held: list[Any] = [*module.parameters(), *module.buffers()]
    held += [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    return held


class Pictures:
    """What the bench asks the decoder for."""

    def __init__(self, decoder: DiffusionDecoder, load: Load) -> None:
        self.decoder, self.load = decoder, load
        self._random = np.random.default_rng(0)

    def pictures(self, num: int) -> float:
        """Seconds a picture of the default request, `num` in a batch, VAE and PNG included."""
        config = self.decoder.config
        requests = [
            DrawRequest(
                vokens=Vokens(
                    page=1,
                    hidden_VH=self._random.standard_normal((config.num_vokens, config.hidden), np.float32),
                    fingerprint=config.fingerprint,
                ),
                seed=index,
                settings=config.default_draw,
            )
            for index in range(num)
        ]
        began = time.perf_counter()
        self.decoder.draw(requests)
        return (time.perf_counter() - began) / num

    @torch.no_grad()
    def unet(self) -> float:
        """Seconds a sample of the default request's denoiser, UNET_BATCH in a call."""
        self._predict()
        began = time.perf_counter()
        for _ in range(UNET_CALLS):
            self._predict()
        return (time.perf_counter() - began) / UNET_CALLS / UNET_BATCH

    @torch.no_grad()
    def unet_flops(self) -> float:
        """Floating-point operations of a sample, as torch counts them; of the decoder with torch's own kernels."""
        with FlopCounterMode(display=False) as counter:
            self._predict()
        return counter.get_total_flops() / UNET_BATCH

    def _predict(self) -> None:
        config, diffusion = self.decoder.config, self.decoder.diffusion
        draw = config.default_draw
        latents_BCYX = torch.randn(UNET_BATCH, *diffusion.latent_shape(draw)).to(diffusion.dtype)
        condition_BQD = torch.randn(UNET_BATCH, config.condition_length, config.condition_width).to(diffusion.dtype)
        timesteps_B = torch.full((UNET_BATCH,), 500)
        diffusion.predict(diffusion.denoiser_for(draw.scheduler), latents_BCYX, timesteps_B, condition_BQD)
