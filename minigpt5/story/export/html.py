"""Story -> one self-contained HTML storybook, and any book -> a file. No torch here."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from minigpt5.story.export.book_file import check_place, write_book
from minigpt5.story.export.epub import describe_picture, title_of, to_epub
from minigpt5.story.export.language import language_of
from minigpt5.types import Page, Story

STYLE = """
.storybook { --paper: #fffdf6; --ink: #2e2a25; --faint: #8a8178; --edge: #e6dfd0; max-width: 46rem; margin: 0 auto;
  padding: 2.5rem 1.25rem; color: var(--ink); font: 1.2rem/1.65 Georgia, "Iowan Old Style", "Noto Serif", serif; }
.storybook header { text-align: center; margin-bottom: 2.5rem; }
.storybook h1 { font-size: 1.9rem; line-height: 1.25; font-weight: normal; margin: 0; overflow-wrap: anywhere; }
.storybook .page { display: flex; align-items: center; gap: 1.75rem; margin: 0 0 1.5rem; padding: 1.25rem;
  background: var(--paper); border: 1px solid var(--edge); border-radius: 14px;
  box-shadow: 0 2px 10px rgba(60, 45, 20, .08); break-inside: avoid; }
.storybook .page:nth-of-type(even) { flex-direction: row-reverse; }
.storybook .picture { flex: 0 0 46%; min-width: 0; }
.storybook img { display: block; width: 100%; height: auto; border-radius: 8px; }
.storybook .text { flex: 1; min-width: 0; margin: 0; overflow-wrap: anywhere; white-space: pre-line;
  unicode-bidi: plaintext; }
.storybook .missing { box-sizing: border-box; aspect-ratio: 1; display: flex; flex-direction: column;
  justify-content: center; padding: 1rem; border: 1px dashed var(--faint); border-radius: 8px; color: var(--faint);
  font-size: .9rem; line-height: 1.4; text-align: center; overflow-wrap: anywhere; }
.storybook .number, .storybook footer { color: var(--faint); font-size: .85rem; text-align: center; }
.storybook .number { display: block; margin-top: .75rem; text-align: start; }
@media (max-width: 34rem) { .storybook .page, .storybook .page:nth-of-type(even) { flex-direction: column; }
  .storybook .picture { flex-basis: auto; width: 100%; } }
@media (prefers-color-scheme: dark) { .storybook { --paper: #26231f; --ink: #ece5d8; --faint: #a0968a;
  --edge: #3a352e; } html.storybook-page { background: #1a1816; } }
@media print { .storybook .page { box-shadow: none; } }
"""

DOCUMENT = """<!doctype html>
<html lang="{language}" class="storybook-page">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>html.storybook-page {{ background: #f3ecdd; }} body {{ margin: 0; }}</style>
</head>
<body>
{story}
</body>
</html>
"""


def to_html_fragment(story: Story) -> str:
    """The story as HTML that stands inside another page: a notebook's cell, for instance."""
    pages = "\n".join(_page(page) for page in story.pages)
    return (
        f"<style>{STYLE}</style>\n"
        f'<article class="storybook" lang="{language_of(story)}">\n'
        f'<header><h1 dir="auto">{escape(title_of(story))}</h1></header>\n{pages}\n'
        f"<footer>{escape(story.model)} &middot; seed {story.seed}</footer>\n</article>"
    )


def to_html(story: Story) -> str:
    """The story as a page of its own, with everything in it."""
    return DOCUMENT.format(language=language_of(story), title=escape(title_of(story)), story=to_html_fragment(story))


def to_book(story: Story, suffix: str) -> bytes:
    """By a file name's ending: .epub, .pdf, or HTML."""
    if suffix == ".epub":
        return to_epub(story)
    if suffix == ".pdf":
        from minigpt5.story.export.pdf import to_pdf

        return to_pdf(story)
    return to_html(story).encode()


def save(story: Story, path: str) -> str:
    """Write the story as one file, by its name HTML, EPUB or PDF, whole or not at all; returns the path. Raises
    StorageError."""
    check_place(path)
    write_book(path, to_book(story, Path(path).suffix.lower()))
    return path


def _page(page: Page) -> str:
    if page.picture:
        data = base64.b64encode(page.picture.png).decode()
        picture = (
            f'<img src="data:image/png;base64,{data}" width="{page.picture.width}" height="{page.picture.height}" '
            f'alt="{escape(describe_picture(page))}">'
        )
    else:
        reason = f": <bdi>{escape(page.error)}</bdi>" if page.error else ""
        picture = f'<div class="missing">This page has no picture{reason}</div>'
    return (
        f'<section class="page">\n<div class="picture">{picture}</div>\n'
        f'<div class="text" dir="auto">{escape(page.text)}<span class="number">{page.index}</span></div>\n</section>'
    )
