"""A stored story as a book: HTML to read or print, EPUB for readers."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from fastapi.responses import Response

from deployments.front import FrontOf
from minigpt5.epub import MIMETYPE, to_epub
from minigpt5.export import to_html

exports = APIRouter()


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
