"""Ray Serve routes pictures of a style to a decoder that has drawn in it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest
import ray
from ray import serve

from deployments.engines.diffusion_decoder import DiffusionDecoder
from deployments.engines.handles import ServeEngines
from minigpt5.errors import InvalidRequest
from minigpt5.model.decoders.load import load_diffusion
from minigpt5.model.folder_config import load_config
from minigpt5.types import DecoderEvent, DrawRequest, DrawSettings, Picture
from tests.helpers.styles import save_style
from tests.helpers.tiny import save_tiny
from tests.minigpt5.engine.test_decoder import vokens

NUM_PICTURES = 8


class Noting(DiffusionDecoder):
    """Notes which process draws what."""

    def __init__(self, model: str, notes: str) -> None:
        super().__init__(model, 1)
        self.notes = Path(notes)

    async def decode(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        with self.notes.open("a") as file:
            file.write(f"{request.settings.style} {os.getpid()}\n")
        async for event in super().decode(request):
            yield event


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[ServeEngines]:
    save_tiny(tmp_path / "model")
    unet = load_diffusion(tmp_path / "model" / "decoder").denoiser
    for seed, name in enumerate(("ink", "oil")):
        save_style(tmp_path / "model" / "adapters" / name, unet, seed=seed)
    ray.init(address="local", num_cpus=2, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    try:
        decoder = serve.deployment(Noting, num_replicas=2, ray_actor_options={"num_cpus": 0.1})
        handle = serve.run(decoder.bind(str(tmp_path / "model"), str(tmp_path / "notes")), route_prefix=None)
        yield ServeEngines(handle, handle)
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.cluster
def test_a_style_stays_with_its_decoder(engines: ServeEngines, tmp_path: Path) -> None:
    fingerprint = load_config(tmp_path / "model").fingerprint

    async def draw(style: str, seed: int) -> bytes:
        settings = DrawSettings(steps=1, guidance_scale=2.0, style=style)
        request = DrawRequest(vokens=vokens(fingerprint=fingerprint), seed=seed, settings=settings)
        events = [event async for event in engines.decode(request)]
        assert isinstance(events[-1], Picture)
        return events[-1].png

    async def draw_all() -> None:
        pictures = set()
        for style in ("ink", "oil"):
            pictures.add(await draw(style, 0))
            await asyncio.sleep(1)  # routers hear of a decoder's styles a moment later
        for seed in range(1, NUM_PICTURES):
            for style in ("ink", "oil"):
                pictures.add(await draw(style, seed))
        assert len(pictures) == 2 * NUM_PICTURES
        with pytest.raises(InvalidRequest, match="must be one of ink, oil"):
            await draw("pen", 0)

    asyncio.run(draw_all())
    drawn = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    homes = {style: {process for name, process in drawn if name == style} for style in ("ink", "oil")}
    assert [len(home) for home in homes.values()] == [1, 1], homes
    assert homes["ink"] != homes["oil"]  # the second style goes where there are fewer
