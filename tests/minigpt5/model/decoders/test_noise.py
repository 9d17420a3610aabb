"""Denoising loss and schedules: noise and velocity prediction, zero terminal SNR, Stable Diffusion's own folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.denoising import denoise
from minigpt5.errors import InvalidRequest
from minigpt5.model.decoders.noise import MIN_VELOCITY_WEIGHT, VariancePreserving, min_snr_weight
from minigpt5.model.decoders.stable_diffusion import StableDiffusion
from minigpt5.types import DISTILLED, SDE_DPM_SOLVER, DrawRequest, DrawSettings, Vokens
from tests.helpers.tiny import tiny_config, tiny_diffusion, tiny_mapper
from training.storybook.new_decoder import new_storybook_noise_schedule

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def test_weights_of_noise_prediction_are_the_published_ones() -> None:
    """SNR is above 5 only before step 147, and the weight at step 0 is 0.0043."""
    weight = min_snr_weight(DDIMScheduler(**BETAS), torch.arange(1000))
    assert (weight[147:] == 1).all() and (weight[:147] < 1).all()
    assert weight[0].item() == pytest.approx(0.0043, abs=5e-5)


def test_weights_of_velocity_prediction_have_a_floor() -> None:
    noise_schedule = new_storybook_noise_schedule()
    snr = noise_schedule.alphas_cumprod / (1 - noise_schedule.alphas_cumprod)
    weight = min_snr_weight(noise_schedule, torch.arange(1000))
    assert snr[-1] == 0 and weight[-1].item() == pytest.approx(MIN_VELOCITY_WEIGHT)
    torch.testing.assert_close(weight, (snr.clamp(max=5) / (snr + 1)).clamp(min=MIN_VELOCITY_WEIGHT))


def test_a_first_timestep_bounds_the_noise_and_drops_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    diffusion, seen = tiny_diffusion(config), dict[str, list[int]]()
    for name in ("weighted_loss", "unweighted_loss"):

        def note(latents: torch.Tensor, *_: object, timesteps: torch.Tensor, name: str = name, **__: object) -> object:
            seen.setdefault(name, []).extend(timesteps.tolist())
            return torch.ones(len(latents))

        monkeypatch.setattr(diffusion, name, note)
    many = torch.zeros(500, 1)
    diffusion.training_loss(many, many)
    diffusion.training_loss(many, many, first_timestep=600)
    assert min(seen["weighted_loss"]) < 50 and max(seen["weighted_loss"]) > 950
    assert 600 <= min(seen["unweighted_loss"]) < 650 and max(seen["unweighted_loss"]) > 950


def test_no_signal_is_no_nan_for_either_prediction() -> None:
    timesteps = torch.arange(1000)
    for prediction in ("epsilon", "v_prediction"):
        noise_schedule = DDIMScheduler(**BETAS, prediction_type=prediction, rescale_betas_zero_snr=True)
        weight = min_snr_weight(noise_schedule, timesteps)
        assert weight.isfinite().all() and (weight > 0).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", sorted(VariancePreserving.samplers.keys() - {DISTILLED}))
def test_a_stable_diffusion_folder_is_read_and_drawn(tmp_path: Path, prediction: str, sampler: str) -> None:
    config = tiny_config()
    tiny = tiny_diffusion(config)
    tiny.vae.save_pretrained(tmp_path / "vae")
    tiny.denoiser.save_pretrained(tmp_path / "unet")
    PNDMScheduler(**BETAS, prediction_type=prediction, skip_prk_steps=True, steps_offset=1).save_pretrained(
        tmp_path / "scheduler"
    )
    diffusion = StableDiffusion.from_pretrained(tmp_path).eval()
    assert diffusion.noise_schedule.config.prediction_type == prediction
    condition_BQD = torch.randn(2, config.condition_length, config.condition_width)
    draw = DrawSettings(steps=3, guidance_scale=2.0, scheduler=sampler)
    pixels_BCYX = denoise(diffusion, condition_BQD, condition_BQD[:1] * 0, seeds=[1, 2], draw=draw)
    assert pixels_BCYX.shape == (2, 3, 32, 32) and pixels_BCYX.isfinite().all()
    latents_BCYX = diffusion.to_latents(pixels_BCYX)
    loss_B = diffusion.weighted_loss(
        latents_BCYX, condition_BQD, noise=torch.randn_like(latents_BCYX), timesteps=torch.tensor([0, 999])
    )
    assert loss_B.shape == (2,) and loss_B.isfinite().all()


def test_the_stochastic_sampler_adds_the_noise_of_its_seed() -> None:
    config = tiny_config()
    diffusion = tiny_diffusion(config).eval()
    condition_BQD = torch.randn(2, config.condition_length, config.condition_width)

    def drawn(scheduler: str, seeds: list[int]) -> torch.Tensor:
        draw = DrawSettings(steps=4, guidance_scale=2.0, scheduler=scheduler)
        return denoise(diffusion, condition_BQD, condition_BQD[:1] * 0, seeds=seeds, draw=draw)

    first = drawn(SDE_DPM_SOLVER, [1, 2])
    torch.testing.assert_close(first, drawn(SDE_DPM_SOLVER, [1, 2]))
    assert not torch.allclose(first[0], drawn(SDE_DPM_SOLVER, [3, 2])[0], atol=1e-3)
    assert not torch.allclose(first, drawn("dpm-solver++", [1, 2]), atol=1e-3)


def test_a_sampler_that_cannot_do_so_many_steps_is_refused_before_it_joins_others() -> None:
    config = tiny_config()
    config = dataclasses.replace(config, schedulers=(*config.schedulers, "lcm"))
    decoder = DiffusionDecoder(config, tiny_mapper(config), tiny_diffusion(config))
    states = np.zeros((config.num_vokens, config.hidden), np.float32)
    vokens = Vokens(page=1, hidden_VH=states, fingerprint=config.fingerprint)
    settings = DrawSettings(steps=60, guidance_scale=1.0, scheduler="lcm")
    with pytest.raises(InvalidRequest, match="steps is 60 but must be a whole number from 1 to 50 with lcm"):
        decoder.validate_request(DrawRequest(vokens=vokens, seed=1, settings=settings))
    decoder.validate_request(DrawRequest(vokens=vokens, seed=1, settings=dataclasses.replace(settings, steps=4)))


def test_latents_are_not_cut_off_where_a_folder_names_a_sampler_that_says_nothing_of_it(tmp_path: Path) -> None:
    EulerDiscreteScheduler(**BETAS).save_pretrained(tmp_path / "scheduler")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    noise = StableDiffusion.load_noise(tmp_path)
    assert not noise.new_sampler("ddim").config.clip_sample
    noise.schedule.save_pretrained(tmp_path / "scheduler")  # which writes DDIM's own default
    assert not StableDiffusion.load_noise(tmp_path).new_sampler("lcm").config.clip_sample
