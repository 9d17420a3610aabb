"""Story events, in any order -> an ordered Story, or the state of a story that is still being made.

StoryState is what a store keeps and an HTTP front shows: numbers and text only, the pictures lie beside it.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from dataclasses import dataclass
from typing import Literal

from minigpt5.types import (
    DrawSettings,
    Page,
    PageDone,
    Picture,
    PictureFailed,
    Sampling,
    SlotOpened,
    Story,
    StoryEvent,
    StoryRequest,
    TextDelta,
    TextReset,
    Usage,
)

Status = Literal["drawing", "done", "failed", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class ImageState:
    """What is known of a finished picture besides its bytes."""

    width: int
    height: int
    seed: int
    draw: DrawSettings
    is_resampled: bool = False
    """Whether the model drew it in its own size."""
    fingerprint: str = ""
    """Fingerprint of the model folder that drew it; "": it is not known."""


@dataclass(frozen=True, kw_only=True)
class PageState:
    """A page as far as it is: its text, then its picture or the picture's error."""

    index: int
    text: str
    image: ImageState | None = None
    """The picture that is shown."""
    error: str | None = None
    is_written: bool = True
    """The text is complete: a process that resumes the story reads it and does not write it again."""
    variants: tuple[ImageState, ...] = ()
    """All pictures that were drawn of the page, in the order of drawing; none where there is only the first."""
    variant: int = 0
    """Which of them `image` is."""
    fingerprint: str = ""
    """Fingerprint of the model folder that wrote the text; "": it is not known, or a client has edited the text."""
    engine: str = ""
    """Engine that wrote the text, and its version, as in Vokens; "": as `fingerprint`."""


@dataclass(frozen=True, kw_only=True)
class StoryState:
    """A story as far as it is.

    Example: StoryState(id="story_3f", created=1767225600, model="storybook", prompt="A fox", seed=7, num_pages=4)
    """

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    prompt: str
    """The prompt's text, without its pictures."""
    seed: int
    num_pages: int
    """Pages asked for."""
    owner: str = ""
    """Owner of the story: the key of its request."""
    status: Status = "drawing"
    error: str | None = None
    """Why the story failed."""
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    draw: DrawSettings = dataclasses.field(default_factory=DrawSettings)
    pages: tuple[PageState, ...] = ()
    usage: Usage = dataclasses.field(default_factory=lambda: Usage(prompt_tokens=0, completion_tokens=0))

    @property
    def num_images(self) -> int:
        return sum(page.image is not None for page in self.pages)

    @property
    def num_denoise_steps(self) -> int:
        return sum(page.image.draw.steps for page in self.pages if page.image)


def new_story_id() -> str:
    """Later ones are greater."""
    return f"story_{int(time.time() * 1000):011x}{secrets.token_hex(8)}"


class StoryBuilder:
    """Collects the events of one story.

    Example: builder = StoryBuilder(request, story_id="story_3f"); builder.add(event); builder.story()
    """

    def __init__(
        self, request: StoryRequest, *, story_id: str = "", model: str = "", created: int | None = None
    ) -> None:
        self.request = request
        self._empty = StoryState(
            id=story_id,
            created=int(time.time()) if created is None else created,
            model=model,
            prompt=request.prompt_text,
            seed=request.seed,
            owner=request.key,
            num_pages=len(request.previous) + request.pages,
            sampling=request.sampling,
            draw=request.draw,
        )
        self._pages = {page.index: page for page in request.previous}
        self._written: set[int] = set(self._pages)
        self._usage = self._empty.usage

    def add(self, event: StoryEvent) -> None:
        match event:
            case TextDelta():
                page = self._page(event.page)
                self._pages[event.page] = dataclasses.replace(page, text=page.text + event.text)
            case TextReset():
                self._pages[event.page] = dataclasses.replace(self._page(event.page), text="")
            case SlotOpened():
                self._written.add(event.page)
            case Picture():
                self._pages[event.page] = dataclasses.replace(self._page(event.page), picture=event)
            case PictureFailed():
                self._pages[event.page] = dataclasses.replace(self._page(event.page), error=event.error)
            case PageDone():
                self._pages[event.page.index] = event.page
                self._written.add(event.page.index)
            case Usage():
                self._usage = event

    def story(self) -> Story:
        return Story(
            id=self._empty.id,
            prompt=self._empty.prompt,
            seed=self._empty.seed,
            model=self._empty.model,
            pages=tuple(self._pages[index] for index in sorted(self._pages)),
            usage=self._usage,
        )

    def state(self, status: Status = "drawing", *, error: str | None = None) -> StoryState:
        pages = tuple(self.page_state(index) for index in sorted(self._pages))
        return dataclasses.replace(self._empty, status=status, error=error, pages=pages, usage=self._usage)

    def text(self, page: int) -> str:
        """Return a page's text so far."""
        return self._page(page).text

    def page_state(self, index: int) -> PageState:
        page = self._page(index)
        picture = page.picture
        image = None
        if picture:
            draw = dataclasses.replace(self.request.draw, steps=picture.denoise_steps)
            image = image_state(picture, draw)
        return PageState(
            index=index,
            text=page.text.strip(),
            image=image,
            error=page.error,
            is_written=index in self._written,
        )

    def _page(self, index: int) -> Page:
        return self._pages.get(index) or Page(index=index, text="")


def image_state(picture: Picture, draw: DrawSettings, *, fingerprint: str = "") -> ImageState:
    """What is stored of a picture that was drawn with these settings, by the model of this fingerprint."""
    return ImageState(
        width=picture.width,
        height=picture.height,
        seed=picture.seed,
        draw=draw,
        is_resampled=picture.is_resampled,
        fingerprint=fingerprint,
    )
