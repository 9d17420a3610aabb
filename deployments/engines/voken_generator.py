"""The generator engine as a Serve deployment: a shim that loads it and passes calls on."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import AsyncGenerator, Iterator, Mapping

from deployments.autoscaling.policy import GeneratorStats
from deployments.engines.metrics import watch
from deployments.engines.placement import device_for, num_gpus_here
from deployments.engines.stage_clock import StageClock
from deployments.engines.throttle import coalesce_text, text_interval_s
from deployments.observability.metrics import GENERATED_TOKENS, PENDING_TOKENS, PROMPT_TOKENS, REUSED_PROMPT_TOKENS
from deployments.observability.story_context import add_ids_to_log
from deployments.observability.tracing import name_span
from minigpt5.engine.load import load_engine
from minigpt5.engine.vllm.settings import VllmSettings
from minigpt5.limits import default_limits
from minigpt5.types import GeneratorEvent, StoryRequest, TextPrecision, Usage, Vokens

logger = logging.getLogger("ray.serve")


class VokenGenerator:
    """Writes text and vokens."""

    def __init__(
        self,
        model: str,
        num_threads: int,
        precision: TextPrecision | None = None,
        limits: Mapping[str, float | None] | None = None,
        vllm: VllmSettings | None = None,
    ) -> None:
        """`limits`: those of Limits that are set; the others are the device's. `vllm`: with which vLLM writes."""
        num_gpus = num_gpus_here()
        device = device_for(num_gpus)
        self.engine = load_engine(
            model,
            num_threads=num_threads,
            device=device,
            precision=precision,
            limits=default_limits(
                "cuda" if vllm and vllm.num_gpus > 1 else device,
                **(limits or {}),
                gpu_share=min(1.0, num_gpus or 1.0),
            ),
            vllm=vllm,
            on_death=_end_process,
        )
        self.clock = StageClock(self.engine.limits.max_batch)
        self._writing: list[_Writing] = []
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

    async def generate(self, request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        name_span(pages=request.pages)
        logger.info("writing", extra={"pages": request.pages, "mode": request.mode})
        async with contextlib.AsyncExitStack() as stack:  # closed in the other order: texts read the events
            story = stack.enter_context(self._count(request))
            events = await stack.enter_async_context(contextlib.aclosing(self.engine.generate(request)))
            texts = coalesce_text(events, interval_s=lambda: text_interval_s(self.engine.num_running))
            has_drawn = False
            async for event in await stack.enter_async_context(contextlib.aclosing(texts)):
                # A reply without a picture is an item too.
                if isinstance(event, Vokens) or (isinstance(event, Usage) and not has_drawn):
                    has_drawn = True
                    self.clock.finish_item()
                    story.pages_left -= 1
                yield event

    async def validate_request(self, request: StoryRequest) -> None:
        self.engine.validate_request(request)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `deployments/autoscaling/policy.py` sees of this replica; Serve asks for it."""
        stats = GeneratorStats(
            pages_left=sum(story.pages_left for story in self._writing),
            pictures_left=sum(story.pages_left for story in self._writing if story.is_drawn),
            speed=self.clock.speed,
            page_s=self.clock.item_s,
        )
        return dataclasses.asdict(stats)

    async def fingerprint(self) -> str:
        return self.engine.fingerprint

    @contextlib.contextmanager
    def _count(self, request: StoryRequest) -> Iterator[_Writing]:
        """Count a story's pages as long as it is written, however that ends."""
        story = _Writing(request.pages + request.num_later, is_drawn=request.pictures != "none")
        self._writing.append(story)
        try:
            with self.clock.running():
                yield story
        finally:
            self._writing.remove(story)


def _end_process() -> None:
    """An engine whose own process is gone takes its replica with it: Serve starts another one, and stories resume."""
    logger.error("the engine's process died: this replica ends")
    os._exit(1)


@dataclasses.dataclass(eq=False)
class _Writing:
    """A story that is being written; a reply may end with fewer pages."""

    pages_left: int
    is_drawn: bool
