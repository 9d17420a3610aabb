"""MiniGPT5: the whole model in one process, for notebooks and the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from minigpt5.blocking import run_blocking
from minigpt5.config import ModelConfig
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.generator import VokenGenerator
from minigpt5.engine.threads import share
from minigpt5.progress import shown_progress
from minigpt5.story.state import new_story_id
from minigpt5.story.stream import write_story
from minigpt5.types import (
    Consistency,
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

    Every method works in a script and in a notebook, whose event loop runs already. Each has a coroutine beside it,
    with an `a` before its name.

    Example: MiniGPT5.from_pretrained("models/storybook").write("A fox who finds a balloon", pages=4, seed=7)
    """

    def __init__(self, generator: VokenGenerator, decoder: DiffusionDecoder) -> None:
        self.generator, self.decoder = generator, decoder

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, num_cores: int | None = None) -> MiniGPT5:
        """Load a model folder by its path, URI or hub id; the engines share `num_cores` (default: all).

        Raises ModelFolderError or BaseModelNotFound, both of which say what to do.
        """
        generator_threads, decoder_threads = share(num_cores)
        # The decoder comes first: on a GPU the generator's KV store takes most of the memory that is left.
        decoder = DiffusionDecoder.from_pretrained(folder, num_threads=decoder_threads)
        return cls(VokenGenerator.from_pretrained(folder, num_threads=generator_threads), decoder)

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
        consistency: Consistency | None = None,
        on_event: Callable[[StoryEvent], None] = lambda event: None,
        progress: bool | None = None,
    ) -> Story:
        """Write and draw a story.

        `on_event` is called with every event, in order and in this thread; what it raises stops the work. `progress`
        shows a bar; by default on a terminal and in a notebook. `consistency`: "story" draws each page with the first
        one beside it; by default as the model's config says. Raises InvalidRequest where the prompt is empty or too
        long, or where the model cannot draw as `draw` says.
        """
        request = self._story_request(prompt, pages=pages, seed=seed, draw=draw, consistency=consistency)
        with shown_progress(progress, request, on_event) as observe:
            return run_blocking(lambda report: self._write(request, report), observe)

    async def awrite(
        self,
        prompt: str,
        *,
        pages: int = 4,
        seed: int = DEFAULT_SEED,
        draw: DrawSettings | None = None,
        consistency: Consistency | None = None,
        on_event: Callable[[StoryEvent], None] = lambda event: None,
        progress: bool | None = None,
    ) -> Story:
        """As `write`, in the caller's event loop. Stories that are written at once share the engines' batches, and each
        is what it is alone. Cancelling the task stops the work at the next token and denoising step."""
        request = self._story_request(prompt, pages=pages, seed=seed, draw=draw, consistency=consistency)
        with shown_progress(progress, request, on_event) as observe:
            return await self._write(request, observe)

    def _story_request(
        self, prompt: str, *, pages: int, seed: int, draw: DrawSettings | None, consistency: Consistency | None
    ) -> StoryRequest:
        """Raises InvalidRequest."""
        request = StoryRequest(
            prompt=(prompt,),
            pages=pages,
            seed=seed,
            sampling=self.config.sampling,
            draw=draw or self.config.default_draw,
            consistency=self.config.consistency_of(consistency),
        )
        self.generator.validate_request(request)
        self.config.check_draw(request.draw)
        return request

    async def _write(self, request: StoryRequest, on_event: Callable[[StoryEvent], None]) -> Story:
        return await write_story(
            request,
            self.generator.generate,
            self.decoder.decode,
            story_id=new_story_id(),
            model=self.config.name,
            on_event=on_event,
        )

    def vokens(self, text: str) -> Vokens:
        """The vokens of a caption; no text is written."""
        return run_blocking(lambda report: self.avokens(text))

    async def avokens(self, text: str) -> Vokens:
        """As `vokens`, in the caller's event loop."""
        request = StoryRequest(prompt=(text,), pages=1, mode="caption")
        async with contextlib.aclosing(self.generator.generate(request)) as events:
            async for event in events:
                if isinstance(event, Vokens):
                    return event
        raise AssertionError("the generator ended without vokens")

    def describe(self, picture: bytes, question: str = DESCRIBE) -> str:
        """Answer a question about a picture file's bytes; nothing is drawn. Raises BadPicture."""
        return run_blocking(lambda report: self.adescribe(picture, question))

    async def adescribe(self, picture: bytes, question: str = DESCRIBE) -> str:
        """As `describe`, in the caller's event loop."""
        request = StoryRequest(
            prompt=(InputImage(data=picture), question),
            pages=1,
            sampling=replace(self.config.sampling, temperature=0.0),
            mode="reply",
            pictures="none",
        )
        async with contextlib.aclosing(self.generator.generate(request)) as events:
            return "".join([event.text async for event in events if isinstance(event, TextDelta)])

    def draw(self, vokens: Vokens, seed: int = DEFAULT_SEED, *, settings: DrawSettings | None = None) -> Picture:
        """Draw vokens; the same vokens and seed give the same picture."""
        return run_blocking(lambda report: self.adraw(vokens, seed, settings=settings))

    async def adraw(self, vokens: Vokens, seed: int = DEFAULT_SEED, *, settings: DrawSettings | None = None) -> Picture:
        """As `draw`, in the caller's event loop."""
        request = DrawRequest(vokens=vokens, seed=seed, settings=settings or self.config.default_draw)
        async with contextlib.aclosing(self.decoder.decode(request)) as events:
            async for event in events:
                if isinstance(event, Picture):
                    return event
        raise AssertionError("the decoder ended without a picture")
