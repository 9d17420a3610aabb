"""The two engines as stages of a Ray Data pipeline: job -> pages -> pictures.

Between the stages a row is a page; a last row with page 0 closes its story. Each class is one actor with one engine;
several rows are in it at once, each on a thread of its own, and the engine batches them as it does for a server.
What a stage makes is stored before its row goes on, and what is stored is not made again: so a stage may be asked for
the same row again at any time, after a death as after a new start of the job.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from collections.abc import Generator as Generates
from dataclasses import asdict, fields, replace
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from batch_jobs.failpoints import FailpointHook, no_failpoint
from batch_jobs.inputs import ImageJob, StoryJob, load_image
from batch_jobs.monitor import Seat, Watch, check_deaths
from batch_jobs.row_errors import ErrorKind, RowOutcome
from batch_jobs.state import PageStore, StoredPage
from minigpt5.errors import StorageError
from minigpt5.story.stream import page_seed
from minigpt5.story.voken_file import pack, unpack
from minigpt5.types import (
    DecoderEvent,
    DrawRequest,
    DrawSettings,
    GeneratorEvent,
    InputImage,
    Page,
    Picture,
    Progress,
    Reference,
    Sampling,
    StoryRequest,
    TextDelta,
    Vokens,
)

CLOSING_PAGE = 0
Row = dict[str, Any]
"""A row of PAGE_SCHEMA; what is left out is null."""
T = TypeVar("T")
J = TypeVar("J", StoryJob, ImageJob)


class Generator(Protocol):
    """The face of minigpt5.engine.generator.VokenGenerator."""

    def validate_request(self, request: StoryRequest) -> None: ...
    def generate(self, request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]: ...


class Decoder(Protocol):
    """The face of minigpt5.engine.decoder.DiffusionDecoder."""

    def decode(self, request: DrawRequest) -> AsyncGenerator[DecoderEvent, None]: ...


PAGE_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "page": pa.int32(),
        "text": pa.string(),
        "vokens": pa.binary(),
        "has_picture": pa.bool_(),  # it is stored, under the page's id and number
        "seed": pa.int64(),  # of the page's picture
        "steps": pa.int32(),
        "guidance_scale": pa.float64(),
        "scheduler": pa.string(),
        "width": pa.int32(),  # as in DrawSettings
        "height": pa.int32(),
        "style": pa.string(),
        "reference": pa.binary(),  # vokens of the page that this one attends to, and the seed of its picture
        "reference_seed": pa.int64(),
        "num_pages": pa.int32(),  # of the story that is closed: pages that were written
        "error": pa.string(),
        "kind": pa.string(),  # of the error
        "seconds": pa.float64(),  # what an engine worked on this row
    }
)
DRAW_COLUMNS = tuple(field.name for field in fields(DrawSettings))
"""Columns of a page that say how its picture is drawn."""
CAPTION_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "image": pa.string(),  # its place; null where the row brought the picture itself
        "question": pa.string(),
        "caption": pa.string(),
        "error": pa.string(),
        "kind": pa.string(),
        "seconds": pa.float64(),
    }
)


def as_table(jobs: list[StoryJob] | list[ImageJob]) -> pa.Table:
    """Jobs as they enter a pipeline, in JSON; `jobs_of` is the inverse, but for bytes, which become data URLs."""

    def to_url(data: bytes) -> str:
        return "data:;base64," + base64.b64encode(data).decode()

    return pa.table({"job": [json.dumps(asdict(job), default=to_url) for job in jobs]})


def jobs_of(table: pa.Table, kind: type[J]) -> Iterator[J]:
    for job in table["job"].to_pylist():
        values: dict[str, Any] = json.loads(job)
        for name, value in values.items():
            values[name] = tuple(value) if isinstance(value, list) else value
        yield kind(**values)


class Write:
    """Jobs -> pages with their vokens, each stored and sent on as soon as it is written."""

    def __init__(
        self,
        load_engine: Callable[[], Generator],
        sampling: Sampling,
        *,
        store: PageStore,
        watch: Watch,
        get_engine_id: Callable[[], str] = lambda: secrets.token_hex(4),
        failpoint: FailpointHook = no_failpoint,
    ) -> None:
        self.sampling, self.store, self.failpoint = sampling, store, failpoint
        self.seat = Seat("generator", load_engine, watch, engine_id=get_engine_id())

    def __call__(self, jobs: pa.Table) -> Iterator[pa.Table]:
        for job in jobs_of(jobs, StoryJob):
            for row in self.write(job):
                yield pa.Table.from_pylist([row], schema=PAGE_SCHEMA)

    def write(self, job: StoryJob) -> Iterator[Row]:
        """The pages of one story and its closing row. A story that fails keeps the pages that it has."""
        common = {"id": job.id, **{name: getattr(job, name) for name in DRAW_COLUMNS}}
        outcome = RowOutcome(ErrorKind.WRITING, deaths=ErrorKind.GENERATOR_DEATHS)
        started = time.monotonic()
        stored: list[StoredPage] = []
        try:
            stored = self.store.load_texts(job.id)
        except StorageError as failure:
            outcome.note(failure)
        num_stored, first = len(stored), stored[0] if stored else None
        for page, known in enumerate(stored, start=1):
            yield {**common, **_page_row(job, page, known, first)}
        if outcome.error is None and num_stored < job.pages:
            if num_stored:
                self.failpoint("recovering")
            with self.seat.row(job.id) as num_deaths, outcome.noted():
                check_deaths(num_deaths)
                for known in self._new_pages(job, stored):
                    self.store.save_text(job.id, num_stored + 1, known)
                    num_stored, first = num_stored + 1, first or known
                    self.failpoint("text-written")
                    yield {**common, **_page_row(job, num_stored, known, first)}
        yield {
            **common,
            "page": CLOSING_PAGE,
            "num_pages": num_stored,
            **outcome.columns,
            "seconds": time.monotonic() - started,
        }

    def _new_pages(self, job: StoryJob, stored: list[StoredPage]) -> Iterator[StoredPage]:
        """The pages after those that are stored. A story that broke off is written once more from its begin, which
        gives the same words; should they differ from what is stored, the stored ones are gone on from instead."""
        images = tuple(InputImage(data=load_image(image)) for image in job.images)
        request = StoryRequest(
            prompt=(*images, job.prompt), pages=job.pages, seed=job.seed, sampling=self.sampling, given=job.texts
        )
        if not stored or not job.texts:
            is_alike = True
            with contextlib.closing(self._pages_of(request)) as pages:
                for index, page in enumerate(pages):
                    if index >= len(stored):
                        yield page
                    elif page.text != stored[index].text:
                        is_alike = False
                        break
            if is_alike:
                return
        previous = tuple(Page(index=index, text=page.text) for index, page in enumerate(stored, start=1))
        num_left = job.pages - len(stored)
        yield from self._pages_of(replace(request, previous=previous, pages=num_left, given=job.texts[len(stored) :]))

    def _pages_of(self, request: StoryRequest) -> Generates[StoredPage, None, None]:
        self.seat.engine.validate_request(request)
        self.failpoint("before-text")
        text, num_pages = "", 0
        with contextlib.closing(drain(self.seat.engine.generate(request))) as events:
            for event in events:
                if isinstance(event, TextDelta):
                    text += event.text
                    if num_pages:
                        self.failpoint("mid-text")
                elif isinstance(event, Vokens):
                    given = request.given[num_pages : num_pages + 1]
                    yield StoredPage(text=given[0] if given else text.strip(), vokens=pack(event))
                    num_pages, text = num_pages + 1, ""


def _page_row(job: StoryJob, page: int, stored: StoredPage, first: StoredPage | None) -> Row:
    reference = first if job.consistency == "story" and page > 1 else None
    return {
        "page": page,
        "text": stored.text,
        "vokens": stored.vokens,
        "seed": page_seed(job.seed, page),
        "reference": reference and reference.vokens,
        "reference_seed": page_seed(job.seed, 1) if reference else None,
    }


class Draw:
    """Pages with vokens -> pages with stored pictures; closing rows pass."""

    def __init__(
        self,
        load_engine: Callable[[], Decoder],
        *,
        store: PageStore,
        watch: Watch,
        get_engine_id: Callable[[], str] = lambda: secrets.token_hex(4),
        failpoint: FailpointHook = no_failpoint,
    ) -> None:
        self.store, self.failpoint = store, failpoint
        self.seat = Seat("decoder", load_engine, watch, engine_id=get_engine_id())

    def __call__(self, pages: pa.Table) -> Iterator[pa.Table]:
        for row in pages.to_pylist():
            finished = row if row["page"] == CLOSING_PAGE else self.draw(row)
            yield pa.Table.from_pylist([finished], schema=PAGE_SCHEMA)

    def draw(self, page: Row) -> Row:
        """One page whose picture is stored, or with the reason why it has none."""
        outcome = RowOutcome(
            ErrorKind.DRAWING, deaths=ErrorKind.DECODER_DEATHS, refused=ErrorKind.DRAWING, says_what=False
        )
        started = time.monotonic()
        try:
            if self.store.has_picture(page["id"], page["page"]):
                return {**page, "has_picture": True, "seconds": 0.0}
        except StorageError as failure:
            outcome.note(failure)
            return {**page, "has_picture": False, **outcome.columns, "seconds": 0.0}
        with self.seat.row(f"{page['id']}/{page['page']}") as num_deaths, outcome.noted():
            check_deaths(num_deaths)
            self.store.save_picture(page["id"], page["page"], self._draw(page))
            self.failpoint("picture-written")
        seconds = time.monotonic() - started
        return {**page, "has_picture": outcome.error is None, **outcome.columns, "seconds": seconds}

    def _draw(self, page: Row) -> bytes:
        settings = DrawSettings(**{name: page[name] for name in DRAW_COLUMNS})
        vokens, reference, png = unpack(page["vokens"], page=page["page"]), None, b""
        if page["reference"] is not None:
            reference = Reference(vokens=unpack(page["reference"], page=1), seed=page["reference_seed"])
        request = DrawRequest(vokens=vokens, seed=page["seed"], settings=settings, reference=reference)
        for event in drain(self.seat.engine.decode(request)):
            if isinstance(event, Progress):
                self.failpoint("mid-picture")
            elif isinstance(event, Picture):
                png = event.png
        return png


class Tell:
    """Pictures -> what the model says of them."""

    def __init__(
        self,
        load_engine: Callable[[], Generator],
        sampling: Sampling,
        *,
        watch: Watch,
        get_engine_id: Callable[[], str] = lambda: secrets.token_hex(4),
    ) -> None:
        self.sampling = replace(sampling, temperature=0.0)
        self.seat = Seat("generator", load_engine, watch, engine_id=get_engine_id())

    def __call__(self, jobs: pa.Table) -> Iterator[pa.Table]:
        for job in jobs_of(jobs, ImageJob):
            yield pa.Table.from_pylist([self.tell(job)], schema=CAPTION_SCHEMA)

    def tell(self, job: ImageJob) -> Row:
        """One picture's caption, or the reason why it has none."""
        caption = None
        outcome = RowOutcome(ErrorKind.DESCRIBING, deaths=ErrorKind.GENERATOR_DEATHS)
        started = time.monotonic()
        with self.seat.row(job.id) as num_deaths, outcome.noted():
            check_deaths(num_deaths)
            request = StoryRequest(
                prompt=(InputImage(data=load_image(job.image)), job.question),
                pages=1,
                sampling=self.sampling,
                mode="reply",
                pictures="none",
            )
            self.seat.engine.validate_request(request)
            events = drain(self.seat.engine.generate(request))
            caption = "".join(event.text for event in events if isinstance(event, TextDelta)).strip()
        return {
            "id": job.id,
            "image": place_of(job.image),
            "question": job.question,
            "caption": caption,
            **outcome.columns,
            "seconds": time.monotonic() - started,
        }


def place_of(image: str | bytes) -> str | None:
    """Where a picture lies, where it is not in the row itself."""
    return image if isinstance(image, str) and not image.startswith("data:") else None


def drain(events: AsyncIterator[T]) -> Generates[T, None, None]:
    """An engine's stream on this thread. Ray Data would collect an asynchronous generator to its end before it passes
    anything on; from a plain one each row goes its way at once."""

    async def step() -> T | None:
        return await anext(events, None)

    with asyncio.Runner() as runner:
        while (event := runner.run(step())) is not None:
            yield event
