"""The decoder engine as a Serve deployment: a shim that loads it and passes calls on."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator

from ray import serve

from deployments.autoscaling.policy import DecoderStats
from deployments.engines.metrics import observe_picture, watch
from deployments.engines.placement import device_for, num_gpus_here
from deployments.engines.stage_clock import StageClock
from deployments.engines.throttle import throttle_progress
from deployments.observability.metrics import DENOISING_STEPS, DRAWN_PICTURES, LOADED_ADAPTERS, PENDING_SAMPLES
from deployments.observability.recording import begin_at_zero
from deployments.observability.story_context import add_ids_to_log
from deployments.observability.tracing import name_span
from minigpt5.types import DecoderBackend, DecoderEvent, DrawRequest, Picture, Precision

logger = logging.getLogger("ray.serve")

MAX_STYLES = 16
"""Styles that routers know of a decoder, the latest ones."""


class DiffusionDecoder:
    """Draws vokens."""

    def __init__(
        self,
        model: str,
        num_threads: int,
        precision: Precision | None = None,
        backend: DecoderBackend = "auto",
        filters: tuple[str, ...] = (),
        max_batch: int = 8,
    ) -> None:
        from minigpt5.engine.decoder import DiffusionDecoder as Engine
        from minigpt5.story.safety import PictureFilter

        self.filter = PictureFilter() if "picture" in filters else None

        self.engine = Engine.from_pretrained(
            model,
            num_threads=num_threads,
            device=device_for(num_gpus_here()),
            precision=precision,
            backend=backend,
            max_batch=max_batch,
        )
        self.clock = StageClock(max_batch)
        add_ids_to_log()
        begin_at_zero([DRAWN_PICTURES])
        watch(
            "decoder",
            self.engine,
            {
                PENDING_SAMPLES: lambda: self.engine.queued_cost,
                DENOISING_STEPS: lambda: self.engine.num_denoising_steps,
                LOADED_ADAPTERS: lambda: self.engine.num_styles,
            },
        )

    @serve.multiplexed(max_num_models_per_replica=MAX_STYLES)
    async def note_style(self, name: str) -> str:
        """Tell Serve's routers that pictures in this style are drawn here. The engine loads it, and lets go of it."""
        return name

    async def decode(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        """Raises Blocked where the picture, or a preview of it, is not to be shown."""
        page, steps = request.vokens.page, request.settings.steps
        name_span(page=page, steps=steps)
        logger.info("drawing", extra={"page": page, "steps": steps})
        with self.clock.running():
            async with contextlib.aclosing(self._decode(request)) as events:
                async for event in observe_picture(events):
                    if isinstance(event, Picture):
                        self.clock.finish_item()
                    yield event

    async def _decode(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        if style := request.settings.style:
            self.engine.validate_request(request)
            await self.note_style(style)
        async with contextlib.aclosing(self.engine.decode(request)) as events:
            async for event in throttle_progress(events):
                seen = event.png if isinstance(event, Picture) else event.preview
                if self.filter and seen:
                    await asyncio.to_thread(self.filter.check_picture, seen)
                yield event

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `deployments/autoscaling/policy.py` sees of this replica; Serve asks for it."""
        clock = self.clock
        return dataclasses.asdict(DecoderStats(busy=clock.busy, waiting=clock.num_waiting, picture_s=clock.item_s))

    async def fingerprint(self) -> str:
        return self.engine.fingerprint
