"""Times one story by its events: first text, first picture, pages, and where the time of a page goes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator

from deployments.observability.metrics import FIRST_PICTURE, FIRST_TEXT, PAGE_INTERVAL, PAGE_STAGE, PAGES
from deployments.observability.recording import Record, record
from minigpt5.types import Page, PageDone, Picture, SlotOpened, StoryEvent, TextDelta


class StoryClock:
    """Begins with the story."""

    def __init__(
        self,
        *,
        known: Container[int] = (),
        is_new: bool = True,
        record: Record = record,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`known`: pages that were finished before, which take no time. `is_new`: the story has just been accepted; how
        long the readers of an older one have waited for its first text and picture is not known here."""
        self._known, self._record, self._clock = known, record, clock
        self._started_at = self._text_at = self._page_at = clock()
        self._has_text = self._has_picture = not is_new
        self._storage_s: defaultdict[int, float] = defaultdict(float)
        """Seconds of storing, by page."""

    @property
    def seconds(self) -> float:
        """Since the story began."""
        return self._clock() - self._started_at

    def observe(self, event: StoryEvent) -> None:
        """Record what an event ends, once it is stored."""
        now = self._clock()
        if _page_of(event) in self._known:
            return
        if isinstance(event, TextDelta) and not self._has_text:
            self._has_text = True
            self._record(FIRST_TEXT, now - self._started_at)
        elif isinstance(event, SlotOpened):
            self._record(PAGE_STAGE, now - self._text_at, stage="text")
            self._text_at = now
        elif isinstance(event, Picture) and not self._has_picture:
            self._has_picture = True
            self._record(FIRST_PICTURE, now - self._started_at)
        elif isinstance(event, PageDone):
            self._record(PAGE_INTERVAL, now - self._page_at)
            self._record(PAGE_STAGE, self._storage_s.pop(event.page.index, 0.0), stage="storage")
            self._record(PAGES, 1, picture=_picture_of(event.page))
            self._page_at = now

    @contextlib.contextmanager
    def storing(self, event: StoryEvent) -> Iterator[None]:
        """Count the time within as storage of the event's page."""
        since = self._clock()
        try:
            yield
        finally:
            self._storage_s[_page_of(event)] += self._clock() - since


def _page_of(event: StoryEvent) -> int:
    """The number of an event's page; 0 where it has none."""
    return event.page.index if isinstance(event, PageDone) else getattr(event, "page", 0)


def _picture_of(page: Page) -> str:
    if page.picture:
        return "drawn"
    return "failed" if page.error else "none"
