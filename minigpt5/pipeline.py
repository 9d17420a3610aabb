"""MiniGPT5: the whole model in one process, for notebooks and the command line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from minigpt5.config import ModelConfig, check_distilled
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.generator import VokenGenerator
from minigpt5.engine.threads import share
from minigpt5.story.state import new_story_id
from minigpt5.story.stream import write_story
from minigpt5.types import (
    DrawRequest,
    DrawSettings,
    InputImage,
    Picture,
    Story,
    StoryEvent,
    StoryRequest,
    TextDelta,
    Vokens,
)

DEFAULT_SEED = 7
DESCRIBE = "Describe this image."


class MiniGPT5:
    """Both engines in this process.

    Example: MiniGPT5.from_pretrained("models/storybook").write("A fox who finds a balloon", pages=4, seed=7)
    """

    def __init__(self, generator: VokenGenerator, decoder: DiffusionDecoder) -> None:
        self.generator, self.decoder = generator, decoder

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, num_cores: int | None = None) -> MiniGPT5:
        """Load a model folder; the engines share `num_cores` (default: all). Raises ModelFolderError or
        BaseModelNotFound, both of which say what to do."""
        generator_threads, decoder_threads = share(num_cores)
        return cls(
            VokenGenerator.from_pretrained(folder, num_threads=generator_threads),
            DiffusionDecoder.from_pretrained(folder, num_threads=decoder_threads),
        )

    @property
    def config(self) -> ModelConfig:
        return self.generator.config

    def write(
        self,
        prompt: str,
        *,
        pages: int = 4,
        seed: int = DEFAULT_SEED,
        draw: DrawSettings | None = None,
        on_event: Callable[[StoryEvent], None] = lambda event: None,
    ) -> Story:
        """Write and draw a story. Raises InvalidRequest where the prompt is empty or too long."""
        request = StoryRequest(
            prompt=(prompt,),
            pages=pages,
            seed=seed,
            sampling=self.config.sampling,
            draw=draw or self.config.default_draw,
        )
        self.generator.validate_request(request)
        check_distilled(request.draw, has_distilled=self.config.draw_distilled is not None)
        engines = self.generator.generate, self.decoder.decode
        return asyncio.run(
            write_story(request, *engines, story_id=new_story_id(), model=self.config.name, on_event=on_event)
        )

    def vokens(self, text: str) -> Vokens:
        """The vokens of a caption, without writing anything."""

        async def run() -> Vokens:
            async for event in self.generator.generate(StoryRequest(prompt=(text,), pages=1, mode="caption")):
                if isinstance(event, Vokens):
                    return event
            raise AssertionError("the generator ended without vokens")

        return asyncio.run(run())

    def describe(self, picture: bytes, question: str = DESCRIBE) -> str:
        """What the model says of a picture (PNG or JPEG bytes), without drawing one."""
        request = StoryRequest(
            prompt=(InputImage(data=picture), question),
            pages=1,
            sampling=replace(self.config.sampling, temperature=0.0),
            mode="reply",
            pictures="none",
        )

        async def run() -> str:
            events = self.generator.generate(request)
            return "".join([event.text async for event in events if isinstance(event, TextDelta)])

        return asyncio.run(run())

    def draw(self, vokens: Vokens, seed: int = DEFAULT_SEED, *, settings: DrawSettings | None = None) -> Picture:
        """Draw vokens; the same vokens and seed give the same picture."""
        request = DrawRequest(vokens=vokens, seed=seed, settings=settings or self.config.default_draw)
        self.decoder.validate_request(request)
        return self.decoder.draw([request])[0]
