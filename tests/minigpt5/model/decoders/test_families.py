"""Every family of latent diffusion models beside diffusers' own pipeline, at tiny random size, real classes.

A family's maker is a module of tests/helpers/pipelines with `make(folder, **variant)` and `VARIANTS`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.model.decoders.load import families, find_family, load_diffusion
from minigpt5.model.decoders.noise import RectifiedFlow
from minigpt5.model.mapper import Mapper
from minigpt5.parity.pictures import TOLERANCE, Pair
from minigpt5.types import DrawRequest, DrawSettings, Picture, Vokens
from tests.helpers import pipelines
from tests.helpers.tiny import tiny_config_of

ROOT = Path(__file__).parents[4]
MAKERS = {
    module.name: maker
    for module in pkgutil.iter_modules(pipelines.__path__)
    if hasattr(maker := importlib.import_module(f"{pipelines.__name__}.{module.name}"), "make")
}
FOLDERS = [(name, variant) for name, maker in MAKERS.items() for variant in maker.VARIANTS]


@pytest.fixture(scope="module", params=FOLDERS, ids=["-".join(one) for one in FOLDERS])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    name, variant = request.param
    folder = tmp_path_factory.mktemp("pipelines") / "model"
    MAKERS[name].make(folder, **MAKERS[name].VARIANTS[variant])
    pair = Pair(folder)
    pair.folder = folder  # type: ignore[attr-defined]
    yield pair


def test_every_family_has_a_maker() -> None:
    assert {family.__module__.rpartition(".")[2] for family in families().values()} == set(MAKERS)


def test_every_sampler_draws_as_the_pipeline_does(pair: Pair) -> None:
    found = {pair.compare(draw, seed=5).deviation: draw for draw in pair.cases(steps=4)}
    assert max(found) <= TOLERANCE, found


def test_another_condition_is_another_picture(pair: Pair) -> None:
    """What the comparison rests on: the deviation is one of pictures that depend on what is compared."""
    draw = pair.cases(steps=4)[-1]
    before = pair.condition_QD
    pair.condition_QD = before + 0.3 * torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    assert pair.compare(draw, seed=5).deviation > 10 * TOLERANCE
    pair.condition_QD = before


def test_pictures_at_different_steps_share_calls_and_do_not_change(pair: Pair) -> None:
    scheduler = next(iter(pair.ours.samplers))
    side = pair.ours.native_px
    settings = [
        DrawSettings(steps=steps, guidance_scale=scale, scheduler=scheduler, width=side, height=side)
        for steps, scale in ((3, 1.0), (5, 3.0), (4, 1.0))
    ]
    alone = [pair.draw([draw], seed=3)[0] for draw in settings]
    sizes: list[int] = []
    handle = pair.ours.denoiser.register_forward_pre_hook(
        lambda module, inputs, named: sizes.append(1), with_kwargs=True
    )
    together = pair.draw(settings, seed=3)
    handle.remove()
    assert len(sizes) == max(len(pair.ours.new_sampler(draw).timesteps) for draw in settings)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * float(one.abs().max()), rtol=0)


def test_the_training_loss_is_the_reference_formula(pair: Pair) -> None:
    ours = pair.ours
    shape = (2, *ours.latent_shape(DrawSettings()))
    latents, noise = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    condition = pair.condition_QD.expand(2, -1, -1)
    if isinstance(ours.noise, RectifiedFlow):
        schedule = FlowMatchEulerDiscreteScheduler(shift=ours.noise.shift)
        timesteps = schedule.timesteps[[250, 700]]
        noisy, target = schedule.scale_noise(latents, timesteps, noise), noise - latents
    else:
        ddpm = DDPMScheduler.from_config(ours.noise_schedule.config)
        timesteps = torch.tensor([250, 700])
        noisy = ddpm.add_noise(latents, noise, timesteps)
        is_velocity = ddpm.config.prediction_type == "v_prediction"
        target = ddpm.get_velocity(latents, noise, timesteps) if is_velocity else noise
    with torch.no_grad():
        found = ours.unweighted_loss(latents, condition, noise=noise, timesteps=timesteps)
        predicted = ours.predict(ours.denoiser, noisy, timesteps, condition, guidance_B=torch.ones(2))
    expected = F.mse_loss(predicted, target, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(found, expected)
    assert ours.training_loss(latents, condition).isfinite()


def test_the_vae_goes_there_and_back_as_its_pipeline_scales_it(pair: Pair) -> None:
    side = pair.ours.native_px
    with torch.no_grad():
        latents = pair.ours.to_latents(torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1)
        pixels = pair.ours.to_pixels(latents)
        preview = pair.ours.to_preview(latents)
        torch.testing.assert_close(pair.ours.normalise(pair.ours.denormalise(latents)), latents)
    assert latents.shape[1:] == pair.ours.latent_shape(DrawSettings())
    assert pixels.shape == (1, 3, side, side) and preview.shape[2:] == latents.shape[2:]
    draw = DrawSettings(steps=2, guidance_scale=1.0, scheduler=pair.ours.samplers[0], width=side, height=side)
    case = pair.compare(draw, seed=1)
    theirs = pair.pipeline(
        **pair.asked,
        num_inference_steps=2,
        guidance_scale=1.0,
        width=side,
        height=side,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images
    ours = (pair.ours.to_pixels(case.latents_1CYX) + 1) / 2
    torch.testing.assert_close(ours.detach(), theirs, atol=1e-3, rtol=0)


def test_without_a_denoiser_the_vae_encodes_the_same(pair: Pair) -> None:
    encoder = load_diffusion(pair.folder, has_denoiser=False).eval()  # type: ignore[attr-defined]
    assert {parameter.device.type for parameter in encoder.denoiser.parameters()} == {"meta"}
    side = pair.ours.native_px
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert torch.equal(encoder.to_moments(pixels), pair.ours.to_moments(pixels))


def test_the_vae_encodes_a_bounded_number_of_pixels_at_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    side = pair.ours.native_px
    pixels = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    counts: list[int] = []
    encode = pair.ours.encode
    with torch.no_grad():
        whole = pair.ours.to_moments(pixels)
        monkeypatch.setattr(pair.ours, "encode", lambda part: counts.append(len(part)) or encode(part))
        monkeypatch.setattr("minigpt5.model.decoders.diffusion.DECODED_PIXELS", 2 * side**2)
        parts = pair.ours.to_moments(pixels)
    assert counts == [2, 1]
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)


def test_the_mapper_feeds_it_and_a_cancelled_picture_leaves_the_others_alone(pair: Pair) -> None:
    folder: Path = pair.folder  # type: ignore[attr-defined]
    sizes = find_family(folder).read_sizes(folder)
    config = tiny_config_of(folder, mapper_width=16, mapper_heads=2)
    torch.manual_seed(0)
    mapper = Mapper(config)
    assert mapper.null_condition().shape == pair.null_1QD.shape, "the mapper writes what the text encoders write"
    decoder = DiffusionDecoder(config, mapper, pair.ours)
    draw = dataclasses.replace(sizes.draw, steps=6)

    def request(number: int) -> DrawRequest:
        states = np.random.default_rng(number).standard_normal((config.num_vokens, config.hidden), np.float32)
        return DrawRequest(
            vokens=Vokens(page=number, hidden_VH=states, fingerprint=config.fingerprint), seed=number, settings=draw
        )

    async def draw_two() -> list[Any]:
        async def cancelled() -> None:
            events = decoder.decode(request(1))
            await anext(events)
            await events.aclose()  # type: ignore[attr-defined]

        async def whole() -> Any:
            return [event async for event in decoder.decode(request(2))][-1]

        return list(await asyncio.gather(cancelled(), whole()))

    _, drawn = asyncio.run(draw_two())
    (alone,) = decoder.draw([request(2)])
    assert isinstance(drawn, Picture)
    difference = np.abs(_pixels(drawn).astype(int) - _pixels(alone).astype(int)).max()
    assert difference <= 1 and decoder.num_running == 0


def _pixels(picture: Picture) -> np.ndarray:
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(picture.png)))


def test_the_table_in_the_docs_is_this_one() -> None:
    text = (ROOT / "docs" / "own-models.md").read_text()
    section = text[text.index("## Families of diffusion models") :]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.split("\n") if line[:1] == "|"]
    names = {family.__module__.rpartition(".")[2]: family.__name__ for family in families().values()}
    expected = [[names[name], ", ".join(maker.VARIANTS), *["yes"] * 6] for name, maker in MAKERS.items()]
    assert rows[2 : 2 + len(expected)] == expected, expected
