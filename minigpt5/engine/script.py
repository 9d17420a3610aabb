"""One request as a script: what the language model reads, which texts it writes, and where a picture's vokens stand.

A script says ids by yielding `Say`, takes a text by `Take` and draws a picture's vokens by `Draw`; it is sent the
answer. It passes what is written to `put`, in order. An engine runs it: steps.py token by token on torch,
vllm/backend.py by whole texts. No torch here.

Shape letters: H hidden width, V vokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minigpt5.config import ModelConfig
from minigpt5.engine.text_stream import TextStream
from minigpt5.model.prompt import Template, VokenIds, given_ids
from minigpt5.model.story_windows import StoryWindows
from minigpt5.types import GeneratorEvent, StoryRequest, TextDelta, Usage, Vokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Say:
    """Token ids that the model reads next; answered with None."""

    ids: list[int]
    start: int | None = None
    """Where they begin: what was said, taken and drawn from there on is forgotten. None: after all of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Take:
    """A text that the model writes, token by token into `add`, until it opens a picture or ends the text.

    Answered with whether it opened a picture. `stream.tokens` are then what the text is: a stop string takes some back.
    """

    page: int
    limit: int
    """Maximum number of tokens."""
    min_tokens: int
    """So many come before a picture or the end."""
    may_draw: bool
    """Whether it may open a picture."""
    said: Sequence[int]
    """Tokens of the reply before it."""
    stream: TextStream
    show: Callable[[str], None]
    is_rushed: bool = False
    """Whether the first voken gets ten times the best logit at every token, the published way to force a picture
    (D11)."""

    def add(self, token: int) -> bool:
        """Take one more token, and show its text; returns whether a stop string has come, which ends the text."""
        self.show(self.stream.add(token))
        return self.stream.is_stopped


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A picture's vokens, which the model reads; answered with the states that predict them: (V, H) float32."""


Script = Generator[Say | Take | Draw, Any, None]


class Writer:
    """Writes one request."""

    def __init__(
        self,
        request: StoryRequest,
        prompt_ids: list[int],
        *,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        config: ModelConfig,
        engine: str,
        put: Callable[[GeneratorEvent], None],
        windows: StoryWindows | None = None,
    ) -> None:
        """`windows`: of a story whose pages follow one another here."""
        self.request, self.prompt_ids = request, prompt_ids
        self._tokenizer, self._config, self._engine, self._put = tokenizer, config, engine, put
        self._vokens = VokenIds(config.vocabulary, config.num_vokens).ids
        self._given_ids = given_ids(request, template, tokenizer)
        self._stop = (*template.stop, *request.stop)
        self._windows = windows
        self._ids: list[int] = []
        """What the model has before it."""
        self._texts = [page.text for page in request.previous]
        """Of a story's pages so far."""
        self._num_given = self._num_written = 0

    def script(self) -> Script:
        """The whole request; ends with Usage."""
        self._ids = list(self.prompt_ids)
        yield Say(ids=self.prompt_ids)
        scene = self._caption if self.request.given else self._story
        scripts = {"story": self._story, "caption": self._caption, "reply": self._reply, "scene": scene}
        yield from scripts[self.request.mode]()
        num_read = len(self.prompt_ids) + self._num_given
        self._put(Usage(prompt_tokens=num_read, completion_tokens=self._num_written))

    def _caption(self) -> Script:
        """The prompt is the caption."""
        yield from self._picture(1)

    def _story(self) -> Script:
        sampling, num_given, first = self.request.sampling, len(self._given_ids), len(self.request.previous) + 1
        for page in range(first, first + self.request.pages):
            if self._windows and page > first:
                yield from self._move_window(page, self._windows)
            if page - first < num_given:
                yield self._given(page, page - first)
            else:
                yield from self._text(page, limit=sampling.max_page_tokens, min_tokens=sampling.min_page_tokens)
            yield from self._picture(page)

    def _reply(self) -> Script:
        request = self.request
        quirks = self._config.published_quirks
        max_pictures = 1 if quirks else request.pages
        page, num_pictures = len(request.previous) + 1, 0
        said: list[int] = []
        while True:
            is_owed = request.pictures == "forced" and not num_pictures
            is_rushed = is_owed and quirks
            tokens, opens_picture = yield from self._text(
                page,
                limit=request.sampling.max_page_tokens - len(said),
                min_tokens=request.sampling.min_page_tokens if is_owed and not is_rushed else 0,
                may_draw=request.pictures != "none" and num_pictures < max_pictures,
                is_rushed=is_rushed,
                said=said,
            )
            said += tokens
            if not opens_picture and (is_rushed or not is_owed):
                return
            yield from self._picture(page)
            if not opens_picture:
                return
            page, num_pictures = page + 1, num_pictures + 1

    def _move_window(self, page: int, windows: StoryWindows) -> Iterator[Say]:
        """Where earlier pages are to be forgotten before this one, have the rest read again, as a request that begins
        here reads it. Written tokens that take more than their text does are replaced by those of the text too."""
        given = self.request.given[page - len(self.request.previous) - 1 :][:1]
        sizes = [windows.size(text) for text in (*self._texts, *given)]
        before, window = windows.of(sizes)[page - 2 : page]
        needed = max([windows.reserve, *sizes[page - 1 :]])
        if window.goes_on_from(before) and len(self._ids) + needed <= self._config.context_tokens:
            return
        ids = windows.ids(window, self._texts)
        pairs = zip(self._ids, ids[:-1], strict=False)  # the last one is read, since a text follows its state
        start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._ids = ids
        yield Say(ids=ids[start:], start=start)

    def _given(self, page: int, number: int) -> Say:
        """A page's text, to be read as if it had been written."""
        ids = self._given_ids[number]
        self._texts.append(self.request.given[number])
        self._show(page, self.request.given[number])
        self._num_given += len(ids)
        self._ids += ids
        return Say(ids=ids)

    def _text(
        self,
        page: int,
        *,
        limit: int,
        min_tokens: int,
        may_draw: bool = True,
        is_rushed: bool = False,
        said: Sequence[int] = (),
    ) -> Generator[Take, Any, tuple[list[int], bool]]:
        """Take a page's text; returns its tokens, and whether the model opened a picture after them."""
        stream = TextStream(self._tokenizer, self._stop)
        shown: list[str] = []

        def show(text: str) -> None:
            shown.append(text)
            self._show(page, text)

        opens_picture = yield Take(
            page=page,
            limit=limit,
            min_tokens=min_tokens,
            may_draw=may_draw,
            is_rushed=is_rushed,
            said=said,
            stream=stream,
            show=show,
        )
        show(stream.end())
        self._texts.append("".join(shown))
        self._ids += stream.tokens
        self._num_written += len(stream.tokens)
        return stream.tokens, opens_picture

    def _picture(self, page: int) -> Generator[Draw, np.ndarray, None]:
        hidden_VH = yield Draw()
        self._ids += self._vokens
        self._num_written += len(self._vokens)
        fingerprint = self._config.fingerprint
        self._put(Vokens(page=page, hidden_VH=hidden_VH, fingerprint=fingerprint, engine=self._engine))

    def _show(self, page: int, text: str) -> None:
        if text:
            self._put(TextDelta(page=page, text=text))
