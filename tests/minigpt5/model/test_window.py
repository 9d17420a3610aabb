"""Which earlier pages are read before a page of a long story."""

from __future__ import annotations

import random

import pytest

from minigpt5.model.window import FIRST_PAGES, Window, may_read, windows
from minigpt5.types import MIN_WINDOW_PAGES, WHOLE_PAGES

NUM_PAGES = 64


def random_story(seed: int) -> tuple[list[int], list[int], int, int]:
    """Sizes of a story's pages, what each may need, the room, and the window's pages; each page has room by itself."""
    chance = random.Random(seed)
    reserve = chance.randint(10, 80)
    sizes = [chance.randint(4, reserve) for _ in range(NUM_PAGES)]
    if chance.random() < 0.3:  # some are given, and longer
        sizes[chance.randrange(NUM_PAGES)] = 2 * reserve
    needs = [max(reserve, size) for size in sizes]
    return sizes, needs, chance.randint(max(needs), 20 * reserve), chance.randint(MIN_WINDOW_PAGES, WHOLE_PAGES)


@pytest.mark.parametrize("num_pages", [1, 2, WHOLE_PAGES])
def test_a_story_that_fits_is_read_whole_and_asked_for_as_it_is(num_pages: int) -> None:
    found = windows([30] * num_pages, [70] * num_pages, num_pages=num_pages, window_pages=8, room=30 * num_pages + 70)
    assert found == [
        Window(page=page, pages=tuple(range(1, page)), num_pages=num_pages) for page in range(1, num_pages + 1)
    ]


def test_a_long_story_keeps_its_beginning_and_forgets_its_last_pages_by_halves() -> None:
    found = windows([30] * NUM_PAGES, [70] * NUM_PAGES, num_pages=NUM_PAGES, window_pages=16, room=10**6)
    assert [window.pages for window in found[14:17]] == [
        tuple(range(1, 15)),
        (1, 2, *range(9, 16)),
        (1, 2, *range(9, 17)),
    ]
    assert found[40].pages == (1, 2, *range(30, 41))
    num_moves = sum(not after.goes_on_from(before) for before, after in zip(found, found[1:], strict=False))
    num_read_again = sum(
        len(after.pages) - FIRST_PAGES
        for before, after in zip(found, found[1:], strict=False)
        if not after.goes_on_from(before)
    )
    assert num_moves == 7 and num_read_again <= NUM_PAGES


@pytest.mark.parametrize("seed", range(100))
def test_what_is_read_fits_and_ends_with_the_page_before(seed: int) -> None:
    sizes, needs, room, pages_at_once = random_story(seed)
    for window in windows(sizes, needs, num_pages=NUM_PAGES, window_pages=pages_at_once, room=room):
        assert sum(sizes[page - 1] for page in window.pages) + needs[window.page - 1] <= room
        assert len(set(window.pages)) == len(window.pages) and list(window.pages) == sorted(window.pages)
        last = [page for page in window.pages if page > FIRST_PAGES]
        assert last == list(range(window.page - len(last), window.page))
        is_alone = window.page == 1 or sizes[window.page - 2] + needs[window.page - 1] > room
        assert is_alone or window.page - 1 in window.pages
        assert all(may_read(window.page, page) for page in window.pages)


@pytest.mark.parametrize("seed", range(100))
def test_only_the_last_page_stands_last(seed: int) -> None:
    sizes, needs, room, pages_at_once = random_story(seed)
    for window in windows(sizes, needs, num_pages=NUM_PAGES, window_pages=pages_at_once, room=room):
        place = len(window.pages) + 1
        assert window.num_pages <= pages_at_once
        assert (place == window.num_pages) == (window.page == NUM_PAGES)


@pytest.mark.parametrize("seed", range(50))
def test_a_window_depends_on_earlier_pages_alone(seed: int) -> None:
    sizes, needs, room, pages_at_once = random_story(seed)
    whole = windows(sizes, needs, num_pages=NUM_PAGES, window_pages=pages_at_once, room=room)
    for page in (1, 7, 30, NUM_PAGES):
        cut = windows(sizes[: page - 1], needs[:page], num_pages=NUM_PAGES, window_pages=pages_at_once, room=room)
        assert cut == whole[:page]


def test_a_beginning_that_is_too_long_is_forgotten_before_the_last_pages() -> None:
    found = windows([50, 50, 10, 10], [60] * 5, num_pages=5, window_pages=8, room=125)
    assert found[-1].pages == (4,) and found[-1].num_pages == 2
    assert found[1].pages == (1,) and found[2].pages == (2,)
    assert windows([50, 50], [60] * 3, num_pages=3, window_pages=8, room=60)[-1] == Window(
        page=3, pages=(), num_pages=1
    )
