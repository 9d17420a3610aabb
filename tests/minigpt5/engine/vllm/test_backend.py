"""VllmGenerator around a stand-in for vLLM's own engine: what its callers hear when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from minigpt5.engine.vllm import backend
from minigpt5.engine.vllm.settings import VllmSettings
from minigpt5.errors import EngineLost
from minigpt5.limits import default_limits
from minigpt5.types import StoryRequest
from tests.helpers.tiny import tiny_config, tiny_tokenizer, tiny_vision
from tests.minigpt5.engine.vllm.test_exported import new_export


class Silent:
    """Takes requests and never answers."""

    async def generate(self, *asked: object) -> AsyncGenerator[Any, None]:
        await asyncio.Event().wait()
        yield None

    def shutdown(self) -> None:
        pass


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> backend.VllmGenerator:
    async def is_right(self: object) -> None:
        pass

    monkeypatch.setattr(backend, "find_version", lambda: "0")
    monkeypatch.setattr(backend, "new_params", lambda *asked, **options: SimpleNamespace(**options))
    monkeypatch.setattr(backend, "launch", lambda *asked, **options: Silent())
    monkeypatch.setattr(backend.VllmGenerator, "_validate_states", is_right)
    config = tiny_config()
    settings, limits = VllmSettings(folder="export"), default_limits("cpu")
    return backend.VllmGenerator(
        config, tiny_tokenizer(config), tiny_vision(config), new_export(), settings, limits=limits
    )


@pytest.mark.timeout(60)
def test_an_engine_that_is_closed_ends_what_is_under_way_and_what_comes_later(generator: backend.VllmGenerator) -> None:
    async def ask() -> None:
        async for _ in generator.generate(StoryRequest(prompt=("A fox",), pages=1)):
            pass

    async def main() -> None:
        under_way = asyncio.create_task(ask())
        while not generator.num_running:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(generator.close)
        with pytest.raises(EngineLost, match="is closed"):
            await under_way
        with pytest.raises(EngineLost, match="is gone"):
            await ask()

    asyncio.run(main())
