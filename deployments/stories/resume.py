"""Resuming a story: a story that was cut off is run again, and what is stored of it is not made again.

The generator reads stored pages instead of writing them, stored vokens and pictures take the place of new ones, and
new ones are stored before they are announced. A story survives the death of an engine's process in the same way, and
the change of the model under it: finished pages stay, and the new model goes on after them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, AsyncIterator

from deployments.engines.handles import Engines
from deployments.engines.handover import draw_across_models, read_page
from deployments.stories.store_threads import writing
from minigpt5.errors import EngineLost, StoryNotFound
from minigpt5.story.state import PageState
from minigpt5.story.store import StoryStore
from minigpt5.types import (
    DecoderEvent,
    DrawRequest,
    GeneratorEvent,
    StoryRequest,
    TextDelta,
    TextReset,
    Vokens,
)

logger = logging.getLogger("ray.serve")

MAX_LOSSES = 5
"""Deaths of an engine under one request that are got over."""
LOSS_PAUSE_S = 0.5
"""Before another replica is asked; twice as long each time."""


class _Replaced(Exception):
    """The generator's model is one whose vokens a decoder has refused."""


class ResumedEngines:
    """The two engines as one story sees them."""

    def __init__(self, engines: Engines, store: StoryStore, story_id: str, pages: tuple[PageState, ...] = ()) -> None:
        """`pages`: what is stored of the story."""
        self._engines, self._store, self._story_id = engines, store, story_id
        self._written = {page.index: page for page in pages if page.is_written}
        self.drawn = {page.index: page for page in pages if page.image}
        """Pages that are finished, and stay as they are stored."""
        self.writers = {index: page.fingerprint for index, page in self._written.items()}
        """Page -> fingerprint of the model that wrote its text."""
        self.writing_engines = {index: page.engine for index, page in self._written.items()}
        """Page -> name and version of the engine that wrote its text."""
        self.drawers: dict[int, str] = {}
        """Page -> fingerprint of the model that drew its picture, of those that were drawn here."""
        self._sources: dict[int, tuple[StoryRequest, dict[int, str]]] = {}
        """Page -> the request that its vokens came from, and the complete texts, by page."""
        self._refused: set[str] = set()
        self._read_again_as: dict[int, Vokens] = {}
        """Fingerprints of models whose vokens a decoder has refused."""

    async def generate(self, request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        """Generate as the generator does; a page's text continues where it was, or starts over after TextReset."""
        texts: dict[int, str] = {}
        """What was passed on, by page."""
        complete = {index: page.text for index, page in self._written.items()}
        passed: set[int] = set()
        """Pages whose vokens were passed on."""
        last, num_losses = len(request.previous) + request.pages, 0
        while True:
            given = dataclasses.replace(request, given=_beginning(complete, request))
            try:
                async with contextlib.aclosing(self._engines.generate(given)) as events:
                    async for event in self._continue(events, texts, passed, last):
                        if isinstance(event, Vokens):
                            complete[event.page] = texts.get(event.page, "").strip()
                            self._sources[event.page] = request, complete
                        yield event
                return
            except _Replaced:
                logger.info("%s is handed over to the generator of another model", self._story_id)
            except EngineLost as loss:
                await self._get_over(loss, num_losses)
                num_losses += 1

    async def _continue(
        self, events: AsyncIterator[GeneratorEvent], texts: dict[int, str], passed: set[int], last: int
    ) -> AsyncGenerator[GeneratorEvent, None]:
        """Without what was passed on before. Raises _Replaced at the end of a page before the `last`, where the model
        has been replaced."""
        again: dict[int, str] = {}
        async for event in events:
            if isinstance(event, TextDelta | Vokens) and event.page in passed:
                continue
            if isinstance(event, TextDelta):
                again[event.page] = again.get(event.page, "") + event.text
                new, old = again[event.page], texts.get(event.page, "")
                if not old.startswith(new):
                    for shown in _pass_on(event.page, new, old):
                        yield shown
                    texts[event.page] = new
            elif isinstance(event, Vokens):
                new, old = again.get(event.page, ""), texts.get(event.page, "")
                if new != old:  # it ended earlier than the first time
                    for shown in _pass_on(event.page, new, old):
                        yield shown
                    texts[event.page] = new
                passed.add(event.page)
                self.writers.setdefault(event.page, event.fingerprint)
                self.writing_engines.setdefault(event.page, event.engine)
                yield await writing(self._keep, event)
                if event.fingerprint in self._refused and event.page < last:
                    raise _Replaced
            else:
                yield event

    def _keep(self, vokens: Vokens) -> Vokens:
        """The stored ones, or these from now on. Those of another model stay only with the picture that was drawn from
        them."""
        if vokens.page in self._written:
            with contextlib.suppress(StoryNotFound):
                stored = self._store.load_vokens(self._story_id, vokens.page)
                if stored.fingerprint == vokens.fingerprint or vokens.page in self.drawn:
                    return stored
        self._store.save_vokens(self._story_id, vokens)
        return vokens

    async def decode(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        """Draw as the decoder does; a stored picture comes at once."""
        page = request.vokens.page
        if page in self.drawn:
            try:
                picture = await writing(self._store.load_shown, self._story_id, self.drawn[page])
                assert picture
                yield picture
                return
            except StoryNotFound:  # an edit of the page was cut off: its picture is gone already
                del self.drawn[page]
        request = self._as_shown(request)
        for attempt in range(MAX_LOSSES + 1):
            try:
                async for event in self._draw(request):
                    yield event
                return
            except EngineLost as loss:
                await self._get_over(loss, attempt)

    def _as_shown(self, request: DrawRequest) -> DrawRequest:
        """With the reference as its page shows it: another picture may have been chosen, or another model may have read
        the page again."""
        if not (reference := request.reference):
            return request
        page = reference.vokens.page
        reference = dataclasses.replace(reference, vokens=self._read_again_as.get(page, reference.vokens))
        if (drawn := self.drawn.get(page)) and drawn.image:
            reference = dataclasses.replace(reference, seed=drawn.image.seed)
        return dataclasses.replace(request, reference=reference)

    async def _draw(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        page = request.vokens.page
        self.drawers[page] = request.vokens.fingerprint

        async def read_again() -> Vokens:
            self._refused.add(self.drawers[page])
            vokens = await self._read_again(page)
            self.drawers[page] = vokens.fingerprint
            return vokens

        async for event in draw_across_models(self._engines, request, read_again):
            yield event
        self._refused.discard(self.drawers[page])

    async def _read_again(self, page: int) -> Vokens:
        """A page's vokens by the generator that is there now, from the page's text; stored."""
        request, complete = self._sources[page]
        num_pages = page - len(request.previous)
        num_later = request.num_later + request.pages - num_pages  # the prompt says how many the story has
        request = dataclasses.replace(request, pages=num_pages, num_later=num_later)
        vokens = await read_page(self._engines, request, _beginning(complete, request))
        await writing(self._store.save_vokens, self._story_id, vokens)
        self._read_again_as[page] = vokens
        return vokens

    async def _get_over(self, loss: EngineLost, attempt: int) -> None:
        """Raises `loss` where there were too many."""
        logger.warning("%s: %s", self._story_id, loss)
        if attempt == MAX_LOSSES:
            raise loss
        await asyncio.sleep(LOSS_PAUSE_S * 2**attempt)


def _beginning(complete: dict[int, str], request: StoryRequest) -> tuple[str, ...]:
    """Texts of the first pages, as far as they are complete; an empty one cannot be read."""
    texts, first = list(request.given), len(request.previous) + 1
    for number in range(request.pages):
        if not complete.get(first + number):
            break
        texts[number : number + 1] = [complete[first + number]]
    return tuple(texts)


def _pass_on(page: int, new: str, old: str) -> list[TextDelta | TextReset]:
    if new.startswith(old):
        return [TextDelta(page=page, text=new[len(old) :])]
    return [TextReset(page=page), TextDelta(page=page, text=new)]
