"""The two engines as the HTTP front sees them: Serve's handles become the callables that `stream_story` joins."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Protocol

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.observability.story_context import current_story
from minigpt5.errors import EngineLost, FingerprintMismatch, MiniGPT5Error
from minigpt5.story.stream import describe
from minigpt5.types import DecoderEvent, DrawRequest, GeneratorEvent, StoryRequest

READY_TIMEOUT_S = 5.0
UPGRADE_S = 600.0
"""How long the engines may have two models: Serve replaces one after the other, and pictures wait meanwhile."""


class NotReady(Exception):
    """An engine does not answer; the message says which and why."""


class Engines(Protocol):
    """What the front needs of the engines, wherever they run."""

    def generate(self, request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]: ...

    def decode(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]: ...

    async def validate_request(self, request: StoryRequest) -> None:
        """Raises InvalidRequest where the request cannot be written."""

    async def check_ready(self) -> None:
        """Raises NotReady where a story would fail, and FingerprintMismatch where the engines have had two models for
        longer than UPGRADE_S."""


class ServeEngines:
    """The engines behind Serve's handles."""

    def __init__(
        self, generator: DeploymentHandle, decoder: DeploymentHandle, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._generator, self._decoder = generator, decoder
        self._clock = clock
        self._differ_since: float | None = None

    async def generate(self, request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        generator = self._generator.options(stream=True, session_id=request.session)
        events = generator.generate.remote(_to_write(request))
        try:
            with _own_errors():
                async for event in events:
                    yield event
        finally:
            events.cancel()  # does nothing to a stream that has ended

    async def decode(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]:
        # Serve prefers a decoder that has the picture's style.
        decoder = self._decoder.options(
            stream=True, multiplexed_model_id=request.settings.style, session_id=current_story()
        )
        events = decoder.decode.remote(request)
        try:
            with _own_errors():
                async for event in events:
                    yield event
        finally:
            events.cancel()

    async def validate_request(self, request: StoryRequest) -> None:
        with _own_errors():
            generator = self._generator.options(session_id=current_story())
            await generator.validate_request.remote(_to_write(request))

    async def check_ready(self) -> None:
        generator, decoder = await asyncio.gather(
            self._fingerprint(self._generator, "VokenGenerator"),
            self._fingerprint(self._decoder, "DiffusionDecoder"),
        )
        if generator == decoder:
            self._differ_since = None
            return
        # A balancer that took this for a failure would turn everybody away during each upgrade.
        if self._differ_since is None:
            self._differ_since = self._clock()
        if (seconds := self._clock() - self._differ_since) >= UPGRADE_S:
            raise FingerprintMismatch(
                f"VokenGenerator has served model {generator[:12]} and DiffusionDecoder {decoder[:12]} for "
                f"{seconds:.0f} s: start both from the same model folder"
            )

    async def _fingerprint(self, handle: DeploymentHandle, name: str) -> str:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                return await handle.fingerprint.remote()
        except TimeoutError:
            raise NotReady(f"{name} does not answer within {READY_TIMEOUT_S:g} s") from None
        except Exception as failure:  # whatever Serve raises, the engine cannot be used now
            raise NotReady(f"{name} does not answer: {describe(failure)}") from failure


def _to_write(request: StoryRequest) -> StoryRequest:
    """Without what the decoder alone reads: megabytes of pictures."""
    return dataclasses.replace(request, characters=())


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """An error of ours that an engine raised comes out as itself, without Ray's wrapping. Raises EngineLost where its
    process is gone, or Serve has given up starting one."""
    try:
        yield
    except RayActorError as failure:
        raise EngineLost(f"an engine's process died: {describe(failure)}") from failure
    except DeploymentUnavailableError as failure:
        raise EngineLost(f"an engine does not start: {failure.message}") from failure
    except RayTaskError as failure:
        if isinstance(failure.cause, MiniGPT5Error):
            raise failure.cause from None
        raise
