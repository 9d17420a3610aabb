"""The two engines as the HTTP front sees them: Serve's handles become the callables that flow.py joins."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Protocol

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.handle import DeploymentHandle

from deployments.stories.admission import Load
from deployments.stories.events import StreamEvent
from deployments.stories.ledger import News, Part
from minigpt5.errors import EngineLost, FingerprintMismatch, MiniGPT5Error
from minigpt5.story.stream import describe
from minigpt5.types import DecoderEvent, DrawRequest, GeneratorEvent, StoryRequest

READY_TIMEOUT_S = 5.0
LEDGER_TIMEOUT_S = 10.0
LEDGER_TRIES = 20
LEDGER_PAUSE_S = 0.5


class NotReady(Exception):
    """An engine does not answer; the message says which and why."""


class Engines(Protocol):
    """What the front needs of the engines, wherever they run."""

    def generate(self, request: StoryRequest) -> AsyncIterator[GeneratorEvent]: ...

    def decode(self, request: DrawRequest) -> AsyncIterator[DecoderEvent]: ...

    async def check(self, request: StoryRequest) -> None:
        """Raises InvalidRequest where the request cannot be written."""

    async def check_ready(self) -> None:
        """Raises NotReady or FingerprintMismatch where a story would fail."""


class ServeEngines:
    """The engines behind Serve's handles."""

    def __init__(self, generator: DeploymentHandle, decoder: DeploymentHandle) -> None:
        self._generator, self._decoder = generator, decoder

    async def generate(self, request: StoryRequest) -> AsyncIterator[GeneratorEvent]:
        events = self._generator.options(stream=True, session_id=request.session).generate.remote(request)
        try:
            with _own_errors():
                async for event in events:
                    yield event
        finally:
            events.cancel()  # does nothing to a stream that has ended

    async def decode(self, request: DrawRequest) -> AsyncIterator[DecoderEvent]:
        events = self._decoder.options(stream=True).decode.remote(request)
        try:
            with _own_errors():
                async for event in events:
                    yield event
        finally:
            events.cancel()

    async def check(self, request: StoryRequest) -> None:
        with _own_errors():
            await self._generator.check.remote(request)

    async def check_ready(self) -> None:
        generator, decoder = await asyncio.gather(
            self._fingerprint(self._generator, "VokenGenerator"),
            self._fingerprint(self._decoder, "DiffusionDecoder"),
        )
        if generator != decoder:
            raise FingerprintMismatch(
                f"VokenGenerator serves model {generator[:12]} but DiffusionDecoder serves {decoder[:12]}: "
                "start both from the same model folder"
            )

    async def _fingerprint(self, handle: DeploymentHandle, name: str) -> str:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                return await handle.fingerprint.remote()
        except TimeoutError:
            raise NotReady(f"{name} does not answer within {READY_TIMEOUT_S:g} s") from None
        except Exception as failure:  # whatever Serve raises, the engine cannot be used now
            raise NotReady(f"{name} does not answer: {describe(failure)}") from failure


class ServeLedger:
    """The ledger of several fronts, behind Serve's handle; see deployments.stories.ledger.Ledger."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def beat(self, front: str, held: Mapping[str, int], load: Load) -> News:
        return await self._ask("beat", front, held, load)

    async def claim(self, front: str, name: str, *, is_new: bool = False) -> int | None:
        return await self._ask("claim", front, name, is_new=is_new)

    async def release(self, name: str, number: int) -> None:
        await self._ask("release", name, number)

    async def cancel(self, name: str) -> bool:
        return await self._ask("cancel", name)

    async def begin(self, front: str, client: str, *, per_minute: int, concurrent: int) -> float:
        return await self._ask("begin", front, client, per_minute=per_minute, concurrent=concurrent)

    async def end(self, front: str, client: str) -> None:
        await self._ask("end", front, client)

    async def read(self, name: str, start: int) -> Part | None:
        return await self._ask("read", name, start)

    async def tell(self, name: str, number: int, start: int, events: Sequence[StreamEvent]) -> bool:
        return await self._ask("tell", name, number, start, events)

    async def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """All of it may be asked twice: what the dead one has granted is unknown to the next."""
        for attempt in range(LEDGER_TRIES):
            try:
                async with asyncio.timeout(LEDGER_TIMEOUT_S):
                    return await getattr(self._handle, method).remote(*arguments, **options)
            except (RayActorError, TimeoutError) as failure:  # Serve starts another one
                if attempt == LEDGER_TRIES - 1:
                    raise EngineLost("the fronts' ledger does not answer") from failure
                await asyncio.sleep(LEDGER_PAUSE_S)


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """An error of ours that an engine raised comes out as itself, without Ray's wrapping. Raises EngineLost where its
    process is gone."""
    try:
        yield
    except RayActorError as failure:
        raise EngineLost(f"an engine's process died: {describe(failure)}") from failure
    except RayTaskError as failure:
        if isinstance(failure.cause, MiniGPT5Error):
            raise failure.cause from None
        raise
