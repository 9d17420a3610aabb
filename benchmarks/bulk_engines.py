"""Engines for the bulk benchmark: the real classes at tiny size, and simulated ones of a known pace."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator

import numpy as np
import torch
from PIL import Image

from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.generator import VokenGenerator
from minigpt5.types import (
    DecoderEvent,
    DrawRequest,
    GeneratorEvent,
    Picture,
    Progress,
    StoryRequest,
    TextDelta,
    Usage,
    Vokens,
)
from tests.helpers.tiny import tiny_config, tiny_diffusion, tiny_language, tiny_mapper, tiny_tokenizer, tiny_vision

FINGERPRINT = "5" * 64


def load_tiny_generator() -> VokenGenerator:
    torch.set_num_threads(1)
    config = tiny_config()
    return VokenGenerator(config, tiny_tokenizer(config), tiny_language(config), tiny_vision(config))


def load_tiny_decoder() -> DiffusionDecoder:
    torch.set_num_threads(1)
    config = tiny_config()
    return DiffusionDecoder(config, tiny_mapper(config), tiny_diffusion(config))


class SimulatedGenerator:
    """Writes each page in `page_s`, any number of stories at once."""

    fingerprint = FINGERPRINT

    def __init__(self, page_s: float = 0.05) -> None:
        self.page_s = page_s

    def validate_request(self, request: StoryRequest) -> None: ...

    async def generate(self, request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        first = len(request.previous) + 1
        for page in range(first, first + request.pages):
            await asyncio.sleep(self.page_s)
            yield TextDelta(page=page, text=f"Page {page} of {request.seed}.")
            yield Vokens(page=page, hidden_VH=np.zeros((8, 576), np.float32), fingerprint=self.fingerprint)
        yield Usage(prompt_tokens=0, completion_tokens=0)


class SimulatedDecoder:
    """Draws `pictures_per_s` for any caller, one after another: PNGs of the same size as the shipped model's."""

    fingerprint = FINGERPRINT

    def __init__(self, pictures_per_s: float = 25.0) -> None:
        self.seconds = 1 / pictures_per_s
        self._free_at = 0.0
        rng = np.random.default_rng(0)
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 90, (128, 128, 3), np.uint8)).save(file, "PNG")
        self.png = file.getvalue()

    async def decode(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        import time

        now = time.monotonic()
        self._free_at = max(self._free_at, now) + self.seconds  # callers are threads: an assignment is atomic enough
        await asyncio.sleep(self._free_at - now)
        page = request.vokens.page
        yield Progress(page=page, step=1, steps=1)
        yield Picture(page=page, png=self.png, width=128, height=128, seed=request.seed, denoise_steps=1)
