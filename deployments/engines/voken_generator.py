"""The generator engine as a Serve deployment: a shim that loads it and passes calls on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Mapping

from deployments.engines.metrics import watch
from deployments.engines.placement import device_for, num_gpus_here
from deployments.engines.throttle import coalesce_text, text_interval_s
from deployments.observability.metrics import GENERATED_TOKENS, PENDING_TOKENS, PROMPT_TOKENS, REUSED_PROMPT_TOKENS
from deployments.observability.story_context import add_ids_to_log
from deployments.observability.tracing import name_span
from minigpt5.limits import default_limits
from minigpt5.types import GeneratorEvent, StoryRequest, TextPrecision

logger = logging.getLogger("ray.serve")


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
        add_ids_to_log()
        watch(
            "generator",
            self.engine,
            {
                PENDING_TOKENS: lambda: self.engine.queued_cost,
                GENERATED_TOKENS: lambda: self.engine.num_generated_tokens,
                PROMPT_TOKENS: lambda: self.engine.num_prompt_tokens,
                REUSED_PROMPT_TOKENS: lambda: self.engine.num_reused_tokens,
            },
        )

    async def generate(self, request: StoryRequest) -> AsyncIterator[GeneratorEvent]:
        name_span(pages=request.pages)
        logger.info("writing", extra={"pages": request.pages, "mode": request.mode})
        async with contextlib.aclosing(self.engine.generate(request)) as events:  # type: ignore[type-var]
            async for event in coalesce_text(events, interval_s=lambda: text_interval_s(self.engine.num_running)):
                yield event

    async def validate_request(self, request: StoryRequest) -> None:
        self.engine.validate_request(request)

    async def fingerprint(self) -> str:
        return self.engine.fingerprint
