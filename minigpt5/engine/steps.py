"""A request's script, token by token: the readings and the draws of tokens by which the torch engine runs it.

Steps ask for states by yielding `Read` and for a token by yielding `Score`, and are sent the answer. The engine that
runs them may answer many requests' steps with one step of the model.

Shape letters: H hidden width, V vokens, N states asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigpt5.engine.sampling import TokenDraw
from minigpt5.engine.script import Say, Script, Take
from minigpt5.model.vokens import VokenEmbeddings
from minigpt5.types import Sampling

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
    draw: TokenDraw


Asked = Generator[Read | Score, Any, None]


class Steps:
    """Runs one script."""

    def __init__(
        self,
        script: Script,
        *,
        sampling: Sampling,
        seed: int,
        voken_embeddings: VokenEmbeddings,
        end_ids: frozenset[int],
    ) -> None:
        self.num_close = 0
        """Choices whose margin was below CLOSE."""
        self._script, self._sampling, self._seed = script, sampling, seed
        self._voken_embeddings, self._end_ids = voken_embeddings, end_ids
        self._length = 0
        self._unread: list[int] = []
        """What was said since the last reading: it is read with what comes after it."""
        self._state_H: Tensor
        """The state after all that was read."""

    def run(self) -> Asked:
        """The whole script."""
        answer: bool | np.ndarray | None = None
        while True:
            try:
                asked = self._script.send(answer)
            except StopIteration:
                return
            if isinstance(asked, Say):
                if asked.start is not None:
                    self._forget(asked.start)
                self._unread += asked.ids
                answer = None
            elif isinstance(asked, Take):
                answer = yield from self._take(asked)
            else:
                answer = yield from self._draw()

    def _forget(self, start: int) -> None:
        """Go back to a position; what is said next begins there."""
        self._unread = self._unread[: max(0, start - self._length)]
        self._length = min(self._length, start)

    def _read(self, ids: list[int], *, num_states: int = 1) -> Generator[Read, Tensor, Tensor]:
        states_NH = yield Read(ids=ids, start=self._length, num_states=num_states)
        self._length += len(ids)
        return states_NH

    def _take(self, take: Take) -> Generator[Read | Score, Any, bool]:
        """Write a text; returns whether the model opens a picture after it."""
        first_voken, stream = self._voken_embeddings.first, take.stream
        if self._unread:
            ids, self._unread = self._unread, []
            self._state_H = (yield from self._read(ids))[-1]
        start, opens_picture = self._length, False
        states = deque([self._state_H], maxlen=stream.max_taken_back + 1)
        while len(stream.tokens) < take.limit:
            closed = [] if take.may_draw else [first_voken]
            if len(stream.tokens) < take.min_tokens:
                closed = [first_voken, *self._end_ids]
            draw = TokenDraw(
                sampling=self._sampling,
                seed=self._seed,
                page=take.page,
                position=len(stream.tokens),
                seen=[*take.said, *stream.tokens],
                closed=closed,
                is_rushed=take.is_rushed,
            )
            choice = yield Score(state_H=states[-1], draw=draw)
            self.num_close += choice.margin < CLOSE
            opens_picture = choice.token == first_voken
            if opens_picture or choice.token in self._end_ids or take.add(choice.token):
                break
            states.append((yield from self._read([choice.token]))[-1])
        num_back = self._length - start - len(stream.tokens)
        self._length -= num_back
        self._state_H = states[-1 - num_back]
        return opens_picture

    def _draw(self) -> Generator[Read, Tensor, np.ndarray]:
        """Read all vokens in one step; returns the state before them and those at all but the last."""
        ids, self._unread = self._unread, []
        num_vokens = self._voken_embeddings.num_vokens
        states_NH = yield from self._read(ids + self._voken_embeddings.ids, num_states=num_vokens + bool(ids))
        if not ids:
            states_NH = torch.cat([self._state_H[None], states_NH])
        self._state_H = states_NH[-1]
        hidden_VH: np.ndarray = states_NH[:-1].float().cpu().numpy()
        return hidden_VH
