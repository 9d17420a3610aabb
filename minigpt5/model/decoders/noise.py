"""Noise processes: how noise is added to latents, what a denoiser learns to predict, and the samplers that go back.

A folder's `scheduler/` holds the noise schedule. A sampler steps over it; requests name one in the field `scheduler`.

Shape letters: B pictures, C latent channels, Y X latent rows and columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SchedulerMixin,
)
from torch import Tensor

from minigpt5.model.decoders.multistep_scheduler import MultistepScheduler
from minigpt5.types import DISTILLED, SDE_DPM_SOLVER

MIN_VELOCITY_WEIGHT = 0.4
"""Lower bound of the min-SNR weight for v-prediction. Without it the steps of least signal, which decide the layout,
are hardly trained."""
UNCLIPPED = {"clip_sample": False}
"""Latents are not bounded as pixels are; a folder of another sampler does not say so."""
DISTILLED_LEVELS = {**UNCLIPPED, "timestep_spacing": "trailing", "set_alpha_to_one": True}
"""A distilled denoiser begins at the last timestep and ends at clean latents, whatever the folder's sampler does. In
two steps that of Stable Diffusion 1.x would begin half-way, and end in a little noise."""
MIN_SNR_GAMMA = 5.0  # arXiv 2303.09556


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A scheduler of diffusers, and what its config does not say."""

    scheduler: type[Any]
    options: dict[str, Any] = field(default_factory=dict)
    """What it needs and the folder's schedule does not carry."""
    adds_noise: bool = False
    """Its steps need a generator."""
    grows: bool = False
    """Its samples are clean latents plus noise times sigma (arXiv 2206.00364), without the factor that keeps their
    variance."""


class NoiseProcess(ABC):
    """One way from latents to noise, with its schedule."""

    samplers: dict[str, Sampler]

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule

    def new_sampler(self, name: str, **options: object) -> Any:
        """Make a sampler, a key of `samplers`, over the schedule. It shares no state with the schedule."""
        sampler = self.samplers[name]
        return sampler.scheduler.from_config(self.schedule.config, **self.options(sampler), **options)

    def options(self, sampler: Sampler) -> dict[str, Any]:
        """What the sampler needs beside the schedule's config."""
        return sampler.options

    @abstractmethod
    def sample_timesteps(self, num: int, *, first: int = 0) -> Tensor:
        """Times to train at, of 1000, none before `first`: (num,)."""

    @abstractmethod
    def add_noise(self, latents_BCYX: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents with the noise of their times."""

    @abstractmethod
    def target(self, latents_BCYX: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser shall predict."""

    @abstractmethod
    def loss_weight(self, timesteps: Tensor) -> Tensor:
        """The weight of the loss at each time."""

    @abstractmethod
    def predict_x0(self, noisy_BCYX: Tensor, predicted_BCYX: Tensor, timesteps: Tensor) -> Tensor:
        """Convert a prediction at times of `add_noise` to clean latents. `timesteps`: a scalar or (B,)."""

    @abstractmethod
    def clean_sample(self, name: str, sampler: Any, sample_BCYX: Tensor, predicted_BCYX: Tensor, call: int) -> Tensor:
        """Convert a prediction at a sampler's call, counted from 0, to clean latents."""


class VariancePreserving(NoiseProcess):
    """Noise that replaces signal (arXiv 2006.11239); the denoiser predicts the noise, or the velocity (2202.00512)."""

    samplers = {
        "ddim": Sampler(scheduler=DDIMScheduler, options=UNCLIPPED),
        "pndm": Sampler(scheduler=PNDMScheduler, options={"skip_prk_steps": True}),  # as Stable Diffusion's folder says
        "dpm-solver++": Sampler(scheduler=DPMSolverMultistepScheduler, options={"algorithm_type": "dpmsolver++"}),
        SDE_DPM_SOLVER: Sampler(
            scheduler=DPMSolverMultistepScheduler, options={"algorithm_type": "sde-dpmsolver++"}, adds_noise=True
        ),
        "euler": Sampler(scheduler=EulerDiscreteScheduler, grows=True),
        "euler-ancestral": Sampler(scheduler=EulerAncestralDiscreteScheduler, adds_noise=True, grows=True),
        "lcm": Sampler(scheduler=LCMScheduler, options=UNCLIPPED, adds_noise=True),
        DISTILLED: Sampler(scheduler=MultistepScheduler, options=DISTILLED_LEVELS, adds_noise=True),
    }

    schedule: DDIMScheduler

    @property
    def is_velocity(self) -> bool:
        return bool(self.schedule.config.prediction_type == "v_prediction")

    def sample_timesteps(self, num: int, *, first: int = 0) -> Tensor:
        return torch.randint(first, self.schedule.config.num_train_timesteps, (num,))

    def add_noise(self, latents_BCYX: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.schedule.add_noise(latents_BCYX, noise, timesteps)

    def target(self, latents_BCYX: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.schedule.get_velocity(latents_BCYX, noise, timesteps) if self.is_velocity else noise

    def loss_weight(self, timesteps: Tensor) -> Tensor:
        return min_snr_weight(self.schedule, timesteps)

    def predict_x0(self, noisy_BCYX: Tensor, predicted_BCYX: Tensor, timesteps: Tensor) -> Tensor:
        return predict_x0(self.schedule, noisy_BCYX, predicted_BCYX, timesteps)

    def clean_sample(self, name: str, sampler: Any, sample_BCYX: Tensor, predicted_BCYX: Tensor, call: int) -> Tensor:
        if not self.samplers[name].grows:
            return predict_x0(sampler, sample_BCYX, predicted_BCYX, sampler.timesteps[call])
        sigma = sampler.sigmas[call].to(sample_BCYX)
        if self.is_velocity:  # of samples of unit variance
            return (sample_BCYX / (sigma**2 + 1).sqrt() - sigma * predicted_BCYX) / (sigma**2 + 1).sqrt()
        return sample_BCYX - sigma * predicted_BCYX


class RectifiedFlow(NoiseProcess):
    """Straight lines from latents to noise; the denoiser predicts their direction (arXiv 2209.03003, 2403.03206).

    A timestep is 1000 times the share of noise.
    """

    samplers = {
        "euler": Sampler(scheduler=FlowMatchEulerDiscreteScheduler),
        "dpm-solver++": Sampler(
            scheduler=DPMSolverMultistepScheduler,
            options={
                "algorithm_type": "dpmsolver++",
                "use_flow_sigmas": True,
                "prediction_type": "flow_prediction",
            },
        ),
    }

    @property
    def shift(self) -> float:
        """How far the schedule moves its times towards noise, as its own scheduler and DPM-Solver++ name it."""
        config = self.schedule.config
        return float(config.get("shift") or config.get("flow_shift") or 1.0)

    @property
    def is_shifted_by_size(self) -> bool:
        return bool(self.schedule.config.get("use_dynamic_shifting"))

    def options(self, sampler: Sampler) -> dict[str, Any]:
        named = "flow_shift" if sampler.scheduler is DPMSolverMultistepScheduler else "shift"
        return {**sampler.options, named: self.shift}

    def shift_for(self, num_patches: int) -> dict[str, float]:
        """What `set_timesteps` needs for a picture of so many patches: the logarithm of its shift, linear in their
        number, where the schedule is shifted by size."""
        if not self.is_shifted_by_size:
            return {}
        config = self.schedule.config
        share = (num_patches - config.base_image_seq_len) / (config.max_image_seq_len - config.base_image_seq_len)
        return {"mu": config.base_shift + share * (config.max_shift - config.base_shift)}

    def sample_timesteps(self, num: int, *, first: int = 0) -> Tensor:
        """Logit-normal, then shifted, as arXiv 2403.03206 trains (3.1, 5.3.2)."""
        share_B = torch.randn(num).sigmoid()
        if not self.is_shifted_by_size:
            share_B = self.shift * share_B / (1 + (self.shift - 1) * share_B)
        return first + (1000 - first) * share_B

    def add_noise(self, latents_BCYX: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        share_B111 = self._share(latents_BCYX, timesteps)
        return (1 - share_B111) * latents_BCYX + share_B111 * noise

    def target(self, latents_BCYX: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - latents_BCYX

    def loss_weight(self, timesteps: Tensor) -> Tensor:
        return torch.ones_like(timesteps)

    def predict_x0(self, noisy_BCYX: Tensor, predicted_BCYX: Tensor, timesteps: Tensor) -> Tensor:
        return noisy_BCYX - self._share(noisy_BCYX, timesteps) * predicted_BCYX

    def clean_sample(self, name: str, sampler: Any, sample_BCYX: Tensor, predicted_BCYX: Tensor, call: int) -> Tensor:
        return sample_BCYX - sampler.sigmas[call].to(sample_BCYX) * predicted_BCYX

    @staticmethod
    def _share(like_BCYX: Tensor, timesteps: Tensor) -> Tensor:
        return (timesteps.to(like_BCYX) / 1000).view(-1, 1, 1, 1)


SAMPLERS = tuple(dict.fromkeys([*VariancePreserving.samplers, *RectifiedFlow.samplers]))
"""Names of all samplers; each model has some of them."""


def predict_x0(sampler: SchedulerMixin, noisy_BCYX: Tensor, predicted_BCYX: Tensor, timesteps: Tensor) -> Tensor:
    """Convert a prediction (noise or velocity) to clean latents. `timesteps`: a scalar or (B,)."""
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
