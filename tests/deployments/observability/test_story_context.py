"""The ids of a story and its request are in each log record, and in no other story's."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Iterator

import pytest

from deployments.observability.story_context import (
    add_ids_to_log,
    current_request,
    current_story,
    enter_request,
    enter_story,
    story_context,
)

logger = logging.getLogger("ray.serve")


@pytest.fixture(autouse=True)
def ids_in_the_log() -> Iterator[None]:
    before = list(logger.filters)
    add_ids_to_log()
    yield
    logger.filters[:] = before


def ids(record: logging.LogRecord) -> tuple[str, str]:
    return getattr(record, "story_id", ""), getattr(record, "request_id", "")


def test_a_storys_task_keeps_the_request_that_began_it(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        await asyncio.sleep(0)
        logger.info("from the story")

    async def request(name: str) -> None:
        enter_request(f"req_{name}")
        task = asyncio.create_task(story(), context=story_context(f"story_{name}"))
        logger.info("from the request")
        await task

    async def main() -> None:
        await asyncio.gather(request("a"), request("b"))

    with caplog.at_level(logging.INFO, logger="ray.serve"):
        asyncio.run(main())
    told = [(record.message, *ids(record)) for record in caplog.records]
    assert sorted(told) == [
        ("from the request", "", "req_a"),
        ("from the request", "", "req_b"),
        ("from the story", "story_a", "req_a"),
        ("from the story", "story_b", "req_b"),
    ]


def test_a_session_that_a_client_names_is_no_story() -> None:
    def run() -> None:
        enter_story("what a client has sent")
        enter_request("req_1")
        assert (current_story(), current_request()) == ("", "req_1")

    contextvars.Context().run(run)


def test_a_story_without_a_request_has_an_id_of_its_own() -> None:
    context = contextvars.Context().run(story_context, "story_1")
    assert context.run(current_story) == "story_1"
    assert context.run(current_request).startswith("req_")
