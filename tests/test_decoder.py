"""What training saves, the decoder draws: the same picture for the same vokens and seed, whoever shares the batch."""

from __future__ import annotations

import asyncio
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minigpt5 import model_folder
from minigpt5.decoder import DiffusionDecoder
from minigpt5.denoising import denoise
from minigpt5.errors import FingerprintMismatch, InvalidRequest, ModelFolderError
from minigpt5.types import DecoderEvent, DrawRequest, DrawSettings, Picture, Progress, Vokens
from tests.tiny import save_tiny, tiny_config, tiny_diffusion, tiny_mapper

FAST = DrawSettings(steps=3, guidance_scale=2.0)


def vokens(page: int = 1, *, fingerprint: str = "f" * 64) -> Vokens:
    hidden_VH = np.random.default_rng(page).normal(size=(8, 48)).astype(np.float32)
    return Vokens(page=page, hidden_VH=hidden_VH, fingerprint=fingerprint)


@pytest.fixture(scope="module")
def decoder() -> DiffusionDecoder:
    config = tiny_config()
    return DiffusionDecoder(config, tiny_mapper(config), tiny_diffusion(config))


def run(decoder: DiffusionDecoder, requests: list[DrawRequest]) -> list[list[DecoderEvent]]:
    """All at once."""

    async def collect(request: DrawRequest) -> list[DecoderEvent]:
        return [event async for event in decoder.decode(request)]

    async def together() -> list[list[DecoderEvent]]:
        return await asyncio.gather(*map(collect, requests))

    return asyncio.run(together())


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture.png))).astype(int)


def test_a_picture_does_not_depend_on_its_company(decoder: DiffusionDecoder) -> None:
    alone = decoder.draw([DrawRequest(vokens=vokens(2), seed=9, settings=FAST)])[0]
    company = [DrawRequest(vokens=vokens(page), seed=7 + page, settings=FAST) for page in (1, 2, 3)]
    beside = decoder.draw(company)[1]
    assert np.abs(pixels(alone) - pixels(beside)).max() <= 1
    assert np.abs(pixels(alone) - pixels(decoder.draw([dataclasses.replace(company[1], seed=1)])[0])).max() > 1


def test_concurrent_requests_stream_their_own_progress_and_picture(decoder: DiffusionDecoder) -> None:
    async def collect(page: int) -> list[object]:
        request = DrawRequest(vokens=vokens(page), seed=page, settings=FAST)
        return [event async for event in decoder.decode(request)]

    async def together() -> list[list[object]]:
        return await asyncio.gather(*(collect(page) for page in (1, 2, 3)))

    for page, events in enumerate(asyncio.run(together()), start=1):
        assert [event.step for event in events if isinstance(event, Progress)] == [1, 2, 3]
        assert isinstance(events[-1], Picture) and events[-1].page == page
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


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "dpm-solver++"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_scheduler_draws(decoder: DiffusionDecoder, scheduler: str, steps: int) -> None:
    settings = DrawSettings(steps=steps, guidance_scale=1.0, scheduler=scheduler)
    events = run(decoder, [DrawRequest(vokens=vokens(), seed=steps, settings=settings)])[0]
    assert [event.step for event in events if isinstance(event, Progress)][-1] == steps
    assert isinstance(events[-1], Picture)
    assert pixels(events[-1]).std() > 1


def test_vokens_of_another_model_are_refused(decoder: DiffusionDecoder) -> None:
    with pytest.raises(FingerprintMismatch, match="same model folder"):
        decoder.check(DrawRequest(vokens=vokens(fingerprint="a" * 64), seed=1))


def test_vokens_of_another_shape_are_refused(decoder: DiffusionDecoder) -> None:
    wrong = dataclasses.replace(vokens(), hidden_VH=np.zeros((7, 48), np.float32))
    with pytest.raises(InvalidRequest, match=r"\(7, 48\).*\(8, 48\)"):
        decoder.check(DrawRequest(vokens=wrong, seed=1))


def test_saved_by_training_loaded_by_the_decoder(tmp_path: Path) -> None:
    config = save_tiny(tmp_path)
    mapper, diffusion = tiny_mapper(config), tiny_diffusion(config)
    for module in (mapper, diffusion.vae, diffusion.unet):  # what is stored is float16
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
    loaded = DiffusionDecoder.from_pretrained(tmp_path)
    assert np.abs(pixels(loaded.draw([request])[0]) - expected).max() <= 1


def test_a_damaged_folder_says_so(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    path = tmp_path / "mapper.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(ModelFolderError, match="damaged, missing or foreign"):
        DiffusionDecoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelFolderError, match="not a model folder"):
        model_folder.load_config(tmp_path)


def test_a_pickle_in_the_folder_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "weights.ckpt").write_bytes(b"x")
    with pytest.raises(ModelFolderError, match="weights.ckpt"):
        model_folder.check_folder(tmp_path)
