"""The decoder engine as a Serve deployment: a shim that loads it and passes calls on."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Literal

from deployments.metrics import watch
from deployments.pace import fewer_steps
from minigpt5.types import DecoderEvent, DrawRequest


class DiffusionDecoder:
    """Draws vokens."""

    def __init__(self, model: str, num_threads: int, precision: Literal["float32", "bfloat16"]) -> None:
        from minigpt5.decoder import DiffusionDecoder as Engine

        self.engine = Engine.from_pretrained(model, num_threads=num_threads, precision=precision)
        watch("decoder", self.engine, {"minigpt5_pictures_reused": lambda: self.engine.num_cache_hits})

    async def decode(self, request: DrawRequest) -> AsyncIterator[DecoderEvent]:
        async with contextlib.aclosing(self.engine.decode(request)) as events:  # type: ignore[type-var]
            async for event in fewer_steps(events):
                yield event

    async def fingerprint(self) -> str:
        return self.engine.fingerprint
