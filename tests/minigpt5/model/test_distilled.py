"""A model with a distilled UNet: what a request gets, and that each picture is drawn by its own UNet."""

from __future__ import annotations

import copy
import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minigpt5.config import ModelConfig, storybook
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.denoising import Denoising, advance
from minigpt5.errors import InvalidRequest, ModelFolderError
from minigpt5.model.batch_invariance import make_batch_invariant
from minigpt5.model.decoders.multistep_scheduler import NUM_LEVELS
from minigpt5.model.decoders.stable_diffusion import StableDiffusion
from minigpt5.model.folder import DISTILLED_DRAW, LANGUAGE, save_diffusion, save_distilled
from minigpt5.types import DISTILLED, DrawRequest, DrawSettings, Picture, Vokens
from tests.helpers.tiny import save_tiny, tiny_config, tiny_diffusion, tiny_mapper

GUIDED = DrawSettings(steps=20, guidance_scale=3.0, scheduler="ddim")
MODEL = dataclasses.replace(storybook(), draw=GUIDED, draw_distilled=DISTILLED_DRAW, prefers_distilled=True)
BASE = dataclasses.replace(storybook(), draw=GUIDED)
FLOW = dataclasses.replace(
    storybook(), draw=DrawSettings(steps=28, guidance_scale=3.5, scheduler="euler"), schedulers=("euler",)
)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({}, DISTILLED_DRAW),
        ({"steps": 2}, dataclasses.replace(DISTILLED_DRAW, steps=2)),
        ({"guidance_scale": 1.0}, DISTILLED_DRAW),
        ({"steps": 8}, dataclasses.replace(DISTILLED_DRAW, steps=8)),
        ({"steps": 9}, dataclasses.replace(GUIDED, steps=9)),
        ({"steps": 50}, dataclasses.replace(GUIDED, steps=50)),
        ({"guidance_scale": 5.0}, dataclasses.replace(GUIDED, guidance_scale=5.0)),
        ({"scheduler": "pndm"}, dataclasses.replace(GUIDED, scheduler="pndm")),
        ({"steps": 4, "guidance_scale": 2.0}, dataclasses.replace(GUIDED, steps=4, guidance_scale=2.0)),
    ],
)
def test_a_request_that_needs_the_undistilled_unet_gets_it(sent: dict[str, Any], expected: DrawSettings) -> None:
    assert MODEL.draw_settings(sent) == expected
    from_guided = MODEL.draw_settings(sent, like=GUIDED)
    assert from_guided == dataclasses.replace(GUIDED, **sent), "what is shown is drawn again as it was"


def test_a_distilled_unet_that_is_not_preferred_is_asked_for_by_name() -> None:
    config = dataclasses.replace(MODEL, prefers_distilled=False)
    assert config.draw_settings({"steps": 2}) == dataclasses.replace(GUIDED, steps=2)
    assert config.draw_settings({"scheduler": DISTILLED}) == DISTILLED_DRAW


def test_a_guided_picture_can_be_drawn_again_by_the_distilled_unet() -> None:
    assert MODEL.draw_settings({"scheduler": DISTILLED}, like=GUIDED) == DISTILLED_DRAW


@pytest.mark.parametrize(
    ("config", "sent", "field", "message"),
    [
        (MODEL, {"scheduler": DISTILLED, "guidance_scale": 5.0}, "guidance_scale", "guidance_scale is 5 but must be 1"),
        (MODEL, {"scheduler": DISTILLED, "steps": 9}, "steps", "steps is 9 but must be at most 8"),
        (BASE, {"scheduler": DISTILLED}, "scheduler", "no distilled UNet: use one of ddim, pndm,"),
        (FLOW, {"scheduler": DISTILLED}, "scheduler", "no distilled UNet: use one of euler$"),
    ],
)
def test_what_no_unet_does_is_refused(config: ModelConfig, sent: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as failure:
        config.draw_settings(sent)
    assert failure.value.field == field


def test_a_story_goes_on_with_a_model_that_has_no_distilled_unet() -> None:
    assert BASE.drawable(DISTILLED_DRAW) == GUIDED
    assert BASE.draw_settings({"steps": 3}, like=DISTILLED_DRAW) == dataclasses.replace(GUIDED, steps=3)
    assert MODEL.drawable(DISTILLED_DRAW) == DISTILLED_DRAW


def test_a_story_goes_on_with_a_model_that_lacks_its_sampler() -> None:
    begun = dataclasses.replace(GUIDED, width=64, height=96)
    assert FLOW.drawable(begun) == dataclasses.replace(FLOW.draw, width=64, height=96)
    assert FLOW.draw_settings({"steps": 3}, like=begun) == dataclasses.replace(FLOW.draw, steps=3, width=64, height=96)
    assert FLOW.drawable(FLOW.draw) == FLOW.draw
    assert BASE.drawable(dataclasses.replace(GUIDED, style="gone")) == GUIDED
    assert BASE.drawable(FLOW.draw) == GUIDED, "as it does from a flow model to one with ddim"
    with pytest.raises(InvalidRequest, match="scheduler is 'ddim' but must be one of euler$"):
        FLOW.draw_settings({"scheduler": "ddim"}, like=begun)


def test_a_model_without_a_distilled_unet_is_as_it_was() -> None:
    assert BASE.default_draw == GUIDED
    assert BASE.draw_settings({"steps": 2}) == dataclasses.replace(GUIDED, steps=2)


def new_decoder(diffusion: StableDiffusion) -> DiffusionDecoder:
    make_batch_invariant(diffusion)
    config = tiny_config()
    return DiffusionDecoder(config, tiny_mapper(config), diffusion)


def request(page: int, settings: DrawSettings) -> DrawRequest:
    hidden_VH = np.random.default_rng(page).normal(size=(8, 48)).astype(np.float32)
    return DrawRequest(
        vokens=Vokens(page=page, hidden_VH=hidden_VH, fingerprint="f" * 64), seed=page, settings=settings
    )


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.png))).astype(int)


def test_each_picture_of_a_batch_is_drawn_by_its_own_unet() -> None:
    both = new_decoder(tiny_diffusion(tiny_config(), is_distilled=True))
    guided = DrawSettings(steps=4, guidance_scale=2.0)
    distilled = dataclasses.replace(DISTILLED_DRAW, steps=NUM_LEVELS)  # without restarts it is DDIM
    asked = [request(1, distilled), request(2, guided), request(3, distilled), request(4, guided)]
    drawn = [pixels(picture) for picture in both.draw(asked)]
    swapped = tiny_diffusion(tiny_config(), is_distilled=True)
    swapped.denoiser, swapped.distilled = swapped.distilled, None
    alone = new_decoder(swapped)
    for index in (0, 2):
        by_itself = alone.draw([request(index + 1, dataclasses.replace(distilled, scheduler="ddim"))])[0]
        assert np.abs(drawn[index] - pixels(by_itself)).max() <= 1
    base = new_decoder(tiny_diffusion(tiny_config()))
    for index in (1, 3):
        assert np.abs(drawn[index] - pixels(base.draw([asked[index]])[0])).max() <= 1
    with pytest.raises(InvalidRequest, match="no distilled UNet"):
        base.validate_request(asked[0])
    with pytest.raises(ModelFolderError, match="no distilled UNet"):
        base.draw(asked[:1])
    with pytest.raises(InvalidRequest, match="steps is 9"):
        both.validate_request(request(1, dataclasses.replace(DISTILLED_DRAW, steps=9)))


def test_both_unets_are_stored(tmp_path: Path) -> None:
    diffusion = tiny_diffusion(tiny_config(), is_distilled=True)
    save_diffusion(copy.deepcopy(diffusion), tmp_path)
    again = StableDiffusion.from_pretrained(tmp_path)
    assert again.distilled is not None and diffusion.distilled is not None
    for stored, was in ((again.denoiser, diffusion.denoiser), (again.distilled, diffusion.distilled)):
        for name, value in was.state_dict().items():
            assert torch.equal(stored.state_dict()[name], value.half().float()), name


def test_steps_beyond_the_levels_begin_at_the_last_one_again() -> None:
    diffusion = tiny_diffusion(tiny_config(), is_distilled=True)
    condition_QD = torch.randn(tiny_config().condition_length, tiny_config().condition_width)

    def latents(steps: int, seed: int) -> list[torch.Tensor]:
        """After each call."""
        draw = dataclasses.replace(DISTILLED_DRAW, steps=steps)
        picture, found = Denoising(diffusion, condition_QD, seed=seed, draw=draw, guidance_rescale=0.0), []
        while picture.num_calls_left:
            advance(diffusion, [picture], condition_QD[None])
            found.append(picture.latents_1CYX)
        return found

    short, long = latents(2, 1), latents(4, 1)
    assert len(long) == 4
    assert torch.equal(short[0], long[0]), "what stands where is decided once"
    noise_schedule = diffusion.noise_schedule
    signal = noise_schedule.alphas_cumprod[499].sqrt()
    noise = (long[1] - signal * short[1]) / (1 - signal**2).sqrt()
    assert abs(noise.mean().item()) < 0.3 and abs(noise.std().item() - 1) < 0.2, "clean latents under new noise"
    assert torch.equal(long[3], latents(4, 1)[3]), "a picture is its seed's"
    assert not torch.allclose(long[3], latents(3, 1)[2])


def test_a_language_model_that_was_trained_whole_stays_with_the_folder(tmp_path: Path) -> None:
    config = save_tiny(tmp_path / "start")
    (tmp_path / "start" / LANGUAGE).mkdir()
    (tmp_path / "start" / LANGUAGE / "model.safetensors").write_bytes(b"weights")
    config = dataclasses.replace(config, language_model=LANGUAGE)
    distilled = tiny_diffusion(config, is_distilled=True).distilled
    assert distilled is not None
    save_distilled(tmp_path / "out", config, start=tmp_path / "start", distilled=distilled)
    assert (tmp_path / "out" / LANGUAGE / "model.safetensors").read_bytes() == b"weights"
