"""The whole way of a story on one screen. Read this file first.

A generator writes text and vokens, a decoder draws each page's vokens, and while a picture is being drawn
the generator writes on. Both are callables that return async iterators, so that Ray Serve handles, local
engines and test fakes all fit.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
from collections.abc import AsyncGenerator, Callable

from minigpt5.model.window import may_read
from minigpt5.story.characters import shown_on
from minigpt5.types import (
    NUM_PREVIEWS,
    DecoderEvent,
    DrawRequest,
    GeneratorEvent,
    InputImage,
    Page,
    PageDone,
    Picture,
    PictureFailed,
    Reference,
    SlotOpened,
    Story,
    StoryEvent,
    StoryRequest,
    StoryStarted,
    TextDelta,
    TextReset,
    Usage,
    Vokens,
)

Generate = Callable[[StoryRequest], AsyncGenerator[GeneratorEvent, None]]
Decode = Callable[[DrawRequest], AsyncGenerator[DecoderEvent, None]]


def page_seed(story_seed: int, page: int) -> int:
    """The seed of a page's picture: a function of the story's seed and the page, never of what ran before."""
    digest = hashlib.sha256(f"{story_seed}/{page}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1  # 31 bits: fits every integer field on the way


async def stream_story(
    request: StoryRequest, generate: Generate, decode: Decode, *, story_id: str = ""
) -> AsyncGenerator[StoryEvent, None]:
    """Run one story and yield its events as they happen.

    Text comes in order; pictures overlap with later text, and a page is done when it has both. Text after the last
    picture is a page by itself. A picture that fails is an event on its page. A generator that fails raises, after
    the pictures under way are stopped. Where pictures are read back, each page waits for the one before. For
    consistency, each page has the first one that is drawn here as its reference.
    """
    yield StoryStarted(story_id=story_id, seed=request.seed)
    events: asyncio.Queue[StoryEvent | BaseException | None] = asyncio.Queue()
    drawing: set[asyncio.Task[None]] = set()
    pages: dict[int, Page] = {page.index: page for page in request.previous}

    async def draw(vokens: Vokens, text: str, reference: Reference | None, shown: tuple[InputImage, ...]) -> None:
        page, picture, error = vokens.page, None, None
        draw_request = DrawRequest(
            vokens=vokens,
            seed=page_seed(request.seed, page),
            settings=request.draw,
            reference=reference,
            characters=shown,
            key=request.key,
            num_previews=NUM_PREVIEWS if request.previews else 0,
        )
        try:
            async for event in decode(draw_request):
                if isinstance(event, Picture):
                    picture = event
                events.put_nowait(event)
        except Exception as failure:  # a failed picture is data on its page, not the end of the story
            error = describe(failure)
            events.put_nowait(PictureFailed(page=page, error=error))
        pages[page] = Page(index=page, text=text, picture=picture, error=error)
        events.put_nowait(PageDone(page=pages[page]))

    async def generate_one_by_one() -> AsyncGenerator[GeneratorEvent, None]:
        usage = Usage(prompt_tokens=0, completion_tokens=0)
        for number in range(request.pages):
            one = dataclasses.replace(
                request,
                pages=1,
                num_later=request.pages - number - 1,
                previous=tuple(_to_read_back(pages[index], before=max(pages) + 1) for index in sorted(pages)),
                given=request.given[number : number + 1],
            )
            async for event in generate(one):
                if isinstance(event, Usage):
                    usage = Usage(
                        prompt_tokens=usage.prompt_tokens + event.prompt_tokens,
                        completion_tokens=usage.completion_tokens + event.completion_tokens,
                    )
                else:
                    yield event
            await asyncio.gather(*drawing)
        yield usage

    async def write() -> None:
        text: dict[int, str] = {}
        texts = [page.text for page in request.previous]
        reference: Reference | None = None
        try:
            is_one_by_one = request.feedback == "pictures" and request.mode == "story"
            async for event in generate_one_by_one() if is_one_by_one else generate(request):
                if isinstance(event, TextDelta):
                    text[event.page] = text.get(event.page, "") + event.text
                    events.put_nowait(event)
                elif isinstance(event, TextReset):
                    text.pop(event.page, None)
                    events.put_nowait(event)
                elif isinstance(event, Vokens):
                    events.put_nowait(SlotOpened(page=event.page))
                    texts.append(text.pop(event.page, "").strip())
                    shown = shown_on(texts, request.characters)
                    drawing.add(asyncio.create_task(draw(event, texts[-1], reference, shown)))
                    if request.consistency == "story" and reference is None:
                        reference = Reference(vokens=event, seed=page_seed(request.seed, event.page), characters=shown)
                else:
                    events.put_nowait(event)
            for page, rest in text.items():  # a reply may end with text: there is no picture to wait for
                if rest.strip():
                    events.put_nowait(PageDone(page=Page(index=page, text=rest.strip())))
            await asyncio.gather(*drawing)
            events.put_nowait(None)
        except Exception as failure:
            events.put_nowait(failure)

    writing = asyncio.create_task(write())
    try:
        while (event := await events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        for task in [writing, *drawing]:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(writing, *drawing, return_exceptions=True)


def _to_read_back(page: Page, *, before: int) -> Page:
    """An earlier page without the bytes of a picture that is read no more: what a request carries stays bounded."""
    if page.picture is None or may_read(before, page.index):
        return page
    return dataclasses.replace(page, picture=dataclasses.replace(page.picture, png=b""))


def describe(failure: BaseException) -> str:
    """A remote exception's own cause in one line: what a reader of the page needs, without the traceback."""
    cause = getattr(failure, "cause", None) or failure
    lines = str(cause).strip().splitlines()
    return lines[-1] if lines else type(cause).__name__


async def write_story(
    request: StoryRequest,
    generate: Generate,
    decode: Decode,
    *,
    story_id: str = "",
    model: str = "",
    on_event: Callable[[StoryEvent], None] = lambda event: None,
) -> Story:
    """Run one story to its end; `on_event` hears of everything on the way."""
    pages: dict[int, Page] = {page.index: page for page in request.previous}
    usage = Usage(prompt_tokens=0, completion_tokens=0)
    async with contextlib.aclosing(stream_story(request, generate, decode, story_id=story_id)) as events:
        async for event in events:  # closed: an `on_event` that raises stops the work too
            on_event(event)
            if isinstance(event, PageDone):
                pages[event.page.index] = event.page
            elif isinstance(event, Usage):
                usage = event
    return Story(
        id=story_id,
        prompt=request.prompt_text,
        seed=request.seed,
        model=model,
        pages=tuple(pages[index] for index in sorted(pages)),
        usage=usage,
    )
