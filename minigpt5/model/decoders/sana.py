"""Sana: a transformer with linear attention over strongly compressed latents, which predicts a flow (arXiv 2410.10629).

Gemma 2 reads the caption after the instruction that the pipeline puts before it. Positions of padding are masked.

The pipeline rounds a picture's size to one of its training sizes and scales the picture back; that is left out here,
so a picture has the size that was asked for (`use_resolution_binning=False` of the pipeline).
"""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DPMSolverMultistepScheduler, SanaPipeline
from torch import Tensor

from minigpt5.errors import ModelFolderError
from minigpt5.model.decoders.diffusion import DecoderSizes, Diffusion, normal_like, read_config
from minigpt5.model.decoders.noise import RectifiedFlow
from minigpt5.model.decoders.pipeline_text import PipelineTextEncoder, load_text_half
from minigpt5.types import DrawSettings

CONDITION_LENGTH = 300
"""What the pipeline cuts the caption to."""
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
"""What the pipeline puts before a caption, in lines."""


class Sana(Diffusion):
    """The autoencoder is deterministic: its moments are the latents."""

    PIPELINES = ("SanaPipeline",)
    ZERO_IS_EMPTY = True
    PIPELINE_OPTIONS = {"use_resolution_binning": False}

    @classmethod
    def load_noise(cls, folder: str | Path) -> RectifiedFlow:
        return RectifiedFlow(DPMSolverMultistepScheduler.from_pretrained(Path(folder) / "scheduler"))

    @classmethod
    def read_sizes(cls, folder: Path) -> DecoderSizes:
        transformer, vae = (read_config(folder / name) for name in ("transformer", "vae"))
        if transformer["_class_name"] != "SanaTransformer2DModel" or transformer.get("guidance_embeds"):
            kind = "a distilled Sana" if transformer.get("guidance_embeds") else f"a {transformer['_class_name']}"
            raise ModelFolderError(f"the transformer of {folder} is {kind}, not Sana's own: name another folder")
        return DecoderSizes(
            condition_length=CONDITION_LENGTH,
            condition_width=transformer["caption_channels"],
            image_px=transformer["sample_size"] * 2 ** (len(vae["encoder_block_out_channels"]) - 1),
            draw=DrawSettings(steps=20, guidance_scale=4.5, scheduler="dpm-solver++"),
        )

    @classmethod
    def load_text_encoder(cls, folder: str | Path, *, num_positions: int) -> PipelineTextEncoder:
        """`num_positions` below 300 cuts captions to so many tokens, as the pipeline's `max_sequence_length` does."""
        pipeline = load_text_half(SanaPipeline, folder, denoiser=cls.DENOISER)
        encode = partial(_encode, num_positions=num_positions)
        return PipelineTextEncoder(
            pipeline,
            encode=partial(encode, instruction=INSTRUCTION),
            encode_none=lambda pipeline: encode(pipeline, [""], instruction=None),
        )

    @property
    def pixels_per_latent(self) -> int:
        return int(2 ** (len(self.vae.config.encoder_block_out_channels) - 1))

    def encode(self, pixels_BCYX: Tensor) -> Tensor:
        """Pictures in [-1, 1] -> the latents that the autoencoder gives: (B, C, Y, X)."""
        return self.vae.encode(pixels_BCYX).latent

    def from_moments(self, moments_BMYX: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """What `to_moments` gives -> normalised latents. There is no posterior to sample from: `noise` is unused."""
        return self.normalise(moments_BMYX.float())

    def noise_like_latents(self, moments_BMYX: Tensor) -> Tensor:
        return normal_like(moments_BMYX.float())

    def predict(
        self,
        denoiser: Any,
        latents_BCYX: Tensor,
        timesteps_B: Tensor,
        condition_BQD: Tensor,
        *,
        guidance_B: Tensor | None = None,
    ) -> Tensor:
        predicted_BCYX = denoiser(
            latents_BCYX,
            encoder_hidden_states=condition_BQD,
            encoder_attention_mask=condition_BQD.any(-1).to(condition_BQD.dtype),
            timestep=timesteps_B * denoiser.config.timestep_scale,
        ).sample
        return predicted_BCYX[:, : self.latent_channels]  # a variance may follow, which no sampler reads


def _encode(pipeline: Any, captions: list[str], *, num_positions: int, instruction: list[str] | None) -> Tensor:
    """Captions -> (B, num_positions, D), zero at the positions of padding."""
    states_BQD, mask_BQ, _, _ = pipeline.encode_prompt(
        captions,
        do_classifier_free_guidance=False,
        max_sequence_length=num_positions,
        complex_human_instruction=instruction,
    )
    return states_BQD * mask_BQ[..., None]
