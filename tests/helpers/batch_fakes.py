"""The two engine faces without a model: what they make is a function of the request, as in the real ones."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator

import numpy as np
from PIL import Image

from batch_jobs.inputs import BadRow, RawRow, StoryJob, check_rows
from minigpt5.config import storybook
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

FINGERPRINT = "fake"
MAX_PROMPT = 200
BREAKS_ON_PAGE_2 = "this one breaks on page 2"
CANNOT_BE_DRAWN = "page 2 of this one cannot be drawn"


def jobs_in(*rows: dict[str, object]) -> list[StoryJob | BadRow]:
    """Rows of an input, validated against the storybook model."""
    return list(check_rows((RawRow(values=row) for row in rows), storybook()))


class FakeGenerator:
    fingerprint = FINGERPRINT

    def validate_request(self, request: StoryRequest) -> None:
        if len(str(request.prompt[-1])) > MAX_PROMPT:
            raise InvalidRequest("prompt", f"prompt is longer than {MAX_PROMPT}: shorten it")

    async def generate(self, request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        prompt, first = str(request.prompt[-1]), len(request.previous) + 1
        for page in range(first, first + request.pages):
            await asyncio.sleep(0)
            if given := request.given[page - first : page - first + 1]:
                yield TextDelta(page=page, text=given[0])
                yield Vokens(page=page, hidden_VH=np.full((8, 4), page, np.float32), fingerprint=FINGERPRINT)
                continue
            yield TextDelta(page=page, text=f"Page {page} ")
            if page == 2 and prompt == BREAKS_ON_PAGE_2:
                raise RuntimeError("out of words")
            yield TextDelta(page=page, text=f"of {prompt}, {request.seed}. ")
            value = -1.0 if page == 2 and prompt == CANNOT_BE_DRAWN else request.seed % 251 + page
            yield Vokens(page=page, hidden_VH=np.full((8, 4), value, np.float32), fingerprint=FINGERPRINT)
        yield Usage(prompt_tokens=1, completion_tokens=request.pages)


class FakeDecoder:
    fingerprint = FINGERPRINT

    async def decode(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        vokens, settings = request.vokens, request.settings
        if vokens.fingerprint != self.fingerprint:
            raise FingerprintMismatch("vokens of another model")
        if vokens.hidden_VH[0, 0] < 0:
            raise RuntimeError("out of paint")
        for step in range(1, settings.steps + 1):
            await asyncio.sleep(0)
            yield Progress(page=vokens.page, step=step, steps=settings.steps)
        pixels = np.random.default_rng([request.seed, int(vokens.hidden_VH[0, 0])]).integers(
            0, 256, (8, 8, 3), np.uint8
        )
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        yield Picture(
            page=vokens.page,
            png=file.getvalue(),
            width=8,
            height=8,
            seed=request.seed,
            denoise_steps=settings.steps,
        )
