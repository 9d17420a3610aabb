"""Two generators on a real Ray: calls of one story go to the one that has its beginning, and the metrics say so."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray import serve

from deployments.application import AppArgs, app
from deployments.engines.metrics import StoryTimes
from minigpt5.config import default_model_folder
from minigpt5.types import Page, Picture, Sampling, SlotOpened, StoryEvent, StoryRequest, TextDelta, Vokens

MODEL = default_model_folder()
METRICS_PORT = 18397
PROMPTS = ("A fox", "The owl", "One bear", "Two cats", "Our dog", "Some lion")
"""Stories that have nothing in common but how every prompt begins."""
ROUNDS = 4
"""Rounds. Each run assigns stories to generators at random: one in thirty has all six at one of them."""
ROUND_S = 30


def test_a_story_is_timed_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    times = StoryTimes()
    seen: list[tuple[str, float]] = []
    for name in ("first_text", "first_picture", "page"):
        monkeypatch.setattr(
            getattr(times, name),
            "observe",
            lambda value, tags=None, name=name: seen.append((tags["stage"] if tags else name, value)),
        )
    now = iter([0.0, 1.0, 2.0, 4.0, 7.0, 9.0, 10.0])
    clock = times.start(lambda: next(now))
    picture = Picture(page=1, png=b"", width=1, height=1, seed=0, denoise_steps=1)
    events: list[StoryEvent] = [TextDelta(page=1, text="a"), TextDelta(page=1, text="b"), SlotOpened(page=1), picture]
    for event in events:
        clock.observe(event)
    assert seen == [("first_text", 1.0), ("text", 4.0), ("first_picture", 7.0), ("picture", 3.0)]


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
        match = re.match(r"ray_(minigpt5_\w+?)(?:_total)?\{.*?replica=\"([^\"]+)\".*\} (\S+)$", line)
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
            prompts = {who: value for (name, who), value in counters.items() if name == "minigpt5_prompt_tokens"}
            reused = {who: value for (name, who), value in counters.items() if name == "minigpt5_prompt_tokens_reused"}
            in_flight = [value for (name, _), value in counters.items() if name == "minigpt5_requests_in_flight"]
            if len(prompts) == 2 and len(reused) == 2 and not any(in_flight):
                break
            time.sleep(1)
        else:
            continue
        break
    else:
        pytest.fail(f"both generators were to be called: {prompts}, {reused}")
    assert {"minigpt5_requests_in_flight", "minigpt5_queue_cost"} <= {name for name, _ in counters}
    # Of a story's three calls the second and the third find all but their last page; at the wrong one, next to nothing.
    assert sum(reused.values()) / sum(prompts.values()) > 0.6, (prompts, reused)
