"""The sampler of a distilled UNet: two long steps, and the second again from new noise.

The first step decides what stands where, the second paints it. Painted over noise of its own again and again, a picture
loses what went wrong before (restart sampling, arXiv 2306.14878; multistep sampling of consistency models, 2303.01469).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

NUM_LEVELS = 2
"""Timesteps that a distilled UNet has learnt to draw at, evenly spaced down from the last one; see stage "distill"."""


def last_level(noise_schedule: DDIMScheduler) -> int:
    """Return the timestep from which a distilled UNet goes to clean latents."""
    return noise_schedule.config.num_train_timesteps // NUM_LEVELS - 1


class MultistepScheduler(DDIMScheduler):
    """DDIM in NUM_LEVELS steps; steps beyond them each begin at the last level again. It serves one picture, or several
    that go together."""

    timesteps: Tensor

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        super().set_timesteps(min(num_inference_steps, NUM_LEVELS), device)
        restarts = self.timesteps[-1:].repeat(max(0, num_inference_steps - NUM_LEVELS))
        self.timesteps = torch.cat([self.timesteps, restarts])
        self._num_restarts = len(restarts)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> DDIMSchedulerOutput | tuple[Tensor, ...]:
        """Step as DDIM does, but add noise to the clean result again while there are restarts left."""
        output = super().step(model_output, timestep, sample, **options)
        if timestep == self.timesteps[-1] and self._num_restarts:
            self._num_restarts -= 1
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            output.prev_sample = self.add_noise(output.prev_sample, noise, self.timesteps[-1:].to(sample.device))
        return output if return_dict else (output.prev_sample, output.pred_original_sample)
