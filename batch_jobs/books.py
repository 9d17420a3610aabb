"""A finished data set -> an HTML and an EPUB book of each story and an index page, beside the output:
URI.books/index.html."""

from __future__ import annotations

import hashlib
from html import escape

from pyarrow import ArrowException

from batch_jobs.outputs import RowSink
from batch_jobs.stages import Row
from minigpt5.errors import BadPicture
from minigpt5.pictures import open_picture
from minigpt5.storage import open_place, unusable, write_whole
from minigpt5.story.export.epub import to_epub
from minigpt5.story.export.html import to_html
from minigpt5.types import Page, Picture, Story, Usage

INDEX = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>body {{ max-width: 46rem; margin: 2rem auto; padding: 0 1rem; font: 1.1rem/1.6 Georgia, serif; }}
li {{ margin: .4rem 0; overflow-wrap: anywhere; }} .error {{ color: #a33; }}</style>
</head>
<body>
<h1>{title}</h1>
<ol>
{entries}
</ol>
</body>
</html>
"""


def write_books(sink: RowSink, *, model: str) -> str:
    """The place of the index page. A book that is already there stays as it is. Raises StorageError."""
    place = f"{sink.uri.rstrip('/')}.books"
    try:
        _write(sink, model=model)
    except (OSError, ArrowException) as error:
        raise unusable(f"folder {place}", "cannot be written", error) from error
    return f"{place}/index.html"


def _write(sink: RowSink, *, model: str) -> None:
    files, base = open_place(sink.uri.rstrip("/"))
    entries = []
    for row in sink.rows():
        name = hashlib.sha256(row["id"].encode()).hexdigest()[:32]
        error = f' <span class="error">{escape(row["error"])}</span>' if row["error"] else ""
        if not row["pages"]:
            entries.append(f'<li dir="auto">{escape(row["prompt"] or row["id"])}{error}</li>')
            continue
        path = f"{base}.books/{name}"
        if not files.get_file_info(f"{path}.html").is_file:  # the last of the two
            story = to_story(row, sink, model=model)
            write_whole(files, f"{path}.epub", to_epub(story))
            write_whole(files, f"{path}.html", to_html(story).encode())
        links = f'<a href="{name}.html">{escape(row["prompt"])}</a> <a href="{name}.epub">EPUB</a>'
        entries.append(f'<li dir="auto">{links}{error}</li>')
    title = f"{len(entries)} stories"
    write_whole(files, f"{base}.books/index.html", INDEX.format(title=title, entries="\n".join(entries)).encode())


def to_story(row: Row, sink: RowSink, *, model: str) -> Story:
    """An output row as a story, its pictures read from where they lie."""
    pages = []
    for page in row["pages"]:
        png = page["png"] or (sink.store.load_picture(row["id"], page["index"]) if page["uri"] else None)
        picture, error = None, page["error"]
        if png:
            try:
                width, height = open_picture(png).size
            except BadPicture:
                error = error or "its picture file is damaged"
            else:
                picture = Picture(
                    page=page["index"], png=png, width=width, height=height, seed=page["seed"], denoise_steps=0
                )
        elif page["uri"]:
            error = error or "its picture file is gone"
        pages.append(Page(index=page["index"], text=page["text"], picture=picture, error=error))
    usage = Usage(prompt_tokens=0, completion_tokens=0)
    return Story(id=row["id"], prompt=row["prompt"], seed=row["seed"], model=model, pages=tuple(pages), usage=usage)
