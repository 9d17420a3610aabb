"""Conditions -> latents, step by step: pictures at different steps and of different settings share a call.

A picture depends on its own condition, seed, settings and reference only, not on its batch. Guidance follows arXiv
2207.12598, rescaled as in arXiv 2305.08891, section 3.4; with a scale of 1 a picture has one place in the call instead
of two.

Shape letters: B pictures, C latent channels, Y X latent rows and columns, Q condition positions, D condition width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minigpt5.model.decoders.diffusion import Diffusion
from minigpt5.model.decoders.shared_attention import shared_attention
from minigpt5.types import DISTILLED, DrawSettings


class Denoising:
    """One picture on its way from noise to latents, with a sampler of its own."""

    def __init__(
        self,
        diffusion: Diffusion,
        condition_QD: Tensor,
        *,
        seed: int,
        draw: DrawSettings,
        guidance_rescale: float,
        noise_1CYX: Tensor | None = None,
        reference: Denoising | None = None,
        characters: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """`noise_1CYX`: what the picture begins as, instead of what `seed` gives. `reference`: another picture with the
        same settings, at its beginning too, which this one attends to in each step; see shared_attention.py.
        `characters`: what IpAdapter.states returns of pictures that it attends to."""
        self.reference, self.characters = reference, characters
        self.draw, self.guidance_rescale, self.condition_QD = draw, guidance_rescale, condition_QD
        self.is_guided = diffusion.is_guided(draw)
        self.sampler = diffusion.new_sampler(draw)
        self.generator = torch.Generator().manual_seed(_fold(seed))
        """Source of all noise: the first latents, and noise that the sampler adds."""
        self._noise = diffusion.noise
        if noise_1CYX is None:
            noise_1CYX = torch.randn((1, *diffusion.latent_shape(draw)), generator=self.generator)
        self.latents_1CYX = noise_1CYX.to(condition_QD) * getattr(self.sampler, "init_noise_sigma", 1.0)
        self.pred_x0_1CYX = self.latents_1CYX
        """What the last prediction makes of the latents without their noise."""
        self.num_calls = 0
        """Calls of the denoiser so far."""

    @property
    def num_calls_left(self) -> int:
        return len(self.sampler.timesteps) - self.num_calls

    @property
    def step(self) -> int:
        """Steps done, of `draw.steps`; some samplers need more calls than steps."""
        return max(1, self.num_calls * self.draw.steps // len(self.sampler.timesteps))

    @property
    def timestep(self) -> Tensor:
        return self.sampler.timesteps[self.num_calls]

    def latents_in(self) -> Tensor:
        if not hasattr(self.sampler, "scale_model_input"):
            return self.latents_1CYX
        return self.sampler.scale_model_input(self.latents_1CYX, self.timestep)

    @property
    def shown_reference(self) -> Denoising | None:
        """What the picture attends to in this step: nothing in the first one, which decides its layout, as in the
        authors' code. A picture of one step attends in that."""
        is_laid_out = self.num_calls > 0 or len(self.sampler.timesteps) == 1
        return self.reference if is_laid_out else None

    def take(self, conditional_1CYX: Tensor, unconditional_1CYX: Tensor | None) -> None:
        """Go a step on, as the denoiser predicts."""
        predicted = conditional_1CYX
        if unconditional_1CYX is not None:
            predicted = guide(
                conditional_1CYX,
                unconditional_1CYX,
                scale=self.draw.guidance_scale,
                rescale=self.guidance_rescale,
            )
        self.pred_x0_1CYX = self._noise.clean_sample(
            self.draw.scheduler, self.sampler, self.latents_1CYX, predicted, self.num_calls
        )
        adds_noise = self._noise.samplers[self.draw.scheduler].adds_noise
        options = {"generator": self.generator} if adds_noise else {}
        self.latents_1CYX = self.sampler.step(predicted, self.timestep, self.latents_1CYX, **options).prev_sample
        self.num_calls += 1


def guide(conditional_BCYX: Tensor, unconditional_BCYX: Tensor, *, scale: float, rescale: float) -> Tensor:
    """The guided prediction, each picture's scaled back to its own spread by `rescale`."""
    predicted_BCYX = unconditional_BCYX + scale * (conditional_BCYX - unconditional_BCYX)
    if not rescale:
        return predicted_BCYX
    spread_B111 = conditional_BCYX.std((1, 2, 3), keepdim=True) / predicted_BCYX.std((1, 2, 3), keepdim=True)
    return predicted_BCYX * (rescale * spread_B111 + 1 - rescale)


def _fold(seed: int) -> int:
    """torch takes the low 32 bits of a seed on a CPU: those of a larger one are a hash of all of it."""
    return seed if seed < 2**32 else int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4])


def _raise(failure: Exception, pictures: Sequence[Denoising]) -> None:
    raise failure


@torch.no_grad()
def advance(
    diffusion: Diffusion,
    pictures: Sequence[Denoising],
    null_1QD: Tensor,
    *,
    fail: Callable[[Exception, Sequence[Denoising]], None] = _raise,
) -> None:
    """A step of all pictures and their references, whichever each is at: one call for all of one denoiser, style and
    size, which fail together and without the others. `fail` is told of it; without it the failure is raised."""
    alike: dict[tuple[int, str, torch.Size], tuple[Any, list[Denoising]]] = {}
    for picture in pictures:
        is_changed = any(one.shown_reference or one.characters for one in _rows([picture]))
        denoiser = diffusion.denoiser_for(picture.draw.scheduler, picture.draw.style, is_changed=is_changed)
        key = id(denoiser), picture.draw.style, picture.latents_1CYX.shape
        alike.setdefault(key, (denoiser, []))[1].append(picture)
    for (_, style, _), (denoiser, together) in alike.items():
        try:
            if together[0].draw.scheduler != DISTILLED:
                diffusion.use_style(style)
            _advance_together(diffusion, denoiser, _rows(together), null_1QD)
        except Exception as failure:  # such as a size for which the memory is too small
            fail(failure, together)


def _rows(pictures: Sequence[Denoising]) -> list[Denoising]:
    """Pictures, each followed by its reference."""
    return [one for picture in pictures for one in (picture, picture.reference) if one]


def _advance_together(diffusion: Diffusion, denoiser: Any, pictures: Sequence[Denoising], null_1QD: Tensor) -> None:
    """One call of the denoiser; everything around it is float32."""
    guided = [picture for picture in pictures if picture.is_guided]
    calls = [*guided, *pictures]
    conditions = [*[null_1QD[0]] * len(guided), *(picture.condition_QD for picture in pictures)]
    device, dtype = null_1QD.device, diffusion.dtype
    references = {**_references(guided), **_references(pictures, first=len(guided))}
    states = {
        row: picture.characters[0 if row >= len(guided) else 1]
        for row, picture in enumerate(calls)
        if picture.characters
    }
    with shared_attention(denoiser, references), diffusion.attending(denoiser, states):
        predicted_BCYX = diffusion.predict(
            denoiser,
            torch.cat([picture.latents_in() for picture in calls]).to(dtype),
            torch.stack([picture.timestep for picture in calls]).to(device),
            torch.stack(conditions).to(dtype),
            guidance_B=torch.tensor([picture.draw.guidance_scale for picture in calls], device=device),
        )
    predicted = predicted_BCYX.float().split(1)
    unconditional = dict(zip(map(id, guided), predicted, strict=False))
    for picture, conditional in zip(pictures, predicted[len(guided) :], strict=True):
        picture.take(conditional, unconditional.get(id(picture)))


def _references(pictures: Sequence[Denoising], *, first: int = 0) -> dict[int, int]:
    """Row of a picture in a call -> row of its reference, of pictures that stand there from row `first` on."""
    rows = {id(picture): row for row, picture in enumerate(pictures, start=first)}
    return {rows[id(one)]: rows[id(one.shown_reference)] for one in pictures if one.shown_reference}


@torch.no_grad()
def denoise(
    diffusion: Diffusion,
    condition_BQD: Tensor,
    null_1QD: Tensor,
    *,
    seeds: list[int],
    draw: DrawSettings,
    guidance_rescale: float = 0.0,
) -> Tensor:
    """Draw one picture for each condition: (B, 3, pixels, pixels) in [-1, 1]."""
    pictures = [
        Denoising(diffusion, condition_QD, seed=seed, draw=draw, guidance_rescale=guidance_rescale)
        for condition_QD, seed in zip(condition_BQD, seeds, strict=True)
    ]
    while pictures[0].num_calls_left:
        advance(diffusion, pictures, null_1QD)
    latents_BCYX = torch.cat([picture.latents_1CYX for picture in pictures])
    return diffusion.to_pixels(latents_BCYX, scale=diffusion.scale_of(draw))
