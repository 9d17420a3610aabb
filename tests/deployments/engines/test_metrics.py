"""What is recorded of pictures; and two generators on a real Ray: calls of one story go to the one that has its
beginning, and the metrics say so."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from deployments.application import AppArgs, app
from deployments.engines.metrics import observe_picture
from deployments.observability.metrics import (
    DRAWN_PICTURES,
    PAGE_STAGE,
    PENDING_TOKENS,
    PROMPT_TOKENS,
    REUSED_PROMPT_TOKENS,
    RUNNING_REQUESTS,
    Metric,
)
from minigpt5.config import default_model_folder
from minigpt5.errors import Blocked, FingerprintMismatch, InvalidRequest
from minigpt5.types import DecoderEvent, Page, Picture, Progress, Sampling, StoryRequest, TextDelta, Vokens

MODEL = default_model_folder()
METRICS_PORT = 18397
PROMPTS = ("A fox", "The owl", "One bear", "Two cats", "Our dog", "Some lion")
"""Stories that have nothing in common but how every prompt begins."""
ROUNDS = 4
"""Rounds. Each run assigns stories to generators at random: one in thirty has all six at one of them."""
ROUND_S = 30


def test_where_a_pictures_time_goes() -> None:
    seen: list[tuple[Any, ...]] = []

    async def events() -> AsyncGenerator[DecoderEvent, None]:
        yield Progress(page=1, step=1, steps=3)
        yield Progress(page=1, step=3, steps=3)
        yield Picture(page=1, png=b"", width=1, height=1, seed=0, denoise_steps=3)

    now = iter([0.0, 2.0, 5.0, 6.5])
    observe(events(), seen, clock=lambda: next(now))
    assert seen == [
        (PAGE_STAGE, 2.0, "queue"),
        (PAGE_STAGE, 3.0, "denoise"),
        (PAGE_STAGE, 1.5, "encode"),
        (DRAWN_PICTURES, 1, "drawn"),
    ]


def test_a_picture_of_the_cache_has_no_stages() -> None:
    seen: list[tuple[Any, ...]] = []

    async def events() -> AsyncGenerator[DecoderEvent, None]:
        yield Picture(page=1, png=b"", width=1, height=1, seed=0, denoise_steps=3)

    observe(events(), seen)
    assert seen == [(DRAWN_PICTURES, 1, "cached")]


@pytest.mark.parametrize(
    ("failure", "results"),
    [
        (Blocked("nude"), ["blocked"]),
        (RuntimeError("no memory"), ["failed"]),
        (FingerprintMismatch("of another model"), []),  # an upgrade: it is asked for again every second
        (InvalidRequest("steps", "steps is 0"), []),
    ],
)
def test_a_picture_that_is_not_drawn_is_counted_by_its_reason(failure: Exception, results: list[str]) -> None:
    seen: list[tuple[Any, ...]] = []

    async def events() -> AsyncGenerator[DecoderEvent, None]:
        raise failure
        yield

    with pytest.raises(type(failure)):
        observe(events(), seen)
    assert seen == [(DRAWN_PICTURES, 1, result) for result in results]


def observe(events: AsyncIterator[DecoderEvent], seen: list[tuple[Any, ...]], **options: Any) -> None:
    """Collect what is recorded of a picture: metric, value, and the values of its labels."""

    def record(metric: Metric, value: float, /, **labels: str) -> None:
        seen.append((metric, value, *labels.values()))

    async def main() -> None:
        async for _ in observe_picture(events, record=record, **options):
            pass

    asyncio.run(main())


@pytest.fixture
def generators() -> Iterator[serve.handle.DeploymentHandle]:
    """The application with two generators; a handle of them."""
    ray.init(address="local", num_cpus=2, log_to_driver=False, logging_level="ERROR", _metrics_export_port=METRICS_PORT)
    try:
        args = AppArgs(model=str(MODEL), generator_min_replicas=2, generator_num_cpus=0.4)
        serve.start(proxy_location="Disabled")
        serve.run(app(args), name="default", route_prefix="/")
        yield serve.get_deployment_handle("VokenGenerator", "default")
    finally:
        serve.shutdown()
        ray.shutdown()


def read_counters() -> dict[tuple[str, str], float]:
    """(metric, replica) -> value."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://127.0.0.1:{METRICS_PORT}", timeout=10) as reply:
        text = reply.read().decode()
    found = {}
    for line in text.splitlines():
        match = re.match(r"ray_(minigpt5_\w+)\{.*?replica=\"([^\"]+)\".*\} (\S+)$", line)
        if match:
            found[match[1], match[2]] = float(match[3])
    return found


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason=f"no model is shipped in {MODEL}")
def test_calls_of_one_story_go_to_the_generator_that_has_its_beginning(
    generators: serve.handle.DeploymentHandle, tmp_path: Path
) -> None:
    async def write_page(story: StoryRequest) -> str:
        text = ""
        events = generators.options(stream=True, session_id=story.session).generate.remote(story)
        async for event in events:
            if isinstance(event, TextDelta):
                text += event.text
            elif isinstance(event, Vokens):
                break
        events.cancel()
        return text

    async def write_page_by_page(index: int, session: str) -> None:
        """Make as many calls as pages: all but the first bring the pages that are written already."""
        pages: tuple[Page, ...] = ()
        for number in range(1, 4):
            story = StoryRequest(
                prompt=(f"{PROMPTS[index]} who finds a red balloon in the forest and carries it home",),
                pages=4 - len(pages),
                seed=index,
                previous=pages,
                session=session,
                sampling=Sampling(max_page_tokens=12),
            )
            pages = (*pages, Page(index=number, text=(await write_page(story)).strip()))
        assert sum(len(page.text) for page in pages[:2])

    async def write_all(number: int) -> None:
        for index in range(len(PROMPTS)):
            await write_page_by_page(index, f"story_{number}_{index}")

    for number in range(ROUNDS):
        asyncio.run(write_all(number))
        deadline = time.monotonic() + ROUND_S
        while time.monotonic() < deadline:
            counters = read_counters()
            prompts = {who: value for (name, who), value in counters.items() if name == PROMPT_TOKENS.name}
            reused = {who: value for (name, who), value in counters.items() if name == REUSED_PROMPT_TOKENS.name}
            in_flight = [value for (name, _), value in counters.items() if name == RUNNING_REQUESTS.name]
            if len(prompts) == 2 and len(reused) == 2 and not any(in_flight):
                break
            time.sleep(1)
        else:
            continue
        break
    else:
        pytest.fail(f"both generators were to be called: {prompts}, {reused}")
    assert {RUNNING_REQUESTS.name, PENDING_TOKENS.name} <= {name for name, _ in counters}
    # Of a story's three calls the second and the third find all but their last page; at the wrong one, next to nothing.
    assert sum(reused.values()) / sum(prompts.values()) > 0.6, (prompts, reused)
