"""Width and height of pictures: drawn by the model where it can, else resampled from its own size, in every batch."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from deployments.schemas import Scheduler
from minigpt5.__main__ import main
from minigpt5.codec import to_json
from minigpt5.config import ModelConfig, storybook
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.errors import InvalidRequest
from minigpt5.model.decoders.noise import SAMPLERS
from minigpt5.pipeline import MiniGPT5
from minigpt5.types import DISTILLED, DrawRequest, DrawSettings, Picture, Vokens
from tests.helpers.tiny import tiny_config, tiny_diffusion, tiny_mapper
from tests.minigpt5.engine.test_generator import new_generator

FAST = DrawSettings(steps=3, guidance_scale=2.0)
OWN, WIDE, TALL = (32, 32), (48, 32), (32, 64)
TOO_LARGE, UNEVEN = (96, 64), (50, 40)


def sized(size: tuple[int, int], draw: DrawSettings = FAST) -> DrawSettings:
    return dataclasses.replace(draw, width=size[0], height=size[1])


def request(draw: DrawSettings, *, page: int = 1) -> DrawRequest:
    hidden_VH = np.random.default_rng(page).normal(size=(8, 48)).astype(np.float32)
    return DrawRequest(vokens=Vokens(page=page, hidden_VH=hidden_VH, fingerprint="f" * 64), seed=page, settings=draw)


def new_decoder(config: ModelConfig | None = None, *, max_batch: int = 8) -> DiffusionDecoder:
    config = config or tiny_config()
    return DiffusionDecoder(config, tiny_mapper(config), tiny_diffusion(config), max_batch=max_batch)


def draw_at_once(decoder: DiffusionDecoder, requests: Sequence[DrawRequest]) -> list[Picture]:
    async def last(one: DrawRequest) -> Picture:
        events = [event async for event in decoder.decode(one)]
        assert isinstance(events[-1], Picture)
        return events[-1]

    async def together() -> list[Picture]:
        return await asyncio.gather(*map(last, requests))

    return asyncio.run(together())


def pixels(picture: Picture) -> np.ndarray:
    image = Image.open(io.BytesIO(picture.png))
    assert image.size == (picture.width, picture.height)
    return np.asarray(image).astype(int)


def test_what_the_model_draws_and_what_is_resampled() -> None:
    config = tiny_config()
    for size, native in {
        (0, 0): (0, 0),
        OWN: (0, 0),
        (48, 0): (48, 32),
        WIDE: WIDE,
        TALL: TALL,
        (64, 48): (64, 48),
        TOO_LARGE: (0, 0),
        UNEVEN: (0, 0),
    }.items():
        drawn = config.native(sized(size))
        assert (drawn.width, drawn.height) == native, size
        assert config.is_resampled(sized(size)) == (size in (TOO_LARGE, UNEVEN)), size
    assert config.relative_pixels(sized((64, 48))) == 3
    assert config.relative_pixels(sized(TOO_LARGE)) == config.relative_pixels(FAST) == 1


def test_a_model_without_max_pixels_draws_its_own_size_alone() -> None:
    config = storybook()
    assert not config.is_resampled(sized((128, 128)))
    assert config.is_resampled(sized((128, 256)))


@pytest.mark.parametrize(("image_px", "side", "low"), [(128, 63, 64), (32, 31, 32), (128, 4097, 64), (32, -64, 32)])
def test_a_side_out_of_bounds_is_refused(image_px: int, side: int, low: int) -> None:
    config = dataclasses.replace(storybook(), image_px=image_px)
    for name in ("width", "height"):
        with pytest.raises(InvalidRequest, match=f"{name} is {side} but must be from {low} to 4096"):
            config.draw_settings({name: side})
    decoder = new_decoder(dataclasses.replace(tiny_config(), image_px=image_px))
    with pytest.raises(InvalidRequest, match=f"height is {side} but must be from {low} to 4096"):
        decoder.validate_request(request(sized((64, side))))


def test_a_picture_keeps_its_size_where_its_other_settings_change() -> None:
    config = dataclasses.replace(
        storybook(), draw_distilled=DrawSettings(steps=4, guidance_scale=1, scheduler=DISTILLED)
    )
    small = config.draw_settings({"width": 256, "height": 512})
    assert (small.scheduler, small.width, small.height) == (DISTILLED, 256, 512)
    for sent in ({"steps": 50}, {"scheduler": "ddim"}, {"scheduler": DISTILLED}):
        again = config.draw_settings(sent, like=small)
        assert (again.width, again.height) == (256, 512), sent
    without = dataclasses.replace(config, draw_distilled=None)
    assert without.drawable(small) == sized((256, 512), config.draw)
    assert config.draw_settings({"width": 128}, like=small).height == 512


def test_requests_know_every_sampler_and_a_model_draws_with_its_own() -> None:
    assert set(get_args(Scheduler)) == set(SAMPLERS)
    config = dataclasses.replace(storybook(), schedulers=("euler", "lcm", DISTILLED))
    assert config.draw_settings({"scheduler": "lcm"}).scheduler == "lcm"
    with pytest.raises(InvalidRequest, match="scheduler is 'pndm' but must be one of euler, lcm$"):
        config.draw_settings({"scheduler": "pndm"})


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"steps": 0}, "steps is 0 but must be a whole number from 1 to 100 with euler"),
        ({"steps": 101}, "steps is 101 but"),
        ({"steps": 2.5}, "steps is 2.5 but"),
        ({"steps": 64, "scheduler": "lcm"}, "steps is 64 but must be a whole number from 1 to 50 with lcm"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan but must be from 1, which is none, to 20"),
        ({"guidance_scale": -5.0}, "guidance_scale is -5"),
        ({"guidance_scale": 0.0}, "guidance_scale is 0"),  # of diffusers, for none: 1 here
        ({"guidance_scale": 1e30}, "guidance_scale is 1e"),
    ],
)
def test_what_nothing_draws_with_is_said_before_a_text_is_written(sent: dict[str, Any], message: str) -> None:
    config = dataclasses.replace(storybook(), schedulers=("euler", "lcm"), draw=DrawSettings(scheduler="euler"))
    with pytest.raises(InvalidRequest, match=message) as failure:
        config.draw_settings(sent)
    assert failure.value.field in sent
    with pytest.raises(InvalidRequest, match=message):
        config.check_draw(dataclasses.replace(config.draw, **sent))
    assert config.draw_settings({"steps": np.int64(3)}).steps == 3


def test_sizes_drawn_at_once_are_what_each_is_alone() -> None:
    decoder = new_decoder()
    sizes = [WIDE, OWN, TALL, WIDE, OWN, (0, 0), TOO_LARGE, UNEVEN]
    requests = [request(sized(size), page=page) for page, size in enumerate(sizes, start=1)]
    calls: list[torch.Size] = []
    handle = decoder.diffusion.denoiser.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape))
    together = draw_at_once(decoder, requests)
    handle.remove()
    assert {tuple(shape[2:]) for shape in calls} == {(8, 12), (8, 8), (16, 8)}, "rows and columns of latents"
    assert max(shape[0] for shape in calls if shape[2:] == (8, 12)) == 4, "two guided pictures of a size share a call"
    for one, drawn, size in zip(requests, together, sizes, strict=True):
        assert (drawn.width, drawn.height) == (size if size != (0, 0) else OWN)
        assert drawn.is_resampled == (size in (TOO_LARGE, UNEVEN))
        alone = new_decoder().draw([one])[0]
        assert alone.is_resampled == drawn.is_resampled
        assert np.abs(pixels(drawn) - pixels(alone)).max() <= 1


def test_a_wide_picture_is_drawn_and_not_stretched() -> None:
    decoder = new_decoder()
    wide, square = decoder.draw([request(sized(WIDE)), request(FAST)])
    stretched = np.asarray(Image.open(io.BytesIO(square.png)).resize(WIDE)).astype(int)
    assert np.abs(pixels(wide) - stretched).mean() > 1


def test_a_resampled_picture_is_the_models_own_cropped_to_its_middle_and_drawn_once() -> None:
    decoder = new_decoder()
    own = draw_at_once(decoder, [request(FAST)])[0]
    num_steps = decoder.occupancy.num_steps
    large = draw_at_once(decoder, [request(sized(TOO_LARGE))])[0]
    assert decoder.occupancy.num_steps == num_steps
    expected = ImageOps.fit(Image.open(io.BytesIO(own.png)), TOO_LARGE, Image.Resampling.LANCZOS)
    assert np.array_equal(pixels(large), np.asarray(expected))


def test_larger_pictures_take_more_places_in_a_step() -> None:
    decoder = new_decoder(max_batch=2)  # four places of the model's own size
    calls: list[int] = []
    handle = decoder.diffusion.denoiser.register_forward_pre_hook(
        lambda module, inputs: calls.append(inputs[0].shape[0] * inputs[0].shape[2] * inputs[0].shape[3])
    )
    own = 8 * 8
    draw_at_once(decoder, [request(FAST, page=page) for page in range(1, 6)])
    assert max(calls) == 4 * own
    calls.clear()
    draw_at_once(decoder, [request(sized((32, 64)), page=page) for page in range(1, 6)])
    assert max(calls) == 4 * own, "one guided picture of twice the pixels"
    calls.clear()
    draw_at_once(decoder, [request(sized((64, 48)), page=page) for page in range(1, 4)])
    assert max(calls) == 6 * own, "a picture that is larger than a step has one alone"
    handle.remove()


@pytest.fixture(scope="module")
def model() -> MiniGPT5:
    return MiniGPT5(new_generator(), new_decoder())


def test_the_python_api_draws_any_size(model: MiniGPT5) -> None:
    story = model.write("A fox", pages=1, seed=1, draw=sized(WIDE))
    assert story.pages[0].picture and pixels(story.pages[0].picture).shape == (32, 48, 3)
    assert model.draw(model.vokens("A fox"), settings=sized(TOO_LARGE)).is_resampled
    for wrong, match in (
        (sized((16, 32)), "width is 16"),
        (dataclasses.replace(FAST, scheduler="lcm"), "scheduler is"),
    ):
        with pytest.raises(InvalidRequest, match=match):
            model.write("A fox", draw=wrong)


@pytest.mark.parametrize(
    ("size", "written", "is_resampled"),
    [
        (["--width", "48", "--height", "32"], 'width="48" height="32"', False),
        (["--height", "104"], 'width="32" height="104"', True),
        ([], 'width="32" height="32"', False),
    ],
)
def test_the_command_line_draws_any_size_and_says_what_is_resampled(
    model: MiniGPT5,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    size: list[str],
    written: str,
    is_resampled: bool,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_json(model.config)))
    monkeypatch.setattr(MiniGPT5, "from_pretrained", lambda folder: model)
    book = tmp_path / "story.html"
    assert main(["A fox", "--pages", "1", "--model", str(tmp_path), "--out", str(book), *size]) == 0
    assert written in book.read_text()
    said = "pictures are drawn in the model's own size, 32x32, and resampled"
    assert (said in capsys.readouterr().err) == is_resampled


def test_the_command_line_refuses_a_size_before_it_loads_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_json(tiny_config())))
    assert main(["A fox", "--model", str(tmp_path), "--out", str(tmp_path / "a.html"), "--width", "9"]) == 2
    assert "width is 9 but must be from 32 to 4096" in capsys.readouterr().err
