"""The latent diffusion model in diffusers' own layout: VAE, UNet, noise schedule; denoising loss, picture <-> latents.

The folder's `scheduler/` holds the noise schedule. A sampler steps over it; requests name one in the field `scheduler`.

Shape letters: B pictures, C latent channels, M = 2C moments (mean, log variance), Y X latent rows and columns,
Q condition positions, D condition width; of pictures, C = 3 and Y X are pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from minigpt5.errors import ModelFolderError
from minigpt5.model.multistep_scheduler import MultistepScheduler
from minigpt5.types import DISTILLED, SDE_DPM_SOLVER

SAMPLERS = {
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "dpm-solver++": DPMSolverMultistepScheduler,
    SDE_DPM_SOLVER: DPMSolverMultistepScheduler,
    DISTILLED: MultistepScheduler,
}
ADDS_NOISE = {SDE_DPM_SOLVER, DISTILLED}
"""Samplers whose steps need a generator."""
DISTILLED_FOLDER = "unet_distilled"
SAMPLER_OPTIONS: dict[str, dict[str, object]] = {
    "pndm": {"skip_prk_steps": True},  # as Stable Diffusion's own folder has it
    SDE_DPM_SOLVER: {"algorithm_type": "sde-dpmsolver++"},
}
"""Options that a sampler needs and the folder's schedule does not carry."""
_LOADING = {"torch_dtype": torch.float32, "use_safetensors": True, "low_cpu_mem_usage": False}
MIN_VELOCITY_WEIGHT = 0.4
"""Lower bound of the min-SNR weight for v-prediction. Without it the steps of least signal, which decide the layout,
are hardly trained."""
MIN_SNR_GAMMA = 5.0  # arXiv 2303.09556


class Diffusion(nn.Module):
    """VAE, UNet and noise schedule of a latent diffusion model, with the distilled UNet if there is one. All parameters
    are trainable as loaded; callers freeze what they do not train."""

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        noise_schedule: DDIMScheduler,
        distilled: UNet2DConditionModel | None = None,
    ) -> None:
        super().__init__()
        self.vae, self.unet, self.noise_schedule, self.distilled = vae, unet, noise_schedule, distilled

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Diffusion:
        """Read `vae/`, `unet/`, `scheduler/` and, where it is there, `unet_distilled/` under `folder` as float32."""
        return cls(load_vae(folder), load_unet(folder), load_noise_schedule(folder), load_distilled(folder))

    def unet_for(self, sampler: str) -> UNet2DConditionModel:
        """Return the UNet that a key of SAMPLERS draws with. Raises ModelFolderError."""
        if sampler != DISTILLED:
            return self.unet
        if self.distilled is None:
            raise ModelFolderError(
                f"there is no distilled UNet in this model: draw with another scheduler than {sampler}"
            )
        return self.distilled

    def to_latents(self, pixels_BCYX: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Pictures in [-1, 1] -> normalised latents: the posterior's mode, or a sample where `noise` is given."""
        return self.from_moments(self.vae.encode(pixels_BCYX).latent_dist.parameters, noise=noise)

    def from_moments(self, moments_BMYX: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """The posterior's mean and log variance, as `vae.encode` gave them -> normalised latents; see `to_latents`."""
        posterior = DiagonalGaussianDistribution(moments_BMYX.float())
        latents_BCYX = posterior.mode() if noise is None else posterior.mean + posterior.std * noise
        return normalise(latents_BCYX, self.vae)

    def to_pixels(self, latents_BCYX: Tensor) -> Tensor:
        """Normalised latents -> pictures in [-1, 1]."""
        return self.to_raw_pixels(latents_BCYX).clamp(-1, 1)

    def to_raw_pixels(self, latents_BCYX: Tensor) -> Tensor:
        """Decode as `to_pixels` does, without cutting values outside of [-1, 1] off: a loss needs them."""
        return self.vae.decode(denormalise(latents_BCYX, self.vae)).sample

    def training_loss(self, latents_BCYX: Tensor, condition_BQD: Tensor, *, first_timestep: int = 0) -> Tensor:
        """Sample noise and timesteps and return the mean denoising loss.

        With `first_timestep` above 0, sample timesteps from there on and leave out the min-SNR weights. What a picture
        shows, and where, is decided while there is much noise.
        """
        timesteps = torch.randint(first_timestep, self.noise_schedule.config.num_train_timesteps, (len(latents_BCYX),))
        measure = self.unweighted_loss if first_timestep else self.weighted_loss
        noise = normal_like(latents_BCYX)
        return measure(latents_BCYX, condition_BQD, noise=noise, timesteps=timesteps.to(latents_BCYX.device)).mean()

    def weighted_loss(self, latents_BCYX: Tensor, condition_BQD: Tensor, *, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Compute the denoising loss with min-SNR weights, one value a picture: (B,)."""
        loss_B = self.unweighted_loss(latents_BCYX, condition_BQD, noise=noise, timesteps=timesteps)
        return loss_B * min_snr_weight(self.noise_schedule, timesteps)

    def unweighted_loss(
        self, latents_BCYX: Tensor, condition_BQD: Tensor, *, noise: Tensor, timesteps: Tensor
    ) -> Tensor:
        """Compute the loss as `weighted_loss` does, without weights."""
        return denoising_error(
            self.unet, self.noise_schedule, latents_BCYX, condition_BQD, noise=noise, timesteps=timesteps
        )

    def predict_x0(
        self,
        latents_BCYX: Tensor,
        condition_BQD: Tensor,
        *,
        noise: Tensor,
        timesteps: Tensor,
        sampler: str = "ddim",
    ) -> Tensor:
        """Add noise to the latents and return the UNet's estimate of the clean latents (x0): (B, C, Y, X). The UNet is
        the one that `sampler` draws with."""
        noisy_BCYX = self.noise_schedule.add_noise(latents_BCYX, noise, timesteps)
        predicted_BCYX = self.unet_for(sampler)(noisy_BCYX, timesteps, encoder_hidden_states=condition_BQD).sample
        return predict_x0(self.noise_schedule, noisy_BCYX, predicted_BCYX, timesteps)


def load_vae(folder: str | Path) -> AutoencoderKL:
    """The `vae/` of a folder in diffusers' layout, as float32."""
    return AutoencoderKL.from_pretrained(Path(folder) / "vae", **_LOADING)


def load_unet(folder: str | Path) -> UNet2DConditionModel:
    """The `unet/` of a folder in diffusers' layout, as float32."""
    return UNet2DConditionModel.from_pretrained(Path(folder) / "unet", **_LOADING)


def load_distilled(folder: str | Path) -> UNet2DConditionModel | None:
    """The `unet_distilled/` of a folder, as float32; None where it has none."""
    path = Path(folder) / DISTILLED_FOLDER
    if not path.is_dir():
        return None
    return UNet2DConditionModel.from_pretrained(path, **_LOADING)


def load_noise_schedule(folder: str | Path) -> DDIMScheduler:
    """Read the noise schedule in `scheduler/`, whichever sampler it was made for."""
    return DDIMScheduler.from_pretrained(Path(folder) / "scheduler")


def new_sampler(name: str, noise_schedule: DDIMScheduler, **options: object) -> SchedulerMixin:
    """Make a sampler, a key of SAMPLERS, over a noise schedule. It shares no state with the schedule."""
    return SAMPLERS[name].from_config(noise_schedule.config, **SAMPLER_OPTIONS.get(name, {}), **options)


def normalise(latents_BCYX: Tensor, vae: AutoencoderKL) -> Tensor:
    """To the UNet's scale: per channel where the VAE's config has statistics, else by its scaling factor."""
    mean, std = _statistics(vae, latents_BCYX)
    return (latents_BCYX - mean) / std


def denormalise(latents_BCYX: Tensor, vae: AutoencoderKL) -> Tensor:
    mean, std = _statistics(vae, latents_BCYX)
    return latents_BCYX * std + mean


def _statistics(vae: AutoencoderKL, like: Tensor) -> tuple[Tensor, Tensor]:
    if vae.config.latents_mean is None:
        zero = torch.zeros(1, dtype=like.dtype, device=like.device)
        return zero, zero + 1 / vae.config.scaling_factor
    mean, std = (
        torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def normal_like(values: Tensor) -> Tensor:
    """Noise from the CPU's generator: the same numbers on whichever device `values` lie."""
    return torch.randn(values.shape, dtype=values.dtype).to(values.device)


def denoising_error(
    unet: UNet2DConditionModel,
    noise_schedule: DDIMScheduler,
    latents_BCYX: Tensor,
    condition_BQD: Tensor,
    *,
    noise: Tensor,
    timesteps: Tensor,
) -> Tensor:
    """Compute the mean squared error of the prediction, of the noise or of the velocity: (B,)."""
    noisy_BCYX = noise_schedule.add_noise(latents_BCYX, noise, timesteps)
    predicted_BCYX = unet(noisy_BCYX, timesteps, encoder_hidden_states=condition_BQD).sample
    is_velocity = noise_schedule.config.prediction_type == "v_prediction"
    target_BCYX = noise_schedule.get_velocity(latents_BCYX, noise, timesteps) if is_velocity else noise
    return F.mse_loss(predicted_BCYX.float(), target_BCYX.float(), reduction="none").mean(dim=(1, 2, 3))


def predict_x0(sampler: SchedulerMixin, noisy_BCYX: Tensor, predicted_BCYX: Tensor, timesteps: Tensor) -> Tensor:
    """Convert a UNet prediction (noise or velocity) to clean latents. `timesteps`: a scalar or (B,)."""
    # Zero terminal SNR: epsilon would divide by 0. The shipped weights were trained with the clamp for velocity too.
    alpha_bar_B111 = sampler.alphas_cumprod.to(noisy_BCYX.device)[timesteps].clamp(min=1e-4).view(-1, 1, 1, 1)
    signal_B111, noise_B111 = alpha_bar_B111.sqrt(), (1 - alpha_bar_B111).sqrt()
    if sampler.config.prediction_type == "v_prediction":
        return signal_B111 * noisy_BCYX - noise_B111 * predicted_BCYX
    return (noisy_BCYX - noise_B111 * predicted_BCYX) / signal_B111


def min_snr_weight(noise_schedule: DDIMScheduler, timesteps: Tensor) -> Tensor:
    """Compute min(SNR, 5) / SNR for the noise, min(SNR, 5) / (SNR + 1) for the velocity: the shape of `timesteps`
    (arXiv 2303.09556, 3.4 and appendix). The second has the floor MIN_VELOCITY_WEIGHT."""
    alpha_bar_B = noise_schedule.alphas_cumprod.to(timesteps.device)[timesteps]
    snr_B = alpha_bar_B / (1 - alpha_bar_B)
    if noise_schedule.config.prediction_type == "v_prediction":
        return (snr_B.clamp(max=MIN_SNR_GAMMA) / (snr_B + 1)).clamp(min=MIN_VELOCITY_WEIGHT)
    return (MIN_SNR_GAMMA / snr_B).clamp(max=1)  # 1 where there is no signal


def new_storybook_vae() -> AutoencoderKL:
    """128 px -> 16 x 16 x 8, 2.6 M parameters."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def new_storybook_unet(condition_width: int) -> UNet2DConditionModel:
    """17.4 M parameters on 16 x 16 x 8 latents, cross-attention at all three levels."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(96, 160, 224),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=condition_width,
        attention_head_dim=4,  # diffusers reads it as the number of heads here
        norm_num_groups=16,
    )


def new_storybook_noise_schedule() -> DDIMScheduler:
    """v-prediction with zero terminal SNR (arXiv 2305.08891)."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
