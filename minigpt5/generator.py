"""VokenGenerator: a request -> text and vokens, in the order in which they are written.

One thread advances all running requests by a token each in turn, so that they share the engine fairly. A page ends
where the model opens a picture or at `max_page_tokens`, where the picture is forced; an early end of text is held
back until the asked pages exist.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from minigpt5.config import ModelConfig
from minigpt5.errors import InvalidRequest
from minigpt5.language import LanguageModel
from minigpt5.prompt import END, Tokens, encode, request_segments
from minigpt5.sampling import sample_token
from minigpt5.types import MAX_PAGES, GeneratorEvent, InputImage, StoryRequest, TextDelta, Usage, Vokens
from minigpt5.vision import Vision

MIN_PAGE_TOKENS = 4
"""A page says something before its picture."""


@dataclass(eq=False)
class _Job:
    steps: Iterator[GeneratorEvent | None]
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[GeneratorEvent | Exception | None] = field(default_factory=asyncio.Queue)
    is_cancelled: bool = False

    def put(self, event: GeneratorEvent | Exception | None) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class VokenGenerator:
    """The engine that writes: tokenizer, vision path and language model behind one thread."""

    def __init__(
        self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, language: LanguageModel, vision: Vision
    ) -> None:
        self.config = config
        self.fingerprint = config.fingerprint
        self.tokenizer, self.language, self.vision = tokenizer, language.eval(), vision.eval()
        self._end_ids = {tokenizer.eos_token_id, *tokenizer.encode(END, add_special_tokens=False)}
        self._arriving: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._start = threading.Lock()

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, num_threads: int | None = None) -> VokenGenerator:
        """Load from a model folder. `num_threads`: torch threads of this process."""
        from minigpt5.model_folder import load_generator_parts

        if num_threads:
            torch.set_num_threads(num_threads)
        return cls(*load_generator_parts(folder))

    def check(self, request: StoryRequest) -> None:
        """Raise InvalidRequest where `request` cannot be written."""
        self._read(request)

    async def generate(self, request: StoryRequest) -> AsyncIterator[GeneratorEvent]:
        """Write one request; ends with Usage. Closing the iterator stops the work at the next token."""
        tokens = self._read(request)
        with self._start:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="generator", daemon=True)
                self._thread.start()
        job = _Job(self._write(request, tokens), asyncio.get_running_loop())
        self._arriving.put(job)
        try:
            while (event := await job.events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            job.is_cancelled = True

    def _read(self, request: StoryRequest) -> Tokens:
        if not any(isinstance(part, InputImage) or part.strip() for part in request.prompt):
            raise InvalidRequest("prompt", "prompt is empty: say what the story or the picture is about")
        if not 1 <= request.pages <= MAX_PAGES:
            raise InvalidRequest("pages", f"pages is {request.pages} but must be from 1 to {MAX_PAGES}")
        tokens = encode(
            request_segments(request),
            self.tokenizer,
            self.language.rows,
            num_image_embeddings=self.config.vision.num_queries,
        )
        per_page = self.config.num_vokens + (request.sampling.max_page_tokens if request.mode == "story" else 0)
        needed = len(tokens.ids) + request.pages * per_page
        if needed > self.config.context_tokens:
            raise InvalidRequest(
                "prompt",
                f"prompt takes {len(tokens.ids)} tokens and {request.pages} pages up to {needed - len(tokens.ids)}, "
                f"but the context window is {self.config.context_tokens} tokens: shorten the prompt or ask for "
                "fewer pages",
            )
        return tokens

    def _work(self) -> None:
        running: list[_Job] = []
        while True:
            while not running or not self._arriving.empty():
                running.append(self._arriving.get())
            for job in list(running):
                if job.is_cancelled:
                    running.remove(job)
                    continue
                try:
                    with torch.no_grad():
                        event = next(job.steps)
                except StopIteration:
                    running.remove(job)
                    job.put(None)
                except Exception as failure:  # one request fails, the engine lives on
                    running.remove(job)
                    job.put(failure)
                else:
                    if event is not None:
                        job.put(event)

    def _write(self, request: StoryRequest, tokens: Tokens) -> Iterator[GeneratorEvent | None]:
        """One step of the model between two yields."""
        language, sampling = self.language, request.sampling
        cache = DynamicCache()
        pictures = [part.data for part in request.prompt if isinstance(part, InputImage)]
        image_NQH = self.vision.read(pictures) if pictures and request.mode == "story" else None
        ids_1S = torch.tensor([tokens.ids])
        state_H = language.states(language.embed(ids_1S, image_NQH), cache=cache)[0, -1]
        yield None
        if request.mode == "caption":
            hidden_VH, _ = self._burst(state_H, cache)
            yield Vokens(page=1, hidden_VH=hidden_VH, fingerprint=self.fingerprint)
            yield Usage(prompt_tokens=len(tokens.ids), completion_tokens=self.config.num_vokens)
            return

        num_completion = 0
        first = len(request.previous) + 1
        for page in range(first, first + request.pages):
            written: list[int] = []
            shown = ""
            while len(written) < sampling.max_page_tokens:
                logits_T = self._page_logits(state_H, len(written))
                token = sample_token(
                    logits_T, sampling, seed=request.seed, page=page, position=len(written), seen=written
                )
                if token == language.rows.first or token in self._end_ids:
                    break
                written.append(token)
                state_H = language.states(language.embed(torch.tensor([[token]])), cache=cache)[0, -1]
                text = self.tokenizer.decode(written).lstrip()
                if not text.endswith("\ufffd") and len(text) > len(shown):
                    yield TextDelta(page=page, text=text[len(shown) :])
                    shown = text
                else:
                    yield None
            hidden_VH, state_H = self._burst(state_H, cache)
            num_completion += len(written) + self.config.num_vokens
            yield Vokens(page=page, hidden_VH=hidden_VH, fingerprint=self.fingerprint)
        yield Usage(prompt_tokens=len(tokens.ids), completion_tokens=num_completion)

    def _page_logits(self, state_H: Tensor, num_written: int) -> np.ndarray:
        """Logits of what may follow inside a page: text, or the first voken once the page says something."""
        rows = self.language.rows
        logits_T = self.language.logits(state_H).numpy()
        logits_T[rows.first + 1 :] = -np.inf
        if num_written < MIN_PAGE_TOKENS:
            logits_T[[rows.first, *self._end_ids]] = -np.inf
        return logits_T

    def _burst(self, state_H: Tensor, cache: DynamicCache) -> tuple[np.ndarray, Tensor]:
        """All vokens in one step: the states that predict them (V, H), and the state after the last."""
        ids_1V = torch.tensor([self.language.rows.ids])
        states_VH = self.language.states(self.language.embed(ids_1V), cache=cache)[0]
        hidden_VH = torch.cat([state_H[None], states_VH[:-1]])
        return hidden_VH.float().numpy(), states_VH[-1]
