"""Old stories go, where an operator says how many may stay: by age, by bytes, or both. None goes without being told.
Pictures outside of stories go after an hour, Idempotency-Keys after a day. The index of owners is kept right."""

from __future__ import annotations

import asyncio
import logging
import time

from deployments.stories.leases import Leases, StoryBusy
from deployments.stories.store_threads import writing
from minigpt5.errors import StoryNotFound, StoryTaken
from minigpt5.story.store import StoryStore

logger = logging.getLogger("ray.serve")

LOOK_S = 600.0
IMAGE_S = 3600.0
"""A picture outside of any story stays under its URL for this long."""
ONCE_S = 86400.0
"""An Idempotency-Key is known for this long."""


async def keep_within(store: StoryStore, leases: Leases, *, max_age_s: float | None, max_bytes: float | None) -> None:
    """Look now and then, without end."""
    while True:
        try:
            await writing(store.index_owners)
            await writing(store.delete_images, older_than_s=IMAGE_S)
            await writing(store.delete_once, older_than_s=ONCE_S)
            if max_age_s is not None or max_bytes is not None:
                await remove_old(store, leases, max_age_s=max_age_s, max_bytes=max_bytes)
        except Exception as failure:  # of a store or a ledger that answers again later, or of one story
            logger.error("old stories stay for now: %s", failure.__cause__ or failure)
        await asyncio.sleep(LOOK_S)


async def remove_old(
    store: StoryStore, leases: Leases, *, max_age_s: float | None, max_bytes: float | None
) -> list[str]:
    """Remove stories that have ended, oldest first, until the rest fits; returns their ids. Those under way stay."""
    removed: list[str] = []
    sizes = await writing(store.sizes)
    total = sum(sizes.values())
    for story_id in sorted(sizes):
        try:
            state = await writing(store.load, story_id)
            is_old = max_age_s is not None and time.time() - state.created > max_age_s
            is_too_much = max_bytes is not None and total > max_bytes
            if state.status == "drawing" or not (is_old or is_too_much):
                continue
            async with leases.exclusive(story_id) as lease:
                if await writing(store.load_status, story_id) == "drawing":  # somebody has added to it meanwhile
                    continue
                await writing(lease.store.delete, story_id)
        except (StoryBusy, StoryNotFound, StoryTaken):
            continue
        total -= sizes[story_id]
        removed.append(story_id)
        logger.info(
            "%s is removed: %s", story_id, "its age" if is_old else "the room for stories", extra={"story_id": story_id}
        )
    return removed
