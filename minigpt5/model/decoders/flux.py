"""FLUX.1 dev and schnell: a transformer over text and 2 x 2 patches of latents that predicts a flow.

Both are distilled and draw without a second prediction. dev takes the guidance scale as an input; schnell has no
guidance and few steps. T5 gives the condition's states, 512 positions of 4096, and CLIP's pooled vector its one vector.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

from minigpt5.errors import ModelFolderError
from minigpt5.model.decoders.diffusion import DecoderSizes, Diffusion, join_pooled, read_config, split_pooled
from minigpt5.model.decoders.noise import RectifiedFlow
from minigpt5.model.decoders.pipeline_text import PipelineTextEncoder, load_text_half
from minigpt5.types import DrawSettings

T5_POSITIONS = 512
"""What the pipeline cuts T5's text to."""


class Flux(Diffusion):
    """dev shifts its schedule by the picture's size; schnell does not, and its config says so."""

    PIPELINES = ("FluxPipeline",)
    PATCH = 2

    noise: RectifiedFlow

    @classmethod
    def load_noise(cls, folder: str | Path) -> RectifiedFlow:
        noise = RectifiedFlow(FlowMatchEulerDiscreteScheduler.from_pretrained(Path(folder) / "scheduler"))
        if not noise.is_shifted_by_size:  # the pipeline hands a shift to DPM-Solver++, which then refuses it
            noise.samplers = {"euler": noise.samplers["euler"]}
        return noise

    @classmethod
    def read_sizes(cls, folder: Path) -> DecoderSizes:
        transformer, vae = (read_config(folder / name) for name in ("transformer", "vae"))
        channels = transformer["in_channels"]
        if channels != cls.PATCH**2 * vae["latent_channels"]:
            raise ModelFolderError(
                f"the transformer of {folder} reads {channels} channels, which are no 2 x 2 patches of the "
                f"{vae['latent_channels']} channels of its VAE: name a FLUX.1 that draws from text alone"
            )
        is_dev = transformer.get("guidance_embeds", False)
        return DecoderSizes(
            condition_length=T5_POSITIONS,
            condition_width=transformer["joint_attention_dim"],
            condition_pooled=transformer["pooled_projection_dim"],
            image_px=vae["sample_size"],
            draw=DrawSettings(steps=50, guidance_scale=3.5, scheduler="euler")
            if is_dev
            else DrawSettings(steps=4, guidance_scale=1.0, scheduler="euler"),
        )

    @classmethod
    def load_text_encoder(cls, folder: str | Path, *, num_positions: int) -> PipelineTextEncoder:
        """`num_positions`: T5's, which may be fewer than 512. schnell's card draws with 256."""
        pipeline = load_text_half(FluxPipeline, folder, denoiser=cls.DENOISER)
        encode = partial(_encode, num_positions=num_positions)
        return PipelineTextEncoder(pipeline, encode=encode, encode_none=lambda pipeline: encode(pipeline, [""]))

    @property
    def native_px(self) -> int:
        """From the VAE, since the transformer's config has no size."""
        return int(self.vae.config.sample_size)

    @property
    def latent_channels(self) -> int:
        return int(self.denoiser.config.in_channels // self.PATCH**2)

    def is_guided(self, draw: DrawSettings) -> bool:
        return False

    def set_timesteps(self, sampler: Any, draw: DrawSettings) -> None:
        _, rows, columns = self.latent_shape(draw)
        shift = self.noise.shift_for(rows * columns // self.PATCH**2)
        if isinstance(sampler, FlowMatchEulerDiscreteScheduler):
            sampler.set_timesteps(sigmas=np.linspace(1.0, 1 / draw.steps, draw.steps), **shift)
        else:
            sampler.set_timesteps(draw.steps, **shift)

    def predict(
        self,
        denoiser: Any,
        latents_BCYX: Tensor,
        timesteps_B: Tensor,
        condition_BQD: Tensor,
        *,
        guidance_B: Tensor | None = None,
    ) -> Tensor:
        """Without `guidance_B` the scale is 1, as diffusers trains dev."""
        config = self.denoiser.config
        states_BQD, pooled_BP = split_pooled(condition_BQD, config.pooled_projection_dim)
        rows, columns = (side // self.PATCH for side in latents_BCYX.shape[2:])
        if config.guidance_embeds and guidance_B is None:
            guidance_B = torch.ones(len(latents_BCYX), device=latents_BCYX.device)
        predicted_BTC = denoiser(
            F.pixel_unshuffle(latents_BCYX, self.PATCH).flatten(2).transpose(1, 2),
            timestep=timesteps_B.to(latents_BCYX.dtype) / 1000,
            guidance=guidance_B if config.guidance_embeds else None,
            pooled_projections=pooled_BP,
            encoder_hidden_states=states_BQD,
            txt_ids=torch.zeros(states_BQD.shape[1], 3).to(latents_BCYX),
            img_ids=_patch_places(rows, columns).to(latents_BCYX),
        ).sample
        return self._to_latents(predicted_BTC, rows, columns)

    def unpack(self, latents: Tensor, draw: DrawSettings) -> Tensor:
        _, rows, columns = self.latent_shape(draw)
        return self._to_latents(latents, rows // self.PATCH, columns // self.PATCH)

    def _to_latents(self, patches_BTC: Tensor, rows: int, columns: int) -> Tensor:
        """Patches, a row after the other -> (B, C, Y, X)."""
        return F.pixel_shuffle(patches_BTC.transpose(1, 2).unflatten(2, (rows, columns)), self.PATCH)


def _patch_places(rows: int, columns: int) -> Tensor:
    """The place of each patch for the rotary embedding: zero, row, column. (T, 3)."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())


def _encode(pipeline: Any, captions: list[str], *, num_positions: int) -> Tensor:
    states_BQD, pooled_BP, _ = pipeline.encode_prompt(captions, max_sequence_length=num_positions)
    return join_pooled(states_BQD, pooled_BP)
