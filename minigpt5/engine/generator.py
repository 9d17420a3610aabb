"""VokenGenerator: requests -> text and vokens, in the order in which they are written.

Continuous batching: requests join and leave between tokens, each with its own prompt, sampling, seed and length. A
step of the language model reads for each of them what its script asks next: a token, a picture's vokens, or a part
of its prompt. `script.py` and `steps.py` are what one request does; `kv_cache.py` is how they share a step.

Shape letters: H hidden width, T tokens of a step, N input pictures, Q embeddings of one picture.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minigpt5.config import ModelConfig
from minigpt5.engine.engine_loop import EngineLoop, Job, QueuedEngine
from minigpt5.engine.fair_share import FairShare
from minigpt5.engine.kv_blocks import num_blocks
from minigpt5.engine.kv_cache import SlotCache, bytes_per_token
from minigpt5.engine.kv_pass import upload
from minigpt5.engine.picture_reader import PictureReader
from minigpt5.engine.prompts import Prompt, Prompter
from minigpt5.engine.sampling import NOT_DRAWN, NOT_FINITE, Choice, draw_token, draw_tokens
from minigpt5.engine.steps import Asked, Read, Score, Steps
from minigpt5.engine.threads import Team, single_thread
from minigpt5.errors import SettingsError
from minigpt5.limits import BLOCK, Limits, default_limits, kv_cache_bytes
from minigpt5.model.language import LanguageModel
from minigpt5.model.vision import Vision
from minigpt5.types import GeneratorEvent, StoryRequest, TextPrecision

MIN_SHARE = 0.25
"""Share of slots and of the KV store that clients with requests under way leave to others."""


class _Job(Job[GeneratorEvent]):
    """A request with its script, and how far the script's present reading is."""

    def __init__(self, prompt: Prompt) -> None:
        super().__init__(key=prompt.request.key, cost=len(prompt.ids) + prompt.num_new)
        self.prompt = np.array(prompt.ids)
        """What it reads first, by content: token ids, and the hash of a picture at its placeholders."""
        self.image_PH: Tensor | None = None
        """Embeddings of the prompt's pictures, placeholder by placeholder."""
        self.positions_3S: Tensor | None = None
        """Positions of the whole context, where the language model counts pictures by rows and columns."""
        self.last_seen_S: Tensor | None = None
        """The last place that each token of the context sees, where the language model sees whole pictures."""
        self.steps: Steps
        self.asking: Asked
        self.num_positions = prompt.num_positions
        """Longest that it may become."""
        self.slot = -1
        self.left: list[int] = []
        """Token ids that are still to be read before the script goes on."""
        self.num_states = 1
        self.states: list[Tensor] = []


class VokenGenerator(QueuedEngine):
    """The engine that writes: tokenizer, vision path and language model behind one thread.

    A job is a request, and runs while it has a slot; its cost is the tokens that it may still read and write. A row of
    a step is a request.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: PreTrainedTokenizerBase,
        language: LanguageModel,
        vision: Vision,
        *,
        limits: Limits | None = None,
        max_jobs: int = 512,
        num_threads: int | None = None,
        draws_on_device: bool | None = None,
    ) -> None:
        """Requests beyond `limits` (default: those of the device) wait, and beyond `max_jobs` they are refused.
        `num_threads`: torch threads of a step at most (default: as many as here). `draws_on_device`: whether tokens are
        drawn in one call where their logits lie (default: on a GPU).

        Raises SettingsError where the KV store has no room for a request as long as the context.
        """
        self.config = config
        self.fingerprint = config.fingerprint
        self.tokenizer, self.language, self.vision = tokenizer, language.eval(), vision.eval()
        self.prompter = Prompter(config, tokenizer, engine=f"torch {torch.__version__}")
        self.template, self.end_ids = self.prompter.template, self.prompter.end_ids
        self.num_close_choices = 0
        """Tokens of finished requests whose choice another batch could have changed. Counted where tokens are drawn on
        the CPU: on a GPU, below float32, every batch may change some."""
        self.num_prompt_tokens = self.num_reused_tokens = 0
        """Tokens of prompts, and how many of them were there already in a slot that begins alike."""
        self.num_generated_tokens = 0
        """Tokens drawn so far."""
        self.limits = limits or default_limits(self._device.type)
        self._draws_on_device = self._device.type != "cpu" if draws_on_device is None else draws_on_device
        self._cache = new_cache(language, self.limits, num_positions=config.context_tokens)
        self._contents = np.full((self.limits.num_slots, config.context_tokens), -1)
        """What each slot has read: token ids, and the hash of a picture at its placeholders."""
        self._free_slots = list(range(self.limits.num_slots))
        """Least recently used first. What they have read stays until they are taken again."""
        self._num_reserved = int(MIN_SHARE * self.limits.num_slots)
        self._pictures = PictureReader(vision)
        self._fair = FairShare(self.limits.max_batch, min_places=1)
        self._team = Team(num_threads or torch.get_num_threads())
        self._loop = EngineLoop[_Job](
            "generator",
            choose=self._choose,
            advance=self._advance,
            leave=self._leave,
            max_jobs=max_jobs,
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        num_threads: int | None = None,
        device: str | None = None,
        precision: TextPrecision | None = None,
        limits: Limits | None = None,
    ) -> VokenGenerator:
        """Load a model folder by its path, URI or hub id. `num_threads`: torch threads of a step at most. `device`:
        the GPU that this process sees where there is one, else the CPU. `precision` of the language model: by default
        what is fastest on this CPU of what keeps its text, and bfloat16 on a GPU. `limits`: by default those of the
        device."""
        from minigpt5.model.folder import default_device, load_generator_model

        num_threads = num_threads or torch.get_num_threads()
        device = device or default_device()
        with single_thread():
            parts = load_generator_model(folder, device=device, precision=precision, num_threads=num_threads)
            return cls(*parts, limits=limits, num_threads=num_threads)

    @property
    def _device(self) -> torch.device:
        return self.language.embedding.device

    def validate_request(self, request: StoryRequest) -> None:
        """Raise InvalidRequest where `request` cannot be written."""
        self.prompter.encode(request)

    async def generate(self, request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        """Write one request; ends with Usage. Closing the iterator stops the work at the next token.

        Raises InvalidRequest or EngineFull.
        """
        prompt = self.prompter.encode(request)
        request = prompt.request
        job = _Job(prompt)
        job.steps = Steps(
            self.prompter.writer(prompt, job.put).script(),
            sampling=request.sampling,
            seed=request.seed,
            voken_embeddings=self.language.voken_embeddings,
            end_ids=self.end_ids,
        )
        job.asking = job.steps.run()
        if prompt.pictures:
            await asyncio.to_thread(self._see, job, prompt.pictures)
        self._lay_out(job)
        async with contextlib.aclosing(self._loop.run(job)) as events:
            async for event in events:
                yield event

    def _see(self, job: _Job, pictures: list[bytes]) -> None:
        """Embed a prompt's pictures; runs beside the engine's own thread."""
        job.image_PH, digests = self._pictures.read(pictures)
        hashes = [-1 - (int.from_bytes(digest[:8], "big") >> 1) for digest in digests]  # no token id is negative
        is_placeholder = job.prompt == self.language.voken_embeddings.placeholder
        job.prompt[is_placeholder] = np.repeat(hashes, self.config.vision.num_queries)

    def _choose(self, jobs: list[_Job]) -> list[_Job]:
        """Give free slots to who waits; then whose turn it is."""
        while waiting := [job for job in jobs if not job.is_started]:
            num_slots = Counter(job.key for job in jobs if job.is_started)
            job = min(waiting, key=lambda job: num_slots[job.key])  # the oldest of the key with the fewest slots
            is_first = not num_slots[job.key]
            if len(self._free_slots) <= (0 if is_first else self._num_reserved):
                break
            share = 1 if is_first else 1 - MIN_SHARE
            if not self._cache.has_room(job.num_positions, idle=self._free_slots, share=share):
                break
            try:
                self._admit(job)
            except Exception as failure:  # such as a GPU without memory: one request fails, the others go on
                job.fail(failure)
        running = [job for job in jobs if job.is_started and not job.is_done]
        return self._fair.choose(running, key=lambda job: job.key, cost=lambda job: 1)

    def _admit(self, job: _Job) -> None:
        """Take the slot that was unused for longest, and begin it as the slot that has most of the prompt; or take that
        one, where its memory is needed."""
        job.is_started = True
        source, known = self._find_beginning(job)
        others = [slot for slot in self._free_slots if slot != source]
        is_kept = source not in self._free_slots or self._cache.has_room(job.num_positions, idle=others)
        job.slot = self._free_slots[0] if is_kept else source
        self._free_slots.remove(job.slot)
        self._cache.take(job.slot, job.num_positions, idle=[slot for slot in others if slot != job.slot])
        if known and source != job.slot:
            self._cache.copy(source, job.slot, known)
        self._resume([(job, None)])
        self._contents[job.slot, : len(job.prompt)] = job.prompt
        self._cache.lengths[job.slot] = known
        job.left = job.left[known:]
        job.cost -= known
        self.num_prompt_tokens += len(job.prompt)
        self.num_reused_tokens += known

    def _find_beginning(self, job: _Job) -> tuple[int, int]:
        """The slot that has most of a job's prompt, and how much."""
        lengths = np.minimum(self._cache.lengths, len(job.prompt) - 1)  # the last token's state is wanted
        is_other = self._contents[:, : len(job.prompt)] != job.prompt
        is_other[np.arange(is_other.shape[1]) >= lengths[:, None]] = True
        num_known = is_other.argmax(axis=1)
        source = int(num_known.argmax())
        return source, int(num_known[source])

    def _advance(self, jobs: list[_Job]) -> None:
        with self._team.working():
            self._step(jobs)

    @torch.no_grad()
    def _step(self, jobs: list[_Job]) -> None:
        """One step of the language model, and what follows from it."""
        parts = self._part(jobs)
        if not parts:
            return
        ids_1T = torch.tensor([[token for job, num_tokens in parts for token in job.left[:num_tokens]]])
        images = [image_PH for job, num_tokens in parts if (image_PH := self._images(job, num_tokens)) is not None]
        embeds_1TH = self.language.embed(upload(ids_1T, self._device), torch.cat(images)[None] if images else None)
        counts = [(job.slot, num_tokens) for job, num_tokens in parts]
        positions = [one for job, num in parts for one in self._slice(job, job.positions_3S, num)]
        last_seen = [one for job, num in parts for one in self._slice(job, job.last_seen_S, num)]
        states_TH = self._cache.forward(
            self.language.body,
            embeds_1TH[0],
            counts,
            positions_3T=torch.cat(positions, dim=1) if positions else None,
            last_seen_T=torch.cat(last_seen) if last_seen else None,
        )
        ready = []
        for (job, num_tokens), states_NH in zip(parts, states_TH.split([num for _, num in counts]), strict=True):
            job.left = job.left[num_tokens:]
            job.cost = max(0, job.cost - num_tokens)
            job.states.append(states_NH[-job.num_states :])
            if not job.left:
                ready.append((job, torch.cat(job.states)[-job.num_states :]))
        self._resume(ready)

    def _part(self, jobs: list[_Job]) -> list[tuple[_Job, int]]:
        """How much each reads in this step: prompts in parts, so that those who write keep their pace; the client who
        got least so far comes first."""
        limits = self.limits
        num_short = sum(len(job.left) <= limits.short_read_tokens for job in jobs)
        budget = max(limits.part_tokens, num_short) if num_short else limits.long_read_tokens
        parts = []
        for job in jobs:
            num_tokens = len(job.left)
            if num_tokens > limits.short_read_tokens:
                num_tokens = min(num_tokens, budget)
                budget -= num_tokens
            if num_tokens:
                parts.append((job, self._complete(job, num_tokens)))
        return parts

    def _images(self, job: _Job, num_tokens: int) -> Tensor | None:
        """Embeddings of the placeholders among the next tokens: (P, H)."""
        if job.image_PH is None:
            return None
        start = self._cache.lengths[job.slot]
        num_before, num_placeholders = (
            (job.prompt[part] < 0).sum() for part in (slice(start), slice(start, start + num_tokens))
        )
        return job.image_PH[num_before : num_before + num_placeholders]

    def _lay_out(self, job: _Job) -> None:
        """Lay out the whole context of a request: what is written later has no pictures."""
        is_picture_1S = torch.zeros(1, self.config.context_tokens, dtype=torch.bool)
        is_picture_1S[0, : len(job.prompt)] = torch.from_numpy(job.prompt < 0)
        positions_31S = self.language.positions(is_picture_1S)
        last_seen_1S = self.language.last_seen(is_picture_1S)
        job.positions_3S = None if positions_31S is None else positions_31S[:, 0]
        job.last_seen_S = None if last_seen_1S is None else last_seen_1S[0]

    def _complete(self, job: _Job, num_tokens: int) -> int:
        """As many of the next tokens, and the rest of a picture that must be read at once."""
        if job.last_seen_S is None:
            return num_tokens
        start = self._cache.lengths[job.slot]
        return int(job.last_seen_S[start + num_tokens - 1]) + 1 - start

    def _slice(self, job: _Job, laid_out: Tensor | None, num_tokens: int) -> list[Tensor]:
        """Of the layout of a context (..., S), what concerns the next tokens; nothing where there is none."""
        start = self._cache.lengths[job.slot]
        return [] if laid_out is None else [laid_out[..., start : start + num_tokens]]

    def _resume(self, answers: Iterable[tuple[_Job, Tensor | Choice | None]]) -> None:
        """Answer scripts until each asks for something to be read, or has ended."""
        while answers:
            asking: list[tuple[_Job, Score]] = []
            for job, answer in answers:
                try:
                    asked = job.asking.send(answer)
                except StopIteration:
                    job.is_done = True
                except Exception as failure:  # one request fails, the others go on
                    job.fail(failure)
                else:
                    if isinstance(asked, Score):
                        asking.append((job, asked))
                    else:
                        self._begin(job, asked)
            if not asking:
                return
            answers = self._draw(asking)

    def _draw(self, asking: Sequence[tuple[_Job, Score]]) -> list[tuple[_Job, Choice]]:
        """The tokens that follow some states. A request whose token cannot be drawn fails alone."""
        self.num_generated_tokens += len(asking)
        first_voken = self.language.voken_embeddings.first
        logits_RT = self.language.logits(torch.stack([score.state_H for _, score in asking]))
        drawn = []
        if self._draws_on_device:
            tokens = draw_tokens(logits_RT, [score.draw for _, score in asking], first_voken=first_voken)
            for (job, _), token in zip(asking, tokens, strict=True):
                if token == NOT_DRAWN:
                    job.fail(FloatingPointError(NOT_FINITE))
                else:
                    drawn.append((job, Choice(token=token, margin=math.inf)))
            return drawn
        for (job, score), logits_T in zip(asking, logits_RT.float().cpu().numpy(), strict=True):
            try:
                drawn.append((job, draw_token(logits_T, score.draw, first_voken=first_voken)))
            except Exception as failure:  # one request fails, the others go on
                job.fail(failure)
        return drawn

    def _begin(self, job: _Job, read: Read) -> None:
        self._cache.lengths[job.slot] = read.start
        self._contents[job.slot, read.start : read.start + len(read.ids)] = read.ids
        job.left, job.num_states, job.states = read.ids, read.num_states, []

    def _leave(self, job: _Job) -> None:
        """Its slot is free; what it has read may serve one that begins alike."""
        if job.slot >= 0:
            self._free_slots.append(job.slot)
            self._cache.trim(job.slot)
        self.num_close_choices += job.steps.num_close
        job.asking.close()


def new_cache(language: LanguageModel, limits: Limits, *, num_positions: int) -> SlotCache:
    """A KV store within the limits: of whole slots on a CPU where no size is given, else in blocks.

    Raises SettingsError where blocks have no room for one sequence of `num_positions`.
    """
    device, prefix = language.embedding.device, language.prefix
    make = partial(
        SlotCache.for_model,
        language.body,
        num_slots=limits.num_slots,
        num_positions=num_positions,
        prefix_L2GFD=prefix().detach() if prefix else None,
    )
    if device.type == "cpu" and limits.kv_cache_gib is None:
        return make()
    free_bytes, total_bytes = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    used_bytes = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    size = kv_cache_bytes(limits, free_bytes=free_bytes, total_bytes=total_bytes, used_bytes=used_bytes)
    block_bytes = BLOCK * bytes_per_token(language.body)
    needed = num_blocks(num_positions + (prefix.num_tokens if prefix else 0))
    if size < needed * block_bytes:
        raise SettingsError(
            f"the KV store has {size / 2**30:.2f} GiB, but one request of {num_positions} tokens takes "
            f"{needed * block_bytes / 2**30:.2f}: set kv_cache_gib to at least that, or use a GPU with more memory"
        )
    return make(num_shared_blocks=min(size // block_bytes, limits.num_slots * needed))
