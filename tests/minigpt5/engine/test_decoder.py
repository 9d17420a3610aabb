"""The decoder draws what training saves: the same picture for the same vokens and seed, in any batch."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import logging
import random
from pathlib import Path
from typing import Any
from unittest import TestCase

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from minigpt5.engine.bounded_cache import BoundedCache
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.denoising import Denoising, advance, denoise
from minigpt5.errors import EngineFull, FingerprintMismatch, InvalidRequest, ModelFolderError
from minigpt5.model.folder_config import check_folder, load_config
from minigpt5.types import DecoderEvent, DrawRequest, DrawSettings, Picture, Progress, Vokens
from tests.helpers.streams import run_together
from tests.helpers.tiny import save_tiny, tiny_config, tiny_diffusion, tiny_mapper

HINT = "`CLIPImageProcessor` requires torchvision (not installed); falling back to `CLIPImageProcessorPil`"
FAST = DrawSettings(steps=3, guidance_scale=2.0)


def vokens(page: int = 1, *, fingerprint: str = "f" * 64) -> Vokens:
    hidden_VH = np.random.default_rng(page).normal(size=(8, 48)).astype(np.float32)
    return Vokens(page=page, hidden_VH=hidden_VH, fingerprint=fingerprint)


def new_decoder(**limits: int) -> DiffusionDecoder:
    config = tiny_config()
    return DiffusionDecoder(config, tiny_mapper(config), tiny_diffusion(config), **limits)


@pytest.fixture(scope="module")
def decoder() -> DiffusionDecoder:
    return new_decoder()


def run(decoder: DiffusionDecoder, requests: list[DrawRequest]) -> list[list[DecoderEvent]]:
    return run_together(decoder.decode, requests)


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.png))).astype(int)


def test_a_picture_does_not_depend_on_its_company(decoder: DiffusionDecoder) -> None:
    alone = decoder.draw([DrawRequest(vokens=vokens(2), seed=9, settings=FAST)])[0]
    company = [DrawRequest(vokens=vokens(page), seed=7 + page, settings=FAST) for page in (1, 2, 3)]
    beside = decoder.draw(company)[1]
    assert np.abs(pixels(alone) - pixels(beside)).max() <= 1
    assert np.abs(pixels(alone) - pixels(decoder.draw([dataclasses.replace(company[1], seed=1)])[0])).max() > 1


def test_in_bfloat16_the_picture_is_nearly_the_same(decoder: DiffusionDecoder) -> None:
    request = DrawRequest(vokens=vokens(2), seed=9, settings=FAST)
    config = tiny_config()
    diffusion = tiny_diffusion(config)
    with TestCase().assertNoLogs("diffusers"):
        diffusion.hold_in(torch.bfloat16)
    rough = DiffusionDecoder(config, tiny_mapper(config), diffusion)
    apart = np.abs(pixels(decoder.draw([request])[0]) - pixels(rough.draw([request])[0]))
    assert apart.max() > 0
    assert apart.mean() < 3


def test_loading_does_not_ask_for_torchvision(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    DiffusionDecoder.from_pretrained(tmp_path)
    logger = logging.getLogger("transformers.utils.import_utils")
    hint, other = (logger.makeRecord(logger.name, logging.WARNING, "", 0, said, (), None) for said in (HINT, "Beware."))
    assert not logger.filter(hint) and logger.filter(other)


def test_concurrent_requests_stream_their_own_progress_and_picture(decoder: DiffusionDecoder) -> None:
    requests = [DrawRequest(vokens=vokens(page), seed=page, settings=FAST) for page in (1, 2, 3)]
    for page, events in enumerate(run(decoder, requests), start=1):
        assert [event.step for event in events if isinstance(event, Progress)] == [1, 2, 3]
        assert isinstance(events[-1], Picture) and events[-1].page == page
        assert len(events) == 4
        expected = decoder.draw([DrawRequest(vokens=vokens(page), seed=page, settings=FAST)])[0]
        assert np.abs(pixels(events[-1]) - pixels(expected)).max() <= 1


def test_a_closed_stream_stops_the_work(decoder: DiffusionDecoder) -> None:
    async def leave() -> None:
        stream = decoder.decode(
            DrawRequest(vokens=vokens(), seed=1, settings=DrawSettings(steps=100, guidance_scale=2.0))
        )
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        after = DrawRequest(vokens=vokens(), seed=1, settings=FAST)
        events = [event async for event in decoder.decode(after)]
        assert isinstance(events[-1], Picture)

    asyncio.run(asyncio.wait_for(leave(), 20))


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "dpm-solver++", "sde-dpm-solver++"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_scheduler_draws(decoder: DiffusionDecoder, scheduler: str, steps: int) -> None:
    settings = DrawSettings(steps=steps, guidance_scale=1.0, scheduler=scheduler)
    events = run(decoder, [DrawRequest(vokens=vokens(), seed=steps, settings=settings)])[0]
    assert [event.step for event in events if isinstance(event, Progress)][-1] == steps
    assert isinstance(events[-1], Picture)
    assert pixels(events[-1]).std() > 1


def test_vokens_of_another_model_are_refused(decoder: DiffusionDecoder) -> None:
    with pytest.raises(FingerprintMismatch, match="same model folder"):
        decoder.validate_request(DrawRequest(vokens=vokens(fingerprint="a" * 64), seed=1))


def test_vokens_of_another_shape_are_refused(decoder: DiffusionDecoder) -> None:
    wrong = dataclasses.replace(vokens(), hidden_VH=np.zeros((7, 48), np.float32))
    with pytest.raises(InvalidRequest, match=r"\(7, 48\).*\(8, 48\)"):
        decoder.validate_request(DrawRequest(vokens=wrong, seed=1))


def test_saved_by_training_loaded_by_the_decoder(tmp_path: Path) -> None:
    config = save_tiny(tmp_path)
    mapper, diffusion = tiny_mapper(config), tiny_diffusion(config)
    for module in (mapper, diffusion.vae, diffusion.denoiser):  # what is stored is float16
        module.half().float()
    request = DrawRequest(vokens=vokens(fingerprint=config.fingerprint), seed=3, settings=FAST)
    with torch.no_grad():
        drawn = denoise(
            diffusion,
            mapper.eval()(torch.from_numpy(request.vokens.hidden_VH)[None]),
            mapper.null_condition(),
            seeds=[3],
            draw=FAST,
            guidance_rescale=config.guidance_rescale,
        )
    expected = ((drawn[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy().astype(int)
    loaded = DiffusionDecoder.from_pretrained(tmp_path, backend="eager")
    assert np.abs(pixels(loaded.draw([request])[0]) - expected).max() <= 1


def test_a_byte_order_mark_in_a_config_does_not_matter(tmp_path: Path) -> None:
    config = save_tiny(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("\ufeff" + path.read_text())
    assert load_config(tmp_path) == config


def test_a_damaged_folder_says_so(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    path = tmp_path / "mapper.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(ModelFolderError, match="damaged, missing or foreign"):
        DiffusionDecoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelFolderError, match="not a model folder"):
        load_config(tmp_path)


def test_a_pickle_in_the_folder_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "weights.ckpt").write_bytes(b"x")
    with pytest.raises(ModelFolderError, match="weights.ckpt"):
        check_folder(tmp_path)


# Batch invariance


def random_request(seed: int) -> DrawRequest:
    rng = random.Random(seed)
    settings = DrawSettings(
        steps=rng.randint(1, 7),
        guidance_scale=rng.choice([1.0, 2.0, 4.5]),
        scheduler=rng.choice(["ddim", "pndm", "dpm-solver++", "sde-dpm-solver++"]),
    )
    return DrawRequest(vokens=vokens(seed), seed=seed, settings=settings, key=str(seed % 3))


def start(decoder: DiffusionDecoder, request: DrawRequest) -> Denoising:
    with torch.no_grad():
        condition_QD = decoder.mapper(torch.from_numpy(request.vokens.hidden_VH)[None])[0]
    return Denoising(decoder.diffusion, condition_QD, seed=request.seed, draw=request.settings, guidance_rescale=0.7)


@pytest.mark.parametrize("num", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_pictures_in_random_batches_are_what_each_is_alone(decoder: DiffusionDecoder, num: int) -> None:
    """Each joins at a step of its own; settings, schedulers and step counts are mixed in every UNet call."""
    null_1QD = decoder.mapper.null_condition().detach()
    rng = random.Random(0)
    requests = [random_request(seed) for seed in range(num)]
    waiting, running, done = [start(decoder, request) for request in requests], [], []
    beside = list(waiting)
    while waiting or running:
        for _ in range(rng.randint(0, min(3, len(waiting)))):
            running.append(waiting.pop(rng.randrange(len(waiting))))
        chosen = rng.sample(running, min(len(running), rng.randint(1, 9)))
        if chosen:
            advance(decoder.diffusion, chosen, null_1QD)
        done += [picture for picture in running if not picture.num_calls_left]
        running = [picture for picture in running if picture.num_calls_left]
    assert len(done) == num
    num_equal = 0
    for request, found in zip(requests, beside, strict=True):
        alone = start(decoder, request)
        while alone.num_calls_left:
            advance(decoder.diffusion, [alone], null_1QD)
        torch.testing.assert_close(found.latents_1CYX, alone.latents_1CYX, atol=1e-4, rtol=0)
        num_equal += torch.equal(found.latents_1CYX, alone.latents_1CYX)
    print(f"{num_equal} of {num} bit for bit")


def test_pictures_of_all_settings_drawn_at_once_are_within_one_level_of_each_alone(decoder: DiffusionDecoder) -> None:
    requests = [random_request(seed) for seed in range(1000, 1040)]
    for request, events in zip(requests, run(decoder, requests), strict=True):
        alone = decoder.draw([request])[0]
        found = events[-1]
        assert isinstance(found, Picture)
        assert np.abs(pixels(found) - pixels(alone)).max() <= 1
    assert decoder.num_running == decoder.num_waiting == decoder.queued_cost == 0


def end_together(decoder: DiffusionDecoder, requests: list[DrawRequest]) -> list[object]:
    """The last event of each picture, or its failure."""

    async def last(request: DrawRequest) -> object:
        return [event async for event in decoder.decode(request)][-1]

    async def together() -> list[object]:
        return await asyncio.gather(*map(last, requests), return_exceptions=True)

    return asyncio.run(together())


@pytest.mark.parametrize("part", ["predict", "to_pixels"])
def test_a_size_for_which_the_memory_is_too_small_fails_no_picture_of_another(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = new_decoder()
    whole = getattr(decoder.diffusion, part)
    large = DrawSettings(steps=2, guidance_scale=2.0, width=64, height=32)

    def fail_where_wide(*args: Any, **options: Any) -> Any:
        if any(isinstance(one, Tensor) and one.dim() == 4 and one.shape[3] > one.shape[2] for one in args):
            raise torch.OutOfMemoryError("out of memory")
        return whole(*args, **options)

    requests = [DrawRequest(vokens=vokens(page), seed=page, settings=FAST) for page in (1, 2)]
    expected = [end[-1] for end in run(new_decoder(), requests)]
    monkeypatch.setattr(decoder.diffusion, part, fail_where_wide)
    bad, *others = end_together(decoder, [DrawRequest(vokens=vokens(3), seed=3, settings=large), *requests])
    assert isinstance(bad, torch.OutOfMemoryError)
    drawn = [one for one in others if isinstance(one, Picture)]
    assert len(drawn) == len(expected)
    assert max(np.abs(pixels(a) - pixels(b)).max() for a, b in zip(drawn, expected, strict=True)) <= 1
    assert decoder.num_running == decoder.num_waiting == 0


@pytest.mark.parametrize("where", ["vokens", "vae"])
def test_a_picture_that_is_no_numbers_is_a_failure_and_no_black_picture(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = new_decoder()
    broken, whole = vokens(2), decoder.diffusion.to_pixels
    wide = dataclasses.replace(FAST, width=64, height=32)
    if where == "vokens":
        broken.hidden_VH[0, 0] = np.nan
    else:

        def overflow(latents_BCYX: Tensor, **options: Any) -> Tensor:
            is_wide = latents_BCYX.shape[3] > latents_BCYX.shape[2]
            return whole(latents_BCYX, **options) * (torch.nan if is_wide else 1)

        monkeypatch.setattr(decoder.diffusion, "to_pixels", overflow)
    requests = [
        DrawRequest(vokens=vokens(1), seed=1, settings=FAST),
        DrawRequest(vokens=broken, seed=1, settings=FAST if where == "vokens" else wide),
    ]
    picture, failure = end_together(decoder, requests)
    assert isinstance(picture, Picture) and isinstance(failure, FloatingPointError)
    with pytest.raises(FloatingPointError, match="decoder_precision"):
        decoder.draw(requests)


def test_seeds_of_more_than_32_bits_are_other_seeds(decoder: DiffusionDecoder) -> None:
    seeds = (7, 7 + 2**32, 7 + 2**40, 2**53 - 1)
    noise = [start(decoder, DrawRequest(vokens=vokens(), seed=seed, settings=FAST)).latents_1CYX for seed in seeds]
    torch.testing.assert_close(noise[0], torch.randn(noise[0].shape, generator=torch.Generator().manual_seed(7)))
    assert all((one != other).any() for number, one in enumerate(noise) for other in noise[:number])


def test_a_picture_joins_those_under_way_and_leaves_before_them(decoder: DiffusionDecoder) -> None:
    async def join() -> list[str]:
        ends: list[str] = []

        async def draw(name: str, steps: int, seed: int) -> None:
            settings = DrawSettings(steps=steps, guidance_scale=2.0)
            async for _ in decoder.decode(DrawRequest(vokens=vokens(), seed=seed, settings=settings)):
                pass
            ends.append(name)

        long = asyncio.create_task(draw("long", 100, 71))
        await asyncio.sleep(0.05)
        await draw("short", 2, 72)
        await long
        return ends

    assert asyncio.run(join()) == ["short", "long"]


def test_a_scale_of_one_has_one_place_in_a_call_and_guidance_two(decoder: DiffusionDecoder) -> None:
    sizes: list[int] = []
    handle = decoder.diffusion.denoiser.register_forward_pre_hook(lambda unet, inputs: sizes.append(len(inputs[0])))
    requests = [
        DrawRequest(vokens=vokens(), seed=1, settings=DrawSettings(steps=2, guidance_scale=scale))
        for scale in (1.0, 3.0, 1.0)
    ]
    decoder.draw(requests)
    handle.remove()
    assert sizes == [4, 4]


def test_a_picture_of_another_client_is_drawn_at_half_speed_at_worst(decoder: DiffusionDecoder) -> None:
    decoder = new_decoder()
    sizes: list[int] = []
    decoder.diffusion.denoiser.register_forward_pre_hook(lambda unet, inputs: sizes.append(len(inputs[0])))

    async def together() -> int:
        async def draw(key: str, seed: int) -> None:
            settings = DrawSettings(steps=10, guidance_scale=2.0)
            async for _ in decoder.decode(DrawRequest(vokens=vokens(), seed=seed, settings=settings, key=key)):
                pass

        many = [asyncio.create_task(draw("many", seed)) for seed in range(16)]
        while not sizes:
            await asyncio.sleep(0.001)
        before = len(sizes)
        await draw("few", 99)
        during = sizes[before:]
        await asyncio.gather(*many)
        return sum(during)

    # Its own 10 steps take 20 samples; steps that began before it joined are full.
    assert asyncio.run(together()) <= 2 * 20 + 3 * 16


def test_after_random_cancels_nothing_is_in_flight_and_work_stops_within_a_step() -> None:
    decoder = new_decoder()
    num_calls = 0

    def count(unet: object, inputs: object) -> None:
        nonlocal num_calls
        num_calls += 1

    decoder.diffusion.denoiser.register_forward_pre_hook(count)

    async def cancel(seed: int) -> None:
        rng = random.Random(seed)
        await asyncio.sleep(rng.random())
        settings = DrawSettings(steps=100, guidance_scale=2.0)
        stream = decoder.decode(DrawRequest(vokens=vokens(), seed=seed, settings=settings, key=str(seed % 3)))
        task = asyncio.ensure_future(anext(stream))
        await asyncio.wait([task], timeout=0.01 * rng.randint(0, 20))
        if task.done():
            await stream.aclose()  # type: ignore[attr-defined]
        else:
            task.cancel()

    async def run_all() -> int:
        await asyncio.gather(*(cancel(seed) for seed in range(200)))
        before = num_calls
        while decoder.num_running + decoder.num_waiting:
            await asyncio.sleep(0.01)
        return num_calls - before

    assert asyncio.run(asyncio.wait_for(run_all(), 60)) <= 1
    assert decoder.num_running == decoder.num_waiting == decoder.queued_cost == 0


# Content


def test_an_identical_picture_is_answered_without_drawing(decoder: DiffusionDecoder) -> None:
    decoder = new_decoder()
    request = DrawRequest(vokens=vokens(), seed=5, settings=FAST)
    first = run(decoder, [request])[0][-1]
    num_steps = decoder.occupancy.num_steps
    again = run(decoder, [dataclasses.replace(request, vokens=dataclasses.replace(request.vokens, page=9))])[0]
    assert isinstance(first, Picture)
    assert again == [dataclasses.replace(first, page=9)] and decoder.occupancy.num_steps == num_steps > 0
    for change in (
        {"seed": 6},
        {"settings": dataclasses.replace(FAST, steps=4)},
        {"settings": dataclasses.replace(FAST, guidance_scale=2.5)},
        {"vokens": vokens(2)},
    ):
        other = run(decoder, [dataclasses.replace(request, **change)])[0][-1]  # type: ignore[arg-type]
        assert isinstance(other, Picture) and other.png != first.png
        assert decoder.occupancy.num_steps > num_steps
        num_steps = decoder.occupancy.num_steps


def test_the_least_recently_used_go_when_the_bytes_run_out() -> None:
    cache = BoundedCache[bytes](10, size_bytes=len)
    for name in "abc":
        cache.put(name, name.encode() * 3)
    assert cache.get("a") == b"aaa"
    cache.put("d", b"dddd")
    assert [name for name in "abcd" if cache.get(name)] == ["a", "c", "d"]
    cache.put("whale", b"w" * 11)
    assert cache.get("whale") is None and cache.num_bytes == 10


@pytest.mark.parametrize("scheduler", ["ddim", "pndm"])  # the other one calls the denoiser once more than it has steps
@pytest.mark.parametrize(
    ("num_previews", "steps", "shown_at"),
    [(0, 12, []), (1, 12, [6]), (2, 12, [4, 8]), (3, 12, [3, 6, 9]), (3, 4, [1, 2, 3]), (3, 2, [1]), (3, 1, [])],
)
def test_as_many_previews_come_as_are_asked_for_and_as_there_are_steps(
    decoder: DiffusionDecoder, num_previews: int, steps: int, shown_at: list[int], scheduler: str
) -> None:
    settings = DrawSettings(steps=steps, guidance_scale=2.0, scheduler=scheduler)
    request = DrawRequest(vokens=vokens(), seed=50 + num_previews, settings=settings, num_previews=num_previews)
    events = run(decoder, [request])[0]
    previews = [(event.step, event.preview) for event in events if isinstance(event, Progress) and event.preview]
    assert [step for step, _ in previews] == shown_at
    for _, preview in previews:
        shown = Image.open(io.BytesIO(preview))
        assert shown.format == "JPEG" and 0 < max(shown.size) <= 64


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_a_preview_shows_what_the_prediction_makes_of_the_noise(prediction_type: str) -> None:
    decoder = new_decoder()
    decoder.diffusion.noise_schedule.register_to_config(prediction_type=prediction_type, rescale_betas_zero_snr=False)
    picture = start(decoder, DrawRequest(vokens=vokens(), seed=1, settings=DrawSettings(steps=4, guidance_scale=1.0)))
    for seed in range(4):
        predicted = torch.randn(picture.latents_1CYX.shape, generator=torch.Generator().manual_seed(seed))
        expected = picture.sampler.step(predicted, picture.timestep, picture.latents_1CYX).pred_original_sample
        picture.take(predicted, None)
        torch.testing.assert_close(picture.pred_x0_1CYX, expected)


def test_more_pictures_than_the_limit_are_refused() -> None:
    decoder = new_decoder(max_jobs=3)
    with pytest.raises(EngineFull, match="at most 3"):
        run(decoder, [DrawRequest(vokens=vokens(), seed=seed, settings=FAST) for seed in range(4)])
