"""The limit: the same tokens and steps in lockstep with no engine around them, by the kernels that the engines use.

Text and pictures are measured one after the other, each with all threads, at the best of a sweep of batch sizes. Every
picture goes through the same sampler as the engines' pictures, here for the whole batch at once.

Shape letters: B stories or pictures, S positions, V vokens, H language-model width, Q condition positions, D condition
width, C latent channels, Y X latent rows and columns, G key heads, D head width.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from benchmarks.engine_pair import Engines
from benchmarks.load import Load
from minigpt5.engine.decoder import encode
from minigpt5.engine.denoising import guide
from minigpt5.types import StoryRequest

ROOM = 1024
"""Positions that the keys and values of a story have room for."""


class Lockstep:
    """What the bench asks the limit for."""

    def __init__(self, engines: Engines, load: Load) -> None:
        self.engines, self.load = engines, load

    def text(self, batch_size: int) -> float:
        """Seconds of text a story."""
        (story,) = self.engines.new_stories(1, self.load, pictures=next(iter(self.load.stories)))
        return write(self.engines, story, batch_size)

    def pictures(self, pictures: str, batch_size: int) -> float:
        """Seconds a picture."""
        (story,) = self.engines.new_stories(1, self.load, pictures=pictures)
        return draw(self.engines, story, batch_size)


class RoomyLayer(DynamicLayer):
    """Keys and values with room for those to come, (B, G, S, D): transformers' own copies all of them at each token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], ROOM, key_states.shape[-1])
            self.roomy_keys, self.roomy_values = key_states.new_empty(shape), value_states.new_empty(shape)
        first = self.get_seq_length()
        last = first + key_states.shape[-2]
        self.roomy_keys[:, :, first:last], self.roomy_values[:, :, first:last] = key_states, value_states
        self.keys, self.values = self.roomy_keys[:, :, :last], self.roomy_values[:, :, :last]
        return self.keys, self.values


@torch.no_grad()
def write(engines: Engines, request: StoryRequest, batch_size: int) -> float:
    """Seconds of text a story: as many tokens, the same in every row, logits computed and not looked at."""
    language = engines.generator.language
    began = time.perf_counter()
    cache = Cache(layer_class_to_replicate=RoomyLayer)

    def read(ids: list[int]) -> Tensor:
        ids_BS = torch.tensor([ids]).expand(batch_size, -1)
        return language.states(language.embed(ids_BS), cache=cache)[:, -1]

    states_BH = read(engines.prompt_ids(request))
    for _ in range(request.pages):
        for token in range(request.sampling.max_page_tokens):
            language.logits(states_BH)
            states_BH = read([100 + token])
        states_BH = read(language.voken_embeddings.ids)
    return (time.perf_counter() - began) / batch_size


@torch.no_grad()
def draw(engines: Engines, request: StoryRequest, batch_size: int) -> float:
    """Seconds a picture, guided or not."""
    decoder, settings = engines.decoder, request.draw
    diffusion = decoder.diffusion
    began = time.perf_counter()
    states_BVH = torch.randn(batch_size, engines.config.num_vokens, engines.config.hidden)
    sampler, is_guided = diffusion.new_sampler(settings), diffusion.is_guided(settings)
    condition_BQD = decoder.mapper(states_BVH)
    if is_guided:
        condition_BQD = torch.cat([decoder.null_1QD.expand(batch_size, -1, -1), condition_BQD])
    latents_BCYX = torch.randn(batch_size, *diffusion.latent_shape(settings))
    denoiser = diffusion.denoiser_for(settings.scheduler)
    for timestep in sampler.timesteps:
        calls_BCYX = torch.cat([latents_BCYX] * 2) if is_guided else latents_BCYX
        predicted_BCYX = diffusion.predict(denoiser, calls_BCYX, timestep.expand(len(calls_BCYX)), condition_BQD)
        if is_guided:
            unconditional, conditional = predicted_BCYX.chunk(2)
            rescale = engines.config.guidance_rescale
            predicted_BCYX = guide(conditional, unconditional, scale=settings.guidance_scale, rescale=rescale)
        latents_BCYX = sampler.step(predicted_BCYX, timestep, latents_BCYX).prev_sample
    encode(diffusion.to_pixels(latents_BCYX, scale=diffusion.scale_of(settings)), "PNG")
    return (time.perf_counter() - began) / batch_size
