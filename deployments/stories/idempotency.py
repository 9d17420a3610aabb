"""The same request, sent again under the same Idempotency-Key, is the same story."""

from __future__ import annotations

import contextlib
import hashlib

from deployments.stories.leases import Leases
from deployments.stories.store_threads import writing
from deployments.stories.story_runner import StoryRunner
from minigpt5.errors import StoryNotFound
from minigpt5.story.state import new_story_id
from minigpt5.types import StoryRequest


class KeyTaken(Exception):
    """An Idempotency-Key that another body was sent with."""


async def start_once(leases: Leases, runner: StoryRunner, request: StoryRequest, *, key: str, digest: str) -> str:
    """Return the id of the story that was begun under an Idempotency-Key; begin it where there is none.

    `digest`: of the request's body. Raises KeyTaken, or as `StoryRunner.start` does."""
    name = hashlib.sha256(f"{request.key}\0{key}".encode()).hexdigest()
    async with leases.wait_for(f"once-{name}") as lease:
        store = lease.store
        if known := await writing(store.load_once, name):
            story_id, digest_of_first = known
            if digest_of_first != digest:
                raise KeyTaken(f"this key has begun {story_id} with another body: send another key")
            with contextlib.suppress(StoryNotFound):  # it was not begun after all, or is deleted
                await writing(store.load, story_id)
                return story_id
        story_id = known[0] if known else new_story_id()
        await writing(store.save_once, name, story_id, digest)
        await runner.start(request, story_id=story_id)
        return story_id
