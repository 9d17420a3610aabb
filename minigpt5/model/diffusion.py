"""The latent diffusion model in diffusers' own layout: VAE, UNet, scheduler; denoising loss, picture <-> latents.

Shape letters: B pictures, C latent channels, Y X latent rows and columns, Q condition positions, D condition width.
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

SCHEDULERS = {
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
"""What a noise schedule that was made for another sampler does not say."""
_LOADING = {"torch_dtype": torch.float32, "use_safetensors": True, "low_cpu_mem_usage": False}
MIN_VELOCITY_WEIGHT = 0.4
"""The layout is decided while there is next to no signal: the model must learn those steps too."""
MIN_SNR_GAMMA = 5.0  # arXiv 2303.09556


class Diffusion(nn.Module):
    """VAE, UNet and noise schedule of one latent diffusion model, frozen unless a stage says otherwise; and, where
    there is one, the UNet that was distilled from it."""

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        distilled: UNet2DConditionModel | None = None,
    ) -> None:
        super().__init__()
        self.vae, self.unet, self.scheduler, self.distilled = vae, unet, scheduler, distilled

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Diffusion:
        """Read `vae/`, `unet/`, `scheduler/` and, where it is there, `unet_distilled/` under `folder` as float32."""
        return cls(load_vae(folder), load_unet(folder), load_scheduler(folder), load_distilled(folder))

    def unet_for(self, scheduler: str) -> UNet2DConditionModel:
        """The UNet that a key of SCHEDULERS draws with. Raises ModelFolderError."""
        if scheduler != DISTILLED:
            return self.unet
        if self.distilled is None:
            raise ModelFolderError(
                f"there is no distilled UNet in this model: draw with another scheduler than {scheduler}"
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

    def random_loss(self, latents_BCYX: Tensor, condition_BQD: Tensor, *, first_timestep: int = 0) -> Tensor:
        """Their mean loss under random noise at random timesteps: with min-SNR weights, or where `first_timestep` is
        given from there on, without weights. What a picture shows, and where, is decided while there is much noise."""
        timesteps = torch.randint(first_timestep, self.scheduler.config.num_train_timesteps, (len(latents_BCYX),))
        measure = self.error if first_timestep else self.loss
        noise = normal_like(latents_BCYX)
        return measure(latents_BCYX, condition_BQD, noise=noise, timesteps=timesteps.to(latents_BCYX.device)).mean()

    def loss(self, latents_BCYX: Tensor, condition_BQD: Tensor, *, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Denoising loss with min-SNR weights, one value a picture: (B,)."""
        return self.error(latents_BCYX, condition_BQD, noise=noise, timesteps=timesteps) * min_snr_weight(
            self.scheduler, timesteps
        )

    def error(self, latents_BCYX: Tensor, condition_BQD: Tensor, *, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Compute the loss as `loss` does, without weights."""
        return denoising_error(self.unet, self.scheduler, latents_BCYX, condition_BQD, noise=noise, timesteps=timesteps)

    def predict_x0(
        self,
        latents_BCYX: Tensor,
        condition_BQD: Tensor,
        *,
        noise: Tensor,
        timesteps: Tensor,
        scheduler: str = "ddim",
    ) -> Tensor:
        """What the UNet of `scheduler` takes noised latents for, in one step."""
        noisy_BCYX = self.scheduler.add_noise(latents_BCYX, noise, timesteps)
        predicted_BCYX = self.unet_for(scheduler)(noisy_BCYX, timesteps, encoder_hidden_states=condition_BQD).sample
        return predict_x0(self.scheduler, noisy_BCYX, predicted_BCYX, timesteps)


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


def load_scheduler(folder: str | Path) -> DDIMScheduler:
    """The folder's noise schedule, whichever sampler it was made for."""
    return DDIMScheduler.from_pretrained(Path(folder) / "scheduler")


def new_sampler(name: str, schedule: DDIMScheduler, **options: object) -> SchedulerMixin:
    """The sampler `name`, a key of SCHEDULERS, over a noise schedule."""
    return SCHEDULERS[name].from_config(schedule.config, **SAMPLER_OPTIONS.get(name, {}), **options)


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
    scheduler: DDIMScheduler,
    latents_BCYX: Tensor,
    condition_BQD: Tensor,
    *,
    noise: Tensor,
    timesteps: Tensor,
) -> Tensor:
    """Mean squared error of the prediction, of the noise or of the velocity: (B,)."""
    noisy_BCYX = scheduler.add_noise(latents_BCYX, noise, timesteps)
    predicted_BCYX = unet(noisy_BCYX, timesteps, encoder_hidden_states=condition_BQD).sample
    is_velocity = scheduler.config.prediction_type == "v_prediction"
    target_BCYX = scheduler.get_velocity(latents_BCYX, noise, timesteps) if is_velocity else noise
    return F.mse_loss(predicted_BCYX.float(), target_BCYX.float(), reduction="none").mean(dim=(1, 2, 3))


def predict_x0(scheduler: SchedulerMixin, noisy_BCYX: Tensor, predicted_BCYX: Tensor, timesteps: Tensor) -> Tensor:
    """What a prediction at `timesteps`, one or (B,), makes of noisy latents."""
    alpha_bar_B111 = scheduler.alphas_cumprod.to(noisy_BCYX.device)[timesteps].clamp(min=1e-4).view(-1, 1, 1, 1)
    signal_B111, noise_B111 = alpha_bar_B111.sqrt(), (1 - alpha_bar_B111).sqrt()
    if scheduler.config.prediction_type == "v_prediction":
        return signal_B111 * noisy_BCYX - noise_B111 * predicted_BCYX
    return (noisy_BCYX - noise_B111 * predicted_BCYX) / signal_B111


def min_snr_weight(scheduler: DDIMScheduler, timesteps: Tensor) -> Tensor:
    """min(SNR, 5) / SNR for the noise, min(SNR, 5) / (SNR + 1) for the velocity (arXiv 2303.09556, 3.4 and appendix).

    The second has a floor: it is 0 where the schedule ends without signal, and the first step of drawing would never
    be learnt.
    """
    alpha_bar_B = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr_B = alpha_bar_B / (1 - alpha_bar_B)
    if scheduler.config.prediction_type == "v_prediction":
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


def new_storybook_scheduler() -> DDIMScheduler:
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
