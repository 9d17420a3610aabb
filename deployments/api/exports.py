"""A stored story as a book: HTML to read or print, EPUB for readers, PDF for paper; and links to it for who has no
key."""

from __future__ import annotations

import time

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from deployments.api.errors import document
from deployments.api.front import Front, FrontOf, check_owner
from deployments.schemas import ShareReply, ShareStory
from deployments.stories.store_threads import reading
from minigpt5.story.export.epub import MIMETYPE
from minigpt5.story.export.html import to_book

exports = APIRouter(dependencies=[Depends(check_owner)])


@exports.get(
    "/v1/stories/{story_id}.html",
    response_class=Response,
    responses=document("text/html", "A book", is_binary=False),
)
async def get_html(story_id: str, front: FrontOf) -> Response:
    """One self-contained file."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox"
    return Response(
        await _book(front, story_id, ".html"), media_type="text/html", headers={"Content-Security-Policy": policy}
    )


@exports.get("/v1/stories/{story_id}.epub", response_class=Response, responses=document(MIMETYPE, "A book"))
async def get_epub(story_id: str, front: FrontOf) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{story_id}.epub"'}
    return Response(await _book(front, story_id, ".epub"), media_type=MIMETYPE, headers=headers)


@exports.get("/v1/stories/{story_id}.pdf", response_class=Response, responses=document("application/pdf", "A book"))
async def get_pdf(story_id: str, front: FrontOf) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{story_id}.pdf"'}
    return Response(await _book(front, story_id, ".pdf"), media_type="application/pdf", headers=headers)


async def _book(front: Front, story_id: str, suffix: str) -> bytes:
    return await reading(lambda: to_book(front.store.load_story(story_id), suffix))


@exports.post("/v1/stories/{story_id}/share", response_model=ShareReply)
async def share_story(story_id: str, body: ShareStory, front: FrontOf) -> ShareReply:
    """Links to the book that need no key, until they expire."""
    await reading(front.store.load, story_id)
    expires = int(time.time()) + body.expires_s
    links = [front.public_url(f"/v1/stories/{story_id}.{kind}", expires=expires) for kind in ("html", "epub", "pdf")]
    return ShareReply(html=links[0], epub=links[1], pdf=links[2], expires=expires)
