"""ERNIE-Image: one stream of picture and text, with FLUX.2's autoencoder and a Mistral that reads the caption.

diffusers' pipeline is the source, since the model has no paper. A language model may rewrite captions in that pipeline.
It is left out here (`use_pe=False` of the pipeline), as a condition that the mapper writes has no caption.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ErnieImagePipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from minigpt5.errors import ModelFolderError
from minigpt5.model.decoders.diffusion import DecoderSizes, Diffusion, read_config
from minigpt5.model.decoders.noise import RectifiedFlow
from minigpt5.model.decoders.pipeline_text import PipelineTextEncoder, load_text_half
from minigpt5.types import DrawSettings

CONDITION_LENGTH = 256
"""Our choice: the pipeline does not cut captions."""
PATCHED = 2
"""A latent is a square of so many of the autoencoder's own, in its channels."""
BATCH_NORM_EPSILON = 1e-5
"""As the pipeline has it, and not the autoencoder's config."""


class ErnieImage(Diffusion):
    """Latents are patches of the autoencoder's, normalised by its running statistics."""

    PIPELINES = ("ErnieImagePipeline",)
    ZERO_IS_EMPTY = True
    PIPELINE_OPTIONS = {"use_pe": False}

    @classmethod
    def load_noise(cls, folder: str | Path) -> RectifiedFlow:
        """The pipeline hands its sampler sigmas, which DPM-Solver++ does not take."""
        noise = RectifiedFlow(FlowMatchEulerDiscreteScheduler.from_pretrained(Path(folder) / "scheduler"))
        noise.samplers = {"euler": noise.samplers["euler"]}
        return noise

    @classmethod
    def read_sizes(cls, folder: Path) -> DecoderSizes:
        transformer, vae = (read_config(folder / name) for name in ("transformer", "vae"))
        if transformer["in_channels"] != PATCHED**2 * vae["latent_channels"]:
            raise ModelFolderError(
                f"the transformer of {folder} reads {transformer['in_channels']} channels, which are no 2 x 2 patches "
                f"of the {vae['latent_channels']} channels of its VAE: name an ERNIE-Image"
            )
        return DecoderSizes(
            condition_length=CONDITION_LENGTH,
            condition_width=transformer["text_in_dim"],
            image_px=vae["sample_size"],
            draw=DrawSettings(steps=50, guidance_scale=4.0, scheduler="euler"),
        )

    @classmethod
    def load_text_encoder(cls, folder: str | Path, *, num_positions: int) -> PipelineTextEncoder:
        """States of longer captions are cut: the text encoder is causal, so they are those of the cut caption."""
        pipeline = load_text_half(ErnieImagePipeline, folder, denoiser=cls.DENOISER, left_out=("pe", "pe_tokenizer"))
        encode = partial(_encode, num_positions=num_positions)
        return PipelineTextEncoder(pipeline, encode=encode, encode_none=lambda pipeline: encode(pipeline, [""]))

    @property
    def pixels_per_latent(self) -> int:
        return PATCHED * super().pixels_per_latent

    @property
    def native_px(self) -> int:
        """From the VAE, since the transformer's config has no size."""
        return int(self.vae.config.sample_size)

    def normalise(self, latents_BCYX: Tensor) -> Tensor:
        return super().normalise(F.pixel_unshuffle(latents_BCYX, PATCHED))

    def denormalise(self, latents_BCYX: Tensor) -> Tensor:
        return F.pixel_shuffle(super().denormalise(latents_BCYX), PATCHED)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.vae.bn
        mean, variance = (values.view(1, -1, 1, 1).to(like) for values in (seen.running_mean, seen.running_var))
        return mean, (variance + BATCH_NORM_EPSILON).sqrt()

    def set_timesteps(self, sampler: Any, draw: DrawSettings) -> None:
        sampler.set_timesteps(sigmas=torch.linspace(1.0, 0.0, draw.steps + 1)[:-1].numpy())

    def predict(
        self,
        denoiser: Any,
        latents_BCYX: Tensor,
        timesteps_B: Tensor,
        condition_BQD: Tensor,
        *,
        guidance_B: Tensor | None = None,
    ) -> Tensor:
        return denoiser(
            latents_BCYX,
            timestep=timesteps_B.to(latents_BCYX.dtype),
            text_bth=condition_BQD,
            text_lens=condition_BQD.any(-1).sum(-1),
        ).sample


def _encode(pipeline: Any, captions: list[str], *, num_positions: int) -> Tensor:
    """Captions -> (B, num_positions, D), zero after each caption's end."""
    encoded_TD = pipeline.encode_prompt(captions, pipeline.device)
    cut_TD = [states_TD[:num_positions] for states_TD in encoded_TD]
    return torch.stack([F.pad(states_TD, (0, 0, 0, num_positions - len(states_TD))) for states_TD in cut_TD])
