"""The two engines as stages of a Ray Data pipeline: job -> pages -> pictures.

Between the stages a row is a page; a last row with page 0 closes its story. Each class is one actor with one engine;
several rows are in it at once, each on a thread of its own, and the engine batches them as it does for a server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from batch_jobs.inputs import StoryJob
from minigpt5.errors import InvalidRequest
from minigpt5.flow import describe, page_seed
from minigpt5.types import (
    DecoderEvent,
    DrawRequest,
    DrawSettings,
    GeneratorEvent,
    Picture,
    Sampling,
    StoryRequest,
    TextDelta,
    Vokens,
)
from minigpt5.voken_file import pack, unpack

CLOSING_PAGE = 0
Row = dict[str, Any]
"""A row of PAGE_SCHEMA; what is left out is null."""
T = TypeVar("T")


class Generator(Protocol):
    """The face of minigpt5.generator.VokenGenerator."""

    def check(self, request: StoryRequest) -> None: ...
    def generate(self, request: StoryRequest) -> AsyncIterator[GeneratorEvent]: ...


class Decoder(Protocol):
    """The face of minigpt5.decoder.DiffusionDecoder."""

    def decode(self, request: DrawRequest) -> AsyncIterator[DecoderEvent]: ...


PAGE_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "page": pa.int32(),
        "text": pa.string(),
        "vokens": pa.binary(),
        "png": pa.binary(),
        "seed": pa.int64(),  # of the page's picture
        "steps": pa.int32(),
        "guidance_scale": pa.float64(),
        "num_pages": pa.int32(),  # of the story that is closed: pages that were written
        "error": pa.string(),
        "seconds": pa.float64(),  # what an engine worked on this row
    }
)


class Write:
    """Jobs -> pages with their vokens, each sent on as soon as it is written."""

    def __init__(self, load_engine: Callable[[], Generator], sampling: Sampling) -> None:
        self.engine, self.sampling = load_engine(), sampling

    def __call__(self, jobs: pa.Table) -> Iterator[pa.Table]:
        for job in jobs.to_pylist():
            for row in self.write(StoryJob(**job)):
                yield pa.Table.from_pylist([row], schema=PAGE_SCHEMA)

    def write(self, job: StoryJob) -> Iterator[Row]:
        """The pages of one story and its closing row. A story that fails keeps the pages that it has."""
        common = {"id": job.id, "steps": job.steps, "guidance_scale": job.guidance_scale}
        request = StoryRequest(prompt=(job.prompt,), pages=job.pages, seed=job.seed, sampling=self.sampling)
        num_pages, error, text = 0, None, ""
        started = time.monotonic()
        try:
            self.engine.check(request)
            for event in drain(self.engine.generate(request)):
                if isinstance(event, TextDelta):
                    text += event.text
                elif isinstance(event, Vokens):
                    seed = page_seed(job.seed, event.page)
                    yield {**common, "page": event.page, "text": text.strip(), "vokens": pack(event), "seed": seed}
                    num_pages, text = num_pages + 1, ""
        except InvalidRequest as refusal:
            error = str(refusal)
        except Exception as failure:  # one story fails, the others go on
            error = f"writing failed: {describe(failure)}"
        seconds = time.monotonic() - started
        yield {**common, "page": CLOSING_PAGE, "num_pages": num_pages, "error": error, "seconds": seconds}


class Draw:
    """Pages with vokens -> pages with pictures; closing rows pass."""

    def __init__(self, load_engine: Callable[[], Decoder], scheduler: str) -> None:
        self.engine, self.scheduler = load_engine(), scheduler

    def __call__(self, pages: pa.Table) -> Iterator[pa.Table]:
        for row in pages.to_pylist():
            finished = row if row["page"] == CLOSING_PAGE else self.draw(row)
            yield pa.Table.from_pylist([finished], schema=PAGE_SCHEMA)

    def draw(self, page: Row) -> Row:
        """One page with its picture, or with the reason why it has none."""
        settings = DrawSettings(steps=page["steps"], guidance_scale=page["guidance_scale"], scheduler=self.scheduler)
        png, error = None, None
        started = time.monotonic()
        try:
            request = DrawRequest(
                vokens=unpack(page["vokens"], page=page["page"]), seed=page["seed"], settings=settings
            )
            for event in drain(self.engine.decode(request)):
                if isinstance(event, Picture):
                    png = event.png
        except Exception as failure:  # one picture fails, the others go on
            error = describe(failure)
        return {**page, "png": png, "error": error, "seconds": time.monotonic() - started}


def drain(events: AsyncIterator[T]) -> Iterator[T]:
    """An engine's stream on this thread. Ray Data would collect an asynchronous generator to its end before it passes
    anything on; from a plain one each row goes its way at once."""

    async def step() -> T | None:
        return await anext(events, None)

    with asyncio.Runner() as runner:
        while (event := runner.run(step())) is not None:
            yield event
