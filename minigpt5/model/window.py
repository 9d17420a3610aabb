"""Which earlier pages a model reads before a page of a long story: the story's beginning, and its last pages.

The pages between are forgotten. The beginning stays as an attention sink, which names the cast (SEED-Story, arXiv
2407.08683, 3.3; StreamingLLM, arXiv 2309.17453, keeps tokens in the same way). What is kept is read again at the
positions of a shorter story, so that a page is read and learnt after the same tokens at every time.

The last pages are forgotten by halves: of P pages in the window about P/2 are read again every P/2 pages, so that each
token of a story is read about once more than it would be without a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minigpt5.types import WHOLE_PAGES

FIRST_PAGES = 2
"""Pages of the beginning that stay."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """What is read before a page.

    Example: Window(page=39, pages=(1, 2, 37, 38), num_pages=16)
    """

    page: int
    pages: tuple[int, ...]
    """Earlier pages, from 1, in order."""
    num_pages: int
    """Pages of the story that the prompt asks for: those that are read, the page itself, and the rest, but of a long
    story at most `window_pages`. A model that has learnt shorter ones has no notion of larger numbers: it ends them
    early, and then writes on without knowing what."""

    def goes_on_from(self, before: Window) -> bool:
        """Whether it is the window of the page before and that page: nothing is forgotten between them."""
        return self.pages == (*before.pages, before.page) and self.num_pages == before.num_pages


def may_read(page: int, earlier: int) -> bool:
    """Whether a window of `page` may have an earlier page, whatever their texts are."""
    return earlier <= FIRST_PAGES or earlier > page - WHOLE_PAGES


def windows(
    sizes: Sequence[int], needs: Sequence[int], *, num_pages: int, window_pages: int, room: int
) -> list[Window]:
    """The windows of the first pages of a story, one for each of `needs`.

    A pure function of the story's texts: a page that is resumed, added or rewritten has the window that it had.
    `sizes`: tokens of the earlier pages, with their pictures. `needs`: tokens that each page may take while it is
    written. `window_pages`: see ModelConfig; of a story of more than WHOLE_PAGES no page but the last stands last, or
    has more pages than that before it. `room`: tokens of the context without the prompt; a page that needs more has an
    empty window.
    """
    longest = num_pages if num_pages <= WHOLE_PAGES else window_pages
    start = 1
    found = []
    for page, needed in enumerate(needs, start=1):
        most = longest - 1 if page == num_pages else longest - 2
        left = room - needed

        def fits(pages: Sequence[int], most: int = most, left: int = left) -> bool:
            return len(pages) <= most and sum(sizes[one - 1] for one in pages) <= left

        # A beginning of very long pages would leave no room for the last ones.
        num_first = sum(sum(sizes[:num]) <= left // 2 for num in range(1, FIRST_PAGES + 1))
        while not fits(read := _read(page, start, num_first)) and start < page:
            start = page - (page - start) // 2
        if page > 1 and page - 1 not in read and fits([page - 1]):
            read, start = [page - 1], page - 1
        asked = min(len(read) + 1 + num_pages - page, longest)
        found.append(Window(page=page, pages=tuple(read), num_pages=asked))
    return found


def _read(page: int, start: int, num_first: int) -> list[int]:
    return [one for one in range(1, page) if one <= num_first or one >= start]
