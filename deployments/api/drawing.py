"""One picture of vokens, outside of a story."""

from __future__ import annotations

import contextlib
import dataclasses

from deployments.api.front import Front
from deployments.engines.handover import ReadAgain, draw_across_models
from deployments.stories.admission import Reservation
from minigpt5.types import DrawRequest, Page, Picture, StoryRequest


async def draw_alone(front: Front, request: DrawRequest, read_again: ReadAgain | None = None) -> Picture:
    """With a place of its own. Raises Overloaded, or what the decoder does."""
    # What admission is told of: one picture, and no text.
    story = StoryRequest(prompt=("",), pages=1, mode="caption", draw=request.settings, key=request.key)
    if request.reference:
        story = dataclasses.replace(story, previous=(Page(index=1, text=""),), consistency="story")
    with front.admission.reserve(story) as reservation:
        reservation.observe(request.vokens)  # they are there: the generator has nothing to do
        return await draw(front, reservation, request, read_again)


async def draw(
    front: Front,
    reservation: Reservation,
    request: DrawRequest,
    read_again: ReadAgain | None = None,
    *,
    picture: int = 0,
) -> Picture:
    """Draw in a place that was taken. Cancelling the caller cancels the drawing. `read_again`: see
    draw_across_models; without it vokens of another model are refused. `picture`: which one of the vokens, where
    several are drawn at once."""
    decode = front.engines.decode
    drawing = draw_across_models(front.engines, request, read_again) if read_again else decode(request)
    async with contextlib.aclosing(drawing) as events:
        async for event in events:
            reservation.observe(event, picture=picture)
            if isinstance(event, Picture):
                return event
    raise AssertionError("the decoder ended without a picture")
