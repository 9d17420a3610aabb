"""Fakes of the two engines' faces: instant, deterministic, and able to fail or to wait where a test says so."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator

import numpy as np
from PIL import Image

from minigpt5.errors import FingerprintMismatch, InvalidRequest
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

FINGERPRINT = "ab" * 32
IMAGE_PX = 16


def make_png(colour: tuple[int, int, int] = (200, 80, 40), *, size: tuple[int, int] = (IMAGE_PX, IMAGE_PX)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def _make_jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (IMAGE_PX // 2, IMAGE_PX // 2), (90, 90, 90)).save(file, "JPEG")
    return file.getvalue()


PREVIEW = _make_jpeg()


class FakeGenerator:
    """Writes "Page <n> of <seed>." word by word."""

    fingerprint = FINGERPRINT

    def __init__(self, *, fails_on_page: int | None = None, delay_s: float = 0.0, max_words: int = 100) -> None:
        self.fails_on_page, self.delay_s, self.max_words = fails_on_page, delay_s, max_words
        self.requests: list[StoryRequest] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_closed = 0

    def validate_request(self, request: StoryRequest) -> None:
        num_words = sum(len(part.split()) for part in request.prompt if isinstance(part, str))
        if num_words > self.max_words:
            raise InvalidRequest("prompt", f"prompt takes {num_words} tokens but the window is {self.max_words}")

    async def generate(self, request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        self.requests.append(request)
        try:
            await self.gate.wait()
            if request.mode == "caption":
                yield self._vokens(1)
            else:
                first = len(request.previous) + 1
                for page in range(first, first + request.pages):
                    if page == self.fails_on_page:
                        raise RuntimeError("the generator broke")
                    if page - first < len(request.given):
                        yield TextDelta(page=page, text=request.given[page - first])
                        yield self._vokens(page)
                        continue
                    for word in ["Page", f" {page}", " of", f" {request.seed}."]:
                        await asyncio.sleep(self.delay_s)
                        yield TextDelta(page=page, text=word)
                    yield self._vokens(page)
            yield Usage(prompt_tokens=5, completion_tokens=12 * request.pages)
        finally:
            self.num_closed += 1

    def _vokens(self, page: int) -> Vokens:
        return Vokens(page=page, hidden_VH=np.full((8, 4), page, np.float32), fingerprint=self.fingerprint)


class FakeDecoder:
    """Draws a plain square whose colour is the seed's."""

    def __init__(self, *, fingerprint: str = FINGERPRINT, fails_on_page: int | None = None) -> None:
        self.fingerprint, self.fails_on_page = fingerprint, fails_on_page
        self.requests: list[DrawRequest] = []

    async def decode(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        self.requests.append(request)
        page, steps = request.vokens.page, request.settings.steps
        if request.vokens.fingerprint != self.fingerprint:
            raise FingerprintMismatch("vokens of another model")
        if page == self.fails_on_page:
            raise RuntimeError("the decoder broke")
        for step in range(1, steps + 1):
            await asyncio.sleep(0)
            preview = PREVIEW if step <= request.num_previews else None
            yield Progress(page=page, step=step, steps=steps, preview=preview)
        png = make_png((request.seed % 256, request.seed // 256 % 256, page))
        yield Picture(page=page, png=png, width=IMAGE_PX, height=IMAGE_PX, seed=request.seed, denoise_steps=steps)


class LocalEngines:
    """Two engines of this process, as the HTTP front sees engines."""

    def __init__(self, generator: FakeGenerator, decoder: FakeDecoder) -> None:
        self.generator, self.decoder = generator, decoder
        self.generate, self.decode = generator.generate, decoder.decode

    async def validate_request(self, request: StoryRequest) -> None:
        self.generator.validate_request(request)

    async def check_ready(self) -> None:
        if self.generator.fingerprint != self.decoder.fingerprint:
            raise FingerprintMismatch("generator and decoder serve different models")
