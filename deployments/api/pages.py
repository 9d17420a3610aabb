"""What can be done with the pages of a stored story: more of them, another text, another picture."""

from __future__ import annotations

import dataclasses
import itertools

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from deployments.api.drawing import draw_alone
from deployments.api.errors import ApiError
from deployments.api.front import ClientOf, Front, FrontOf, check_owner, check_texts, note_story
from deployments.api.replies import BEGUN, answer, failure_reply, reply
from deployments.engines.handover import read_page
from deployments.schemas import AddPages, ChangePage, PageReply, Redraw, StoryReply, page_reply, redrawn
from deployments.stories.store_threads import reading, writing
from deployments.stories.uninterrupted import uninterrupted
from minigpt5.errors import InvalidRequest, StoryNotFound
from minigpt5.story.characters import shown_on
from minigpt5.story.state import PageState, StoryState, image_state
from minigpt5.story.stream import page_seed
from minigpt5.types import MAX_PAGES, DrawRequest, InputImage, Reference, StoryRequest, Vokens

MAX_VARIANTS = 16
"""Pictures of one page."""

pages = APIRouter(dependencies=[Depends(note_story), Depends(check_owner)])


@pages.post("/v1/stories/{story_id}/pages", status_code=201, response_model=StoryReply, responses=BEGUN)
async def add_pages(story_id: str, body: AddPages, front: FrontOf, client: ClientOf) -> Response:
    """Add `count` pages to a story, after those that are complete."""

    async def begin() -> str:
        async with front.leases.exclusive(story_id) as lease:
            state = await reading(front.store.load, story_id)
            request = await reading(front.store.load_request, story_id)
            num_complete = len(_complete(state))
            if num_complete + body.count > MAX_PAGES:
                raise InvalidRequest(
                    "count", f"count is {body.count} but the story has {num_complete} pages and may have {MAX_PAGES}"
                )
            request = front.config.resumable(request)
            request = dataclasses.replace(request, pages=num_complete + body.count, key=client)
            return (await front.runner.resume(state, request, lease)).id

    return await answer(front, begin, stream=body.stream, wait=body.wait)


@pages.patch("/v1/stories/{story_id}/pages/{page:int}", response_model=PageReply, response_model_exclude_none=True)
async def change_page(story_id: str, page: int, body: ChangePage, front: FrontOf, client: ClientOf) -> Response:
    """Edit a page's text: the model reads new vokens from it and draws a new picture; later pages stay. Or choose one
    of its pictures."""
    async with front.leases.exclusive(story_id) as lease:
        old = await reading(front.store.load_page, story_id, page)
        if body.variant is not None:
            chosen = _choose(old, body.variant)
            await uninterrupted(writing(lease.store.save_page, story_id, chosen))
            return reply(front, page_reply(story_id, chosen))
        state = await reading(front.store.load, story_id)
        request = await reading(front.store.load_request, story_id)
        request = dataclasses.replace(front.config.resumable(request), key=client)
        check_texts(front, [body.text], "text")
        new = PageState(index=page, text=(body.text or "").strip())
        changed = tuple(new if one.index == page else one for one in state.pages)
        state = dataclasses.replace(state, pages=changed)
        if state.status != "done":  # pages that it never came to are not made by the way
            request = dataclasses.replace(request, pages=max(page, len(_complete(state))))
        given = tuple(one.text for one in _complete(state))[: request.pages]
        await front.engines.validate_request(dataclasses.replace(request, given=given))

        def change() -> None:
            # In this order: after a crash the store has either the old page, or the new one without a picture.
            lease.store.forget_drawing(story_id, page)
            lease.store.save_page(story_id, new)

        await front.runner.resume(state, request, lease, change=change)
    await front.relay.wait(story_id)
    state = await reading(front.store.load, story_id)
    if state.status == "failed":
        return failure_reply(state)
    return reply(front, page_reply(story_id, next(one for one in state.pages if one.index == page)))


@pages.post(
    "/v1/stories/{story_id}/pages/{page:int}/redraw",
    status_code=201,
    response_model=PageReply,
    response_model_exclude_none=True,
)
async def redraw_page(story_id: str, page: int, body: Redraw, front: FrontOf, client: ClientOf) -> Response:
    """Draw a page once more, from its stored vokens; the earlier pictures are kept. Where another model made the
    vokens, this one reads the page's text first. A client that goes away stops the work."""
    async with front.leases.exclusive(story_id) as lease:
        old = await reading(front.store.load_page, story_id, page)
        variants = old.variants or ((old.image,) if old.image else ())
        if len(variants) >= MAX_VARIANTS:
            raise ApiError(409, f"page {page} has {len(variants)} pictures and may not have more", code="too_many")
        vokens = await reading(front.store.load_vokens, story_id, page)
        asked = front.config.fitted(await reading(front.store.load_request, story_id))
        seed, draw = redrawn(body, old.image.draw if old.image else asked.draw, front.config)

        async def read_again() -> Vokens:
            nonlocal vokens
            vokens = await _read_again(front, story_id, page, key=client)
            return vokens

        reference, characters = await _company(front, story_id, page, asked)
        request = DrawRequest(
            vokens=vokens, seed=seed, settings=draw, reference=reference, characters=characters, key=client
        )
        picture = await draw_alone(front, request, read_again)
        image = image_state(picture, draw, fingerprint=vokens.fingerprint)
        number = len(variants)
        new = dataclasses.replace(old, image=image, error=None, variants=(*variants, image), variant=number)

        def keep() -> None:
            lease.store.save_vokens(story_id, vokens)
            lease.store.save_picture(story_id, picture, variant=number)
            lease.store.save_page(story_id, new)

        await uninterrupted(writing(keep))
    return reply(front, page_reply(story_id, new), 201)


async def _company(
    front: Front, story_id: str, page: int, request: StoryRequest
) -> tuple[Reference | None, tuple[InputImage, ...]]:
    """What a page is drawn beside, as its story asks: the first page as it is shown, and its characters' pictures."""
    state = await reading(front.store.load, story_id)
    texts = [one.text for one in state.pages if one.index <= page]
    characters = shown_on(texts, request.characters)
    if page == 1 or request.consistency != "story":
        return None, characters
    try:
        vokens = await reading(front.store.load_vokens, story_id, 1)
    except StoryNotFound:  # an edit of the first page failed
        return None, characters
    image = state.pages[0].image
    reference = Reference(
        vokens=vokens,
        seed=image.seed if image else page_seed(request.seed, 1),
        characters=shown_on(texts[:1], request.characters),
    )
    return reference, characters


async def _read_again(front: Front, story_id: str, page: int, *, key: str) -> Vokens:
    """A page's vokens by the generator that is there now."""
    state = await reading(front.store.load, story_id)
    request = await reading(front.store.load_request, story_id)
    num_later = max(0, request.pages - page)
    request = dataclasses.replace(request, pages=page, num_later=num_later, key=key, session=story_id)
    return await read_page(front.engines, request, tuple(one.text for one in _complete(state))[:page])


def _complete(state: StoryState) -> list[PageState]:
    """The first pages, as far as they have their texts."""
    return list(itertools.takewhile(lambda page: page.is_written and page.text, state.pages))


def _choose(page: PageState, variant: int) -> PageState:
    variants = page.variants or ((page.image,) if page.image else ())
    if variant >= len(variants):
        raise InvalidRequest("variant", f"variant is {variant} but page {page.index} has {len(variants)} pictures")
    return dataclasses.replace(page, image=variants[variant], variant=variant)
