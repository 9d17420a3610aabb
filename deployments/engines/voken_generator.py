"""The generator engine as a Serve deployment: a shim that loads it and passes calls on."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping

from deployments.engines.metrics import watch
from deployments.engines.placement import device_for, num_gpus_here
from deployments.engines.throttle import coalesce_text, text_interval_s
from minigpt5.limits import default_limits
from minigpt5.types import GeneratorEvent, StoryRequest, TextPrecision


class VokenGenerator:
    """Writes text and vokens."""

    def __init__(
        self,
        model: str,
        num_threads: int,
        precision: TextPrecision | None = None,
        limits: Mapping[str, float | None] | None = None,
    ) -> None:
        """`limits`: those of Limits that are set; the others are the device's."""
        from minigpt5.engine.generator import VokenGenerator as Engine

        num_gpus = num_gpus_here()
        device = device_for(num_gpus)
        self.engine = Engine.from_pretrained(
            model,
            num_threads=num_threads,
            device=device,
            precision=precision,
            limits=default_limits(device, **(limits or {}), gpu_share=min(1.0, num_gpus or 1.0)),
        )
        totals = {
            "minigpt5_prompt_tokens": lambda: self.engine.num_prompt_tokens,
            "minigpt5_prompt_tokens_reused": lambda: self.engine.num_reused_tokens,
        }
        watch("generator", self.engine, totals)

    async def generate(self, request: StoryRequest) -> AsyncIterator[GeneratorEvent]:
        async with contextlib.aclosing(self.engine.generate(request)) as events:  # type: ignore[type-var]
            async for event in coalesce_text(events, interval_s=lambda: text_interval_s(self.engine.num_running)):
                yield event

    async def validate_request(self, request: StoryRequest) -> None:
        self.engine.validate_request(request)

    async def fingerprint(self) -> str:
        return self.engine.fingerprint
