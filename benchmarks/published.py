"""The published way: one story at a time, token by token, and diffusers' own pipeline for each picture.

It computes in float32 with torch's own kernels. A default request gets the same picture as by the engines, so that a
ratio compares engines and not numbers of steps: the distilled UNet, 4 unguided steps, in diffusers' pipeline with the
sampler of the model folder (a DDIMScheduler), since no scheduler of diffusers repeats a timestep.

Shape letters: S positions, H language-model width, V vokens, T vocabulary, Q condition positions, D condition width,
C latent channels, Y X latent rows and columns, B pictures.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import DynamicCache

from benchmarks.engine_pair import Engines
from benchmarks.load import Load
from minigpt5.engine.decoder import DiffusionDecoder, encode
from minigpt5.engine.sampling import sample_token
from minigpt5.story.stream import page_seed
from minigpt5.types import DrawSettings, StoryRequest


class PublishedWay:
    """What the bench asks the published way for."""

    def __init__(self, engines: Engines, load: Load) -> None:
        self.engines, self.load = engines, load

    def story(self, pictures: str) -> float:
        """Seconds of one story."""
        return write(self.engines, self.engines.new_stories(1, self.load, pictures=pictures)[0])

    @torch.no_grad()
    def pictures(self, num: int) -> float:
        """Seconds a picture of the default request by diffusers' pipeline, `num` in a call, PNG included."""
        decoder, config = self.engines.decoder, self.engines.config
        pipeline = new_pipeline(decoder, config.default_draw)
        states_BVH = torch.randn(num, config.num_vokens, config.hidden)
        began = time.perf_counter()
        draw(pipeline, decoder, states_BVH, config.default_draw, seed=0)
        return (time.perf_counter() - began) / num


@torch.no_grad()
def write(engines: Engines, request: StoryRequest) -> float:
    """Seconds of one story."""
    began = time.perf_counter()
    language = engines.generator.language
    pipeline = new_pipeline(engines.decoder, request.draw)
    cache = DynamicCache()
    ids_1S = torch.tensor([engines.prompt_ids(request)])
    state_H = language.states(language.embed(ids_1S), cache=cache)[0, -1]
    for page in range(1, request.pages + 1):
        written: list[int] = []
        while len(written) < request.sampling.max_page_tokens:
            logits_T = language.logits(state_H).numpy()
            logits_T[language.voken_embeddings.first :] = -np.inf
            logits_T[list(engines.generator.end_ids)] = -np.inf
            choice = sample_token(
                logits_T, request.sampling, seed=request.seed, page=page, position=len(written), seen=written
            )
            written.append(choice.token)
            engines.generator.tokenizer.decode(written)
            state_H = language.states(language.embed(torch.tensor([[choice.token]])), cache=cache)[0, -1]
        states_VH = language.states(language.embed(torch.tensor([language.voken_embeddings.ids])), cache=cache)[0]
        hidden_VH, state_H = torch.cat([state_H[None], states_VH[:-1]]), states_VH[-1]
        draw(pipeline, engines.decoder, hidden_VH[None], request.draw, seed=page_seed(request.seed, page))
    return time.perf_counter() - began


def new_pipeline(decoder: DiffusionDecoder, settings: DrawSettings) -> StableDiffusionPipeline:
    # An offset, which the pipeline insists on, plays no part with timesteps that are spaced from the end.
    pipeline = StableDiffusionPipeline(
        vae=decoder.diffusion.vae,
        unet=decoder.diffusion.denoiser_for(settings.scheduler),
        scheduler=decoder.diffusion.noise.new_sampler(settings.scheduler, steps_offset=1),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: StableDiffusionPipeline,
    decoder: DiffusionDecoder,
    states_BVH: Tensor,
    settings: DrawSettings,
    *,
    seed: int,
) -> list[bytes]:
    """PNG files, by the pipeline."""
    null_1QD = decoder.mapper.null_condition()
    latents_BCYX = pipeline(
        prompt_embeds=decoder.mapper(states_BVH),
        negative_prompt_embeds=null_1QD.expand(len(states_BVH), -1, -1),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        guidance_rescale=decoder.config.guidance_rescale,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images
    return encode(decoder.diffusion.to_pixels(latents_BCYX, scale=decoder.diffusion.scale_of(settings)), "PNG")
