"""A diffusion model beside diffusers' own pipeline: the same text, noise and sampler, the deviation of the latents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor

from minigpt5.engine.denoising import Denoising, advance
from minigpt5.errors import ModelFolderError
from minigpt5.model.decoders.diffusion import Diffusion
from minigpt5.model.decoders.load import load_diffusion
from minigpt5.model.decoders.pipeline_text import absent_parts
from minigpt5.model.decoders.stable_diffusion import StableDiffusion
from minigpt5.model.weights import save_tensors
from minigpt5.types import DISTILLED, DrawSettings

CAPTION = "A red fox finds a balloon in the snow."
TOLERANCE = 1e-4
"""Largest deviation of latents, as a share of the largest one, in float32."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One picture, drawn in both ways."""

    draw: DrawSettings
    deviation: float
    latents_1CYX: Tensor
    """Ours."""

    @property
    def is_close(self) -> bool:
        return self.deviation <= TOLERANCE


class Pair:
    """A folder in diffusers' layout, ready to draw in both ways with one set of weights."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ModelFolderError where no family fits, or its pipeline lacks the text encoders."""
        self.ours: Diffusion = load_diffusion(folder).eval()
        parts = {"vae": self.ours.vae, type(self.ours).DENOISER: self.ours.denoiser}
        has_text = any(Path(folder).glob("text_encoder*"))
        if not has_text and type(self.ours) is not StableDiffusion:
            raise ModelFolderError(
                f"{folder} has no text encoders, which the pipeline of {type(self.ours).__name__} needs: compare the "
                "base model that it was trained from"
            )
        if has_text:
            self.pipeline: Any = DiffusionPipeline.from_pretrained(
                folder, use_safetensors=True, **absent_parts(folder), **parts
            )
            sizes = self.ours.read_sizes(Path(folder))
            encoder = self.ours.load_text_encoder(folder, num_positions=sizes.condition_length)
            self.condition_QD, self.null_1QD = encoder([CAPTION])[0], encoder([""])
            self.asked: dict[str, Any] = {"prompt": CAPTION}
        else:  # a model folder's own decoder, which no text encoder belongs to
            self.pipeline = _pipeline_without_text(folder, self.ours)
            width = self.ours.denoiser.config.cross_attention_dim
            generator = torch.Generator().manual_seed(0)
            self.condition_QD, self.null_1QD = (torch.randn(n, width, generator=generator) for n in (8, 8))
            self.null_1QD = self.null_1QD[None]
            self.asked = {"prompt_embeds": self.condition_QD[None], "negative_prompt_embeds": self.null_1QD}
        self.asked |= self.ours.PIPELINE_OPTIONS
        self.pipeline.set_progress_bar_config(disable=True)
        self._schedule = self.pipeline.scheduler.config

    def cases(self, *, steps: int) -> list[DrawSettings]:
        """Every sampler, guided and not, square and not."""
        ours = self.ours
        wide = (ours.native_px + 2 * ours.multiple, max(ours.multiple, ours.native_px - 2 * ours.multiple))
        return [
            DrawSettings(steps=steps, guidance_scale=scale, scheduler=sampler, width=width, height=height)
            for sampler in ours.samplers
            if sampler != DISTILLED
            for scale in (1.0, 4.0)
            for width, height in ((ours.native_px, ours.native_px), wide)
        ]

    @torch.no_grad()
    def compare(self, draw: DrawSettings, *, seed: int) -> Case:
        """Draw one picture in both ways."""
        ours_1CYX = self.draw([draw], seed=seed)[0]
        sampler = self.ours.noise.samplers[draw.scheduler]
        options = self.ours.noise.options(sampler)
        self.pipeline.scheduler = sampler.scheduler.from_config(self._schedule, **options)
        theirs = self.pipeline(
            **self.asked,
            num_inference_steps=draw.steps,
            guidance_scale=draw.guidance_scale,
            width=draw.width,
            height=draw.height,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images
        theirs_1CYX = self.ours.unpack(theirs, draw)
        deviation = float((ours_1CYX - theirs_1CYX).abs().max() / theirs_1CYX.abs().max())
        return Case(draw=draw, deviation=deviation, latents_1CYX=ours_1CYX)

    @torch.no_grad()
    def draw(self, settings: list[DrawSettings], *, seed: int) -> list[Tensor]:
        """Pictures by our engine, each a step further in every call: (1, C, Y, X) each."""
        pictures = [
            Denoising(self.ours, self.condition_QD, seed=seed, draw=draw, guidance_rescale=0.0) for draw in settings
        ]
        while running := [picture for picture in pictures if picture.num_calls_left]:
            advance(self.ours, running, self.null_1QD)
        return [picture.latents_1CYX for picture in pictures]


def _pipeline_without_text(folder: str | Path, ours: Diffusion) -> Any:
    return StableDiffusionPipeline(
        vae=ours.vae,
        unet=ours.denoiser,
        scheduler=ours.noise_schedule,
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def compare(folder: str | Path, *, steps: int = 6, seed: int = 5, save: Path | None = None) -> bool:
    """Print every case's deviation; returns whether all are close. `save`: a safetensors file for our first latents.

    Raises ModelFolderError where no family fits.
    """
    pair = Pair(folder)
    print(f"{type(pair.ours).__name__}, {steps} steps, seed {seed}: deviation of latents from diffusers' own pipeline")
    are_close = True
    for number, case in enumerate(_compared(pair, steps=steps, seed=seed)):
        draw = case.draw
        print(
            f"  {draw.scheduler:18} guidance {draw.guidance_scale:g}  {draw.width:4} x {draw.height:<4} "
            f"{case.deviation:9.1e}{'' if case.is_close else f'  above {TOLERANCE:g}'}",
            flush=True,
        )
        are_close = are_close and case.is_close
        if save and not number:
            save_tensors({"latents": case.latents_1CYX}, save)
    return are_close


def _compared(pair: Pair, *, steps: int, seed: int) -> Iterator[Case]:
    return (pair.compare(draw, seed=seed) for draw in pair.cases(steps=steps))
