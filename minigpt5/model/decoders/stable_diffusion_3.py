"""Stable Diffusion 3 and 3.5: a transformer over text and picture that predicts a flow (arXiv 2403.03206).

Two CLIP text encoders side by side and a T5 after them give the condition's states. The two pooled vectors of CLIP give
its one vector. The published T5 makes 77 + 256 positions, each 4096 wide.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor

from minigpt5.errors import InvalidRequest, ModelFolderError
from minigpt5.model.decoders.diffusion import DecoderSizes, Diffusion, join_pooled, read_config, split_pooled
from minigpt5.model.decoders.noise import RectifiedFlow
from minigpt5.model.decoders.pipeline_text import PipelineTextEncoder, load_text_half
from minigpt5.types import DrawSettings

T5_POSITIONS = 256
"""What the pipeline cuts T5's text to."""


class StableDiffusion3(Diffusion):
    """The schedule's shift is fixed or follows the picture's size, as its config says."""

    PIPELINES = ("StableDiffusion3Pipeline",)
    ZERO_IS_EMPTY = True
    PATCH = 2

    noise: RectifiedFlow

    @classmethod
    def load_noise(cls, folder: str | Path) -> RectifiedFlow:
        return RectifiedFlow(FlowMatchEulerDiscreteScheduler.from_pretrained(Path(folder) / "scheduler"))

    @classmethod
    def read_sizes(cls, folder: Path) -> DecoderSizes:
        transformer, vae, clip = (read_config(folder / name) for name in ("transformer", "vae", "text_encoder"))
        if transformer["_class_name"] != "SD3Transformer2DModel":
            raise ModelFolderError(
                f"the transformer of {folder} is a {transformer['_class_name']}, not a Stable Diffusion 3's: "
                "name another folder"
            )
        return DecoderSizes(
            condition_length=clip.get("max_position_embeddings", 77) + T5_POSITIONS,
            condition_width=transformer["joint_attention_dim"],
            condition_pooled=transformer["pooled_projection_dim"],
            image_px=transformer["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1),
            draw=_draw_settings(transformer),
        )

    @classmethod
    def load_text_encoder(cls, folder: str | Path, *, num_positions: int) -> PipelineTextEncoder:
        """CLIP's positions come first; T5 gets those that are left, and `num_positions` may leave it fewer than 256.

        A folder without T5 has zeros in T5's positions, as the pipeline has them.
        """
        pipeline = load_text_half(StableDiffusion3Pipeline, folder, denoiser=cls.DENOISER)
        # Without T5 the pipeline reads the width of its zeros here.
        pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**read_config(Path(folder) / cls.DENOISER)))
        encode = partial(_encode, num_positions=num_positions)
        return PipelineTextEncoder(pipeline, encode=encode, encode_none=lambda pipeline: encode(pipeline, [""]))

    def latent_shape(self, draw: DrawSettings) -> tuple[int, int, int]:
        """Also raises InvalidRequest where a side has more patches than the table of positions."""
        shape = super().latent_shape(draw)
        longest = self.denoiser.config.pos_embed_max_size * self.multiple
        for name, side in (("height", shape[1]), ("width", shape[2])):
            if side * self.pixels_per_latent > longest:
                raise InvalidRequest(
                    name, f"{name} is {side * self.pixels_per_latent} but must be at most {longest} with this model"
                )
        return shape

    def set_timesteps(self, sampler: Any, draw: DrawSettings) -> None:
        _, rows, columns = self.latent_shape(draw)
        sampler.set_timesteps(draw.steps, **self.noise.shift_for(rows * columns // self.PATCH**2))

    def predict(
        self,
        denoiser: Any,
        latents_BCYX: Tensor,
        timesteps_B: Tensor,
        condition_BQD: Tensor,
        *,
        guidance_B: Tensor | None = None,
    ) -> Tensor:
        states_BQD, pooled_BP = split_pooled(condition_BQD, self.denoiser.config.pooled_projection_dim)
        return denoiser(
            latents_BCYX, timestep=timesteps_B, encoder_hidden_states=states_BQD, pooled_projections=pooled_BP
        ).sample


def _draw_settings(transformer: dict[str, Any]) -> DrawSettings:
    """As the model cards draw. 3.5 normalises queries and keys; its medium model has second attention layers.

    No config tells 3.5 large from its turbo, which draws in 4 steps with a guidance of 1.
    """
    if not transformer.get("qk_norm"):
        return DrawSettings(steps=28, guidance_scale=7.0, scheduler="euler")
    if transformer.get("dual_attention_layers"):
        return DrawSettings(steps=40, guidance_scale=4.5, scheduler="euler")
    return DrawSettings(steps=28, guidance_scale=3.5, scheduler="euler")


def _encode(pipeline: Any, captions: list[str], *, num_positions: int) -> Tensor:
    states_BQD, _, pooled_BP, _ = pipeline.encode_prompt(
        captions,
        None,
        None,
        do_classifier_free_guidance=False,
        max_sequence_length=max(1, num_positions - pipeline.tokenizer_max_length),
    )
    return join_pooled(states_BQD[:, :num_positions], pooled_BP)
