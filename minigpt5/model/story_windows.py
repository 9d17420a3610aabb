"""The windows of one story, by what its texts take of a model's context. Training and serving ask it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from minigpt5.config import ModelConfig
from minigpt5.model.prompt import Template, VokenIds, encode, text_ids
from minigpt5.model.window import FIRST_PAGES, Window, windows
from minigpt5.types import WHOLE_PAGES, PromptPart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StoryWindows:
    """One story of a known length, whose texts may come one by one."""

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
        self._sizes: dict[str, int] = {}
        self.prompt_tokens = len(self.ids(Window(page=1, pages=(), num_pages=self.longest), ()))

    def size(self, text: str) -> int:
        """Tokens of a page with its vokens, wherever it stands."""
        if text not in self._sizes:
            told = (self._template.page(text, begins_answer=begins) for begins in (True, False))
            num_tokens = max(len(text_ids(one, self._tokenizer)) for one in told)
            self._sizes[text] = num_tokens + self._config.num_vokens
        return self._sizes[text]

    def of(self, sizes: Sequence[int]) -> list[Window]:
        """The windows of the pages that have a size, and of the one after them."""
        needs = [*(max(self.reserve, size) for size in sizes), self.reserve][: self.num_pages]
        room = self._config.context_tokens - self.prompt_tokens
        return windows(sizes, needs, num_pages=self.num_pages, window_pages=self._config.window_pages, room=room)

    def longest_reading(self, sizes: Sequence[int], *, first: int) -> int:
        """The most tokens that a page from `first` on has before it, the prompt aside, and takes itself."""
        pages = zip(self.of(sizes)[first - 1 :], sizes[first - 1 :], strict=False)
        return max(sum(sizes[page - 1] for page in window.pages) + max(self.reserve, size) for window, size in pages)

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
