"""The generator engine as a Serve deployment: a shim that loads it and passes calls on."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from deployments.engines.metrics import watch
from deployments.engines.throttle import coalesce_text
from minigpt5.types import GeneratorEvent, StoryRequest, TextPrecision


class VokenGenerator:
    """Writes text and vokens."""

    def __init__(self, model: str, num_threads: int, precision: TextPrecision | None = None) -> None:
        from minigpt5.engine.generator import VokenGenerator as Engine

        self.engine = Engine.from_pretrained(model, num_threads=num_threads, precision=precision)
        totals = {
            "minigpt5_prompt_tokens": lambda: self.engine.num_prompt_tokens,
            "minigpt5_prompt_tokens_reused": lambda: self.engine.num_reused_tokens,
        }
        watch("generator", self.engine, totals)

    async def generate(self, request: StoryRequest) -> AsyncIterator[GeneratorEvent]:
        async with contextlib.aclosing(self.engine.generate(request)) as events:  # type: ignore[type-var]
            async for event in coalesce_text(events):
                yield event

    async def validate_request(self, request: StoryRequest) -> None:
        self.engine.validate_request(request)

    async def fingerprint(self) -> str:
        return self.engine.fingerprint
