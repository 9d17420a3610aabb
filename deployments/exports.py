"""A stored story as a book: HTML to read or print, EPUB for readers; and links to it for who has no key."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from deployments.front import FrontOf, check_owner
from deployments.schemas import ShareReply, ShareStory
from minigpt5.epub import MIMETYPE, to_epub
from minigpt5.export import to_html

exports = APIRouter(dependencies=[Depends(check_owner)])


@exports.get("/v1/stories/{story_id}.html")
async def get_html(story_id: str, front: FrontOf) -> Response:
    """One self-contained file."""
    story = await asyncio.to_thread(front.store.load_story, story_id)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox"
    return Response(to_html(story), media_type="text/html", headers={"Content-Security-Policy": policy})


@exports.get("/v1/stories/{story_id}.epub")
async def get_epub(story_id: str, front: FrontOf) -> Response:
    story = await asyncio.to_thread(front.store.load_story, story_id)
    headers = {"Content-Disposition": f'attachment; filename="{story.id}.epub"'}
    return Response(to_epub(story), media_type=MIMETYPE, headers=headers)


@exports.post("/v1/stories/{story_id}/share", response_model=ShareReply)
async def share_story(story_id: str, body: ShareStory, front: FrontOf) -> ShareReply:
    """Links to the book that need no key, until they expire."""
    await asyncio.to_thread(front.store.load, story_id)
    expires = int(time.time()) + body.expires_s

    def link(path: str) -> str:
        query = f"?expires={expires}&signature={front.keys.sign('share', path, expires)}" if front.keys else ""
        return f"{path}{query}"

    path = f"/v1/stories/{story_id}"
    return ShareReply(html=link(f"{path}.html"), epub=link(f"{path}.epub"), expires=expires)
