"""When the front takes its engines for ready."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.engines.handles import UPGRADE_S, NotReady, ServeEngines
from minigpt5.errors import FingerprintMismatch


class Handle:
    """One engine behind Serve's handle, as far as its fingerprint goes."""

    def __init__(self, fingerprint: str) -> None:
        self.model = fingerprint
        self.fingerprint: Any = SimpleNamespace(remote=self._answer)

    async def _answer(self) -> str:
        if not self.model:
            raise RuntimeError("it is gone")
        return self.model


def test_two_models_are_an_upgrade_until_it_takes_too_long() -> None:
    now = [100.0]
    generator, decoder = Handle("a" * 64), Handle("a" * 64)
    engines = ServeEngines(generator, decoder, clock=lambda: now[0])  # type: ignore[arg-type]  # two handles' faces
    asyncio.run(engines.check_ready())
    generator.model = "b" * 64
    asyncio.run(engines.check_ready())
    now[0] += UPGRADE_S - 1
    asyncio.run(engines.check_ready())
    now[0] += 1
    with pytest.raises(FingerprintMismatch, match=f"b{{12}} and DiffusionDecoder a{{12}} for {UPGRADE_S:.0f} s"):
        asyncio.run(engines.check_ready())
    decoder.model = "b" * 64
    asyncio.run(engines.check_ready())
    decoder.model = "c" * 64
    asyncio.run(engines.check_ready())  # the next upgrade has its own time


def test_an_engine_that_fails_is_named() -> None:
    engines = ServeEngines(Handle("a"), Handle(""))  # type: ignore[arg-type]  # two handles' faces
    with pytest.raises(NotReady, match="DiffusionDecoder does not answer: .*it is gone"):
        asyncio.run(engines.check_ready())
