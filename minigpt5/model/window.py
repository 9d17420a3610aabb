"""Which earlier pages a model reads before a page of a long story: the story's beginning, and its last pages.

The pages between are forgotten. The beginning stays as an attention sink, which names the cast (SEED-Story, arXiv
2407.08683, 3.3; StreamingLLM, arXiv 2309.17453, keeps tokens in the same way). What is kept is read again at the
positions of a shorter story, so that a page is read and learnt after the same tokens, whoever asks for it and when.

The last pages are forgotten by halves: of P pages in the window about P/2 are read again every P/2 pages, so that each
token of a story is read about once more than it would be without a window.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minigpt5.config import ModelConfig
from minigpt5.model.prompt import Template, VokenIds, encode, text_ids
from minigpt5.types import WHOLE_PAGES, PromptPart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


class StoryWindows:
    """The windows of one story, by what its texts take of a model's context. Training and serving ask it."""

    def __init__(
        self,
        prompt: Sequence[PromptPart],
        num_pages: int,
        *,
        config: ModelConfig,
        template: Template,
        tokenizer: PreTrainedTokenizerBase,
        max_page_tokens: int | None = None,
    ) -> None:
        """`max_page_tokens`: of a text that is written (default: the model's own)."""
        self.prompt, self.num_pages = prompt, num_pages
        self._config, self._template, self._tokenizer = config, template, tokenizer
        self.longest = num_pages if num_pages <= WHOLE_PAGES else config.window_pages
        self._voken_ids = VokenIds(config.vocabulary, config.num_vokens)
        limit = config.sampling.max_page_tokens if max_page_tokens is None else max_page_tokens
        self.reserve = limit + config.num_vokens
        """Tokens that a page may take while it is written."""
        self.prompt_tokens = len(self.ids(Window(page=1, pages=(), num_pages=self.longest), ()))

    def size(self, text: str) -> int:
        """Tokens of a page with its vokens, wherever it stands."""
        told = (self._template.page(text, begins_answer=begins) for begins in (True, False))
        return max(len(text_ids(one, self._tokenizer)) for one in told) + self._config.num_vokens

    def of(self, sizes: Sequence[int]) -> list[Window]:
        """The windows of the pages that have a size, and of the one after them."""
        needs = [*(max(self.reserve, size) for size in sizes), self.reserve][: self.num_pages]
        room = self._config.context_tokens - self.prompt_tokens
        return windows(sizes, needs, num_pages=self.num_pages, window_pages=self._config.window_pages, room=room)

    def num_read_again(self, sizes: Sequence[int], *, first: int) -> int:
        """Tokens that are read once more where windows move after page `first`, the beginning aside."""
        found = self.of(sizes)[first - 1 :]
        moved = [after for before, after in itertools.pairwise(found) if not after.goes_on_from(before)]
        return sum(sizes[page - 1] for window in moved for page in window.pages if page > FIRST_PAGES)

    def ids(self, window: Window, texts: Sequence[str]) -> list[int]:
        """What is read before a page. `texts`: of the story's first pages."""
        segments = self._template.story(self.prompt, window.num_pages, [texts[page - 1] for page in window.pages])
        picture_tokens = self._config.vision.picture_tokens
        return encode(segments, self._tokenizer, self._voken_ids, picture_tokens=picture_tokens).ids
