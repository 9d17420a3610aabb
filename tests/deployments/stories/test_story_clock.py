"""A story is timed by its events."""

from __future__ import annotations

from typing import Any

from deployments.observability.metrics import FIRST_PICTURE, FIRST_TEXT, PAGE_INTERVAL, PAGE_STAGE, PAGES, Metric
from deployments.stories.story_clock import StoryClock
from minigpt5.types import Page, PageDone, Picture, SlotOpened, StoryEvent, TextDelta

PICTURE = Picture(page=1, png=b"", width=1, height=1, seed=0, denoise_steps=1)


class Times:
    """A clock that a test sets, and what was recorded."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seen: list[tuple[Any, ...]] = []

    def record(self, metric: Metric, value: float, /, **labels: str) -> None:
        self.seen.append((metric, value, *labels.values()))

    def clock(self, known: tuple[int, ...] = (), *, is_new: bool = True) -> StoryClock:
        return StoryClock(known=known, is_new=is_new, record=self.record, clock=lambda: self.now)


def test_first_text_first_picture_and_the_stages_of_a_page() -> None:
    times = Times()
    clock = times.clock()
    events: list[tuple[float, StoryEvent]] = [
        (1.0, TextDelta(page=1, text="a")),
        (2.0, TextDelta(page=1, text="b")),
        (4.0, SlotOpened(page=1)),
        (7.0, PICTURE),
        (9.0, PageDone(page=Page(index=1, text="ab", picture=PICTURE))),
    ]
    for times.now, event in events:
        if isinstance(event, Picture):
            with clock.storing(event):
                times.now += 0.5
        clock.observe(event)
    assert times.seen == [
        (FIRST_TEXT, 1.0),
        (PAGE_STAGE, 4.0, "text"),
        (FIRST_PICTURE, 7.5),
        (PAGE_INTERVAL, 9.0),
        (PAGE_STAGE, 0.5, "storage"),
        (PAGES, 1, "drawn"),
    ]


def test_a_page_without_a_picture_says_whether_one_was_owed() -> None:
    times = Times()
    clock = times.clock()
    clock.observe(PageDone(page=Page(index=1, text="a", error="no memory")))
    times.now = 3.0
    clock.observe(PageDone(page=Page(index=2, text="b")))
    assert [(metric, *rest) for metric, *rest in times.seen if metric in (PAGES, PAGE_INTERVAL)] == [
        (PAGE_INTERVAL, 0.0),
        (PAGES, 1, "failed"),
        (PAGE_INTERVAL, 3.0),
        (PAGES, 1, "none"),
    ]


def test_pages_that_were_finished_before_are_not_timed() -> None:
    times = Times()
    clock = times.clock(known=(1,))
    for event in (SlotOpened(page=1), PICTURE, PageDone(page=Page(index=1, text="a", picture=PICTURE))):
        clock.observe(event)
    assert not times.seen


def test_first_text_and_first_picture_are_of_new_stories_alone() -> None:
    times = Times()
    clock = times.clock(is_new=False)
    events: list[tuple[float, StoryEvent]] = [
        (1.0, TextDelta(page=2, text="a")),
        (4.0, SlotOpened(page=2)),
        (7.0, PICTURE),
        (9.0, PageDone(page=Page(index=2, text="a", picture=PICTURE))),
    ]
    for times.now, event in events:
        clock.observe(event)
    assert [metric for metric, *_ in times.seen] == [PAGE_STAGE, PAGE_INTERVAL, PAGE_STAGE, PAGES]
