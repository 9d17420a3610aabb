"""One request as a script: what the language model reads next, and what its states become.

A script asks for states by yielding `Read` and for a token by yielding `Score`, and is sent the answer. The engine that
runs it may answer many scripts with one step of the model. The script passes what it writes to `put`, in order.

Shape letters: H hidden width, V vokens, N states asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minigpt5.engine.sampling import Draw
from minigpt5.engine.text_stream import TextStream
from minigpt5.model.prompt import Template, given_ids
from minigpt5.model.vokens import VokenEmbeddings
from minigpt5.types import GeneratorEvent, StoryRequest, TextDelta, Usage, Vokens

CLOSE = 1e-4
"""A choice with a smaller margin may fall otherwise when the batch has another shape."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """Token ids to read at a position of the sequence; answered with the states of the last `num_states`: (N, H)."""

    ids: list[int]
    start: int
    num_states: int = 1


@dataclass(frozen=True, kw_only=True)
class Score:
    """A state and how the token after it is drawn; answered with a `Choice`."""

    state_H: Tensor
    draw: Draw


Script = Generator[Read | Score, Any, None]


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A page's text, the state after it, and whether the model opened a picture there."""

    tokens: list[int]
    state_H: Tensor
    opens_picture: bool


class Writer:
    """Writes one request."""

    def __init__(
        self,
        request: StoryRequest,
        prompt_ids: list[int],
        *,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        voken_embeddings: VokenEmbeddings,
        end_ids: frozenset[int],
        fingerprint: str,
        put: Callable[[GeneratorEvent], None],
        published_quirks: bool = False,
    ) -> None:
        self.request, self.prompt_ids, self.published_quirks = request, prompt_ids, published_quirks
        self.num_close = 0
        """Choices whose margin was below CLOSE."""
        self._tokenizer, self._voken_embeddings, self._end_ids = tokenizer, voken_embeddings, end_ids
        self._given_ids = given_ids(request, template, tokenizer)
        self._stop = (*template.stop, *request.stop)
        self._fingerprint, self._put = fingerprint, put
        self._length = len(prompt_ids)
        self._num_given = self._num_written = 0

    def script(self) -> Script:
        """The whole request; ends with Usage. Raises TypeError where sampling is not by numbers."""
        sampling = self.request.sampling
        for name in ("temperature", "top_p", "repetition_penalty"):
            if not isinstance(value := getattr(sampling, name), int | float):
                raise TypeError(f"{name} is {value!r} but must be a number")
        scene = self._caption if self.request.given else self._story
        scripts = {"story": self._story, "caption": self._caption, "reply": self._reply, "scene": scene}
        yield from scripts[self.request.mode]()
        num_read = len(self.prompt_ids) + self._num_given
        self._put(Usage(prompt_tokens=num_read, completion_tokens=self._num_written))

    def _caption(self) -> Script:
        """The prompt and its vokens in one reading."""
        ids = self.prompt_ids + self._voken_embeddings.ids[:-1]
        states_VH = yield Read(ids=ids, start=0, num_states=self._voken_embeddings.num_vokens)
        self._put_vokens(1, states_VH)

    def _story(self) -> Script:
        state_H = (yield Read(ids=self.prompt_ids, start=0))[-1]
        sampling, num_given, first = self.request.sampling, len(self._given_ids), len(self.request.previous) + 1
        for page in range(first, first + self.request.pages):
            if page - first < num_given:
                state_H = yield from self._given(page, page - first)
            else:
                text = yield from self._text(
                    page, state_H, limit=sampling.max_page_tokens, min_tokens=sampling.min_page_tokens
                )
                state_H = text.state_H
            state_H = yield from self._picture(page, state_H)

    def _reply(self) -> Script:
        request = self.request
        state_H = (yield Read(ids=self.prompt_ids, start=0))[-1]
        max_pictures = 1 if self.published_quirks else request.pages
        page, num_pictures = len(request.previous) + 1, 0
        said: list[int] = []
        while True:
            is_owed = request.pictures == "forced" and not num_pictures
            is_rushed = is_owed and self.published_quirks
            text = yield from self._text(
                page,
                state_H,
                limit=request.sampling.max_page_tokens - len(said),
                min_tokens=request.sampling.min_page_tokens if is_owed and not is_rushed else 0,
                may_draw=request.pictures != "none" and num_pictures < max_pictures,
                is_rushed=is_rushed,
                said=said,
            )
            said += text.tokens
            if not text.opens_picture and (is_rushed or not is_owed):
                return
            state_H = yield from self._picture(page, text.state_H)
            if not text.opens_picture:
                return
            page, num_pictures = page + 1, num_pictures + 1

    def _given(self, page: int, number: int) -> Generator[Read | Score, Any, Tensor]:
        """Read a page's text as if it had been written; returns the state after it."""
        ids = self._given_ids[number]
        self._show(page, self.request.given[number])
        states_1H = yield Read(ids=ids, start=self._length)
        self._length += len(ids)
        self._num_given += len(ids)
        return states_1H[-1]

    def _text(
        self,
        page: int,
        state_H: Tensor,
        *,
        limit: int,
        min_tokens: int,
        may_draw: bool = True,
        is_rushed: bool = False,
        said: list[int] = [],  # noqa: B006 (never changed)
    ) -> Generator[Read | Score, Any, _Text]:
        """Up to `limit` tokens, until the model opens a picture or ends the text, or a stop string has come.

        `is_rushed`: the published way to force a picture (D11), by ten times the best logit at every token.
        """
        request, voken_embeddings = self.request, self._voken_embeddings
        stream = TextStream(self._tokenizer, self._stop)
        start = self._length
        # A stop string may reach back over some tokens, at most four for each of its characters.
        states = deque([state_H], maxlen=4 * max(map(len, self._stop), default=0) + 1)
        opens_picture = False
        while len(stream.tokens) < limit:
            closed = [voken_embeddings.first] if not may_draw else []
            if len(stream.tokens) < min_tokens:
                closed = [voken_embeddings.first, *self._end_ids]
            draw = Draw(
                sampling=request.sampling,
                seed=request.seed,
                page=page,
                position=len(stream.tokens),
                seen=said + stream.tokens,
                closed=closed,
                is_rushed=is_rushed,
            )
            choice = yield Score(state_H=states[-1], draw=draw)
            self.num_close += choice.margin < CLOSE
            opens_picture = choice.token == voken_embeddings.first
            if opens_picture or choice.token in self._end_ids:
                break
            self._show(page, stream.add(choice.token))
            if stream.is_stopped:
                break
            states.append((yield Read(ids=[choice.token], start=self._length))[-1])
            self._length += 1
        self._show(page, stream.end())
        num_back = self._length - start - len(stream.tokens)
        self._length -= num_back
        self._num_written += len(stream.tokens)
        return _Text(tokens=stream.tokens, state_H=states[-1 - num_back], opens_picture=opens_picture)

    def _picture(self, page: int, state_H: Tensor) -> Generator[Read | Score, Any, Tensor]:
        """All vokens in one step, as the state before them says; returns the state after the last."""
        num_vokens = self._voken_embeddings.num_vokens
        states_VH = yield Read(ids=self._voken_embeddings.ids, start=self._length, num_states=num_vokens)
        self._length += num_vokens
        self._put_vokens(page, torch.cat([state_H[None], states_VH[:-1]]))
        return states_VH[-1]

    def _put_vokens(self, page: int, hidden_VH: Tensor) -> None:
        self._num_written += self._voken_embeddings.num_vokens
        self._put(Vokens(page=page, hidden_VH=hidden_VH.float().cpu().numpy(), fingerprint=self._fingerprint))

    def _show(self, page: int, text: str) -> None:
        if text:
            self._put(TextDelta(page=page, text=text))
