"""Story -> EPUB 3 book (https://www.w3.org/TR/epub-33/), a chapter for each page, pictures and all. No torch here."""

from __future__ import annotations

import io
import re
import zipfile
from datetime import UTC, datetime
from html import escape

from minigpt5.story.export.language import is_right_to_left, language_of
from minigpt5.types import Page, Story

MIMETYPE = "application/epub+zip"
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MAX_ALT = 240
"""Characters of a picture's description; the whole text stands beside it."""

_CONTAINER = """<?xml version="1.0" encoding="utf-8"?>
<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container">
<rootfiles><rootfile full-path="EPUB/package.opf" media-type="application/oebps-package+xml"/></rootfiles>
</container>
"""

_PACKAGE = """<?xml version="1.0" encoding="utf-8"?>
<package xmlns="http://www.idpf.org/2007/opf" version="3.0" unique-identifier="id"
  xml:lang="{language}" dir="{direction}">
<metadata xmlns:dc="http://purl.org/dc/elements/1.1/">
<dc:identifier id="id">urn:minigpt5:{id}</dc:identifier>
<dc:title>{title}</dc:title>
<dc:language>{language}</dc:language>
<dc:creator>{model}</dc:creator>
<dc:description>seed {seed}</dc:description>
<meta property="dcterms:modified">{modified}</meta>
<meta property="schema:accessMode">textual</meta>
<meta property="schema:accessMode">visual</meta>
<meta property="schema:accessModeSufficient">textual</meta>
<meta property="schema:accessibilityFeature">alternativeText</meta>
<meta property="schema:accessibilityHazard">none</meta>
<meta property="schema:accessibilitySummary">Every picture is described by the text of its page.</meta>
</metadata>
<manifest>
<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>
<item id="style" href="style.css" media-type="text/css"/>
{items}
</manifest>
<spine page-progression-direction="{direction}">
<itemref idref="nav"/>
{spine}
</spine>
</package>
"""

_DOCUMENT = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE html>
<html xmlns="http://www.w3.org/1999/xhtml" xmlns:epub="http://www.idpf.org/2007/ops"
  lang="{language}" xml:lang="{language}">
<head>
<title>{title}</title>
<link rel="stylesheet" type="text/css" href="style.css"/>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """body { font-family: serif; line-height: 1.5; }
h1 { text-align: center; font-weight: normal; }
ol { list-style: none; padding: 0; text-align: center; }
figure { margin: 0 0 1em; text-align: center; }
img { width: 100%; max-width: 24em; height: auto; max-height: 80vh; object-fit: contain; }
.missing { border: 1px dashed; padding: 2em; }
.text { white-space: pre-line; }
"""


def to_epub(story: Story, *, modified: datetime | None = None) -> bytes:
    """The book as one file. `modified` (default: now) is the only thing in it that is not the story's."""
    title = _text(title_of(story))
    moment = (modified or datetime.now(UTC)).astimezone(UTC)
    language = language_of(story)
    items, spine, links = [], [], []
    files: dict[str, str | bytes] = {"META-INF/container.xml": _CONTAINER, "EPUB/style.css": _STYLE}
    cover = next((page.index for page in story.pages if page.picture), None)
    for page in story.pages:
        name = f"page-{page.index}"
        items.append(f'<item id="{name}" href="{name}.xhtml" media-type="application/xhtml+xml"/>')
        spine.append(f'<itemref idref="{name}"/>')
        links.append(f'<li><a href="{name}.xhtml">Page {page.index}</a></li>')
        files[f"EPUB/{name}.xhtml"] = _DOCUMENT.format(language=language, title=f"Page {page.index}", body=_page(page))
        if page.picture:
            is_cover = ' properties="cover-image"' if page.index == cover else ""
            picture = f"picture-{page.index}"
            items.append(f'<item id="{picture}" href="{picture}.png" media-type="image/png"{is_cover}/>')
            files[f"EPUB/{picture}.png"] = page.picture.png
    if not links:  # a list without entries is no valid EPUB
        links.append('<li><a href="nav.xhtml">This story has no pages</a></li>')
    contents = f'<h1 dir="auto">{title}</h1>\n<nav epub:type="toc"><ol>\n' + "\n".join(links) + "\n</ol></nav>"
    files["EPUB/nav.xhtml"] = _DOCUMENT.format(language=language, title=title, body=contents)
    files["EPUB/package.opf"] = _PACKAGE.format(
        id=_text(story.id),
        language=language,
        direction="rtl" if is_right_to_left(language) else "ltr",
        title=title,
        model=_text(story.model),
        seed=story.seed,
        modified=f"{moment:%Y-%m-%dT%H:%M:%SZ}",
        items="\n".join(items),
        spine="\n".join(spine),
    )
    return _zip(files, moment)


def title_of(story: Story) -> str:
    """A book's title, which is never blank: a prompt may be pictures alone."""
    return _NOT_XML.sub("", story.prompt).strip() or "A story"


def describe_picture(page: Page) -> str:
    """What stands for a page's picture where it cannot be seen."""
    words = " ".join(page.text.split())
    if len(words) > _MAX_ALT:
        start = words[:_MAX_ALT]
        words = (start.rpartition(" ")[0] or start) + " ..."
    return f"Picture of page {page.index}: {words}" if words else f"Picture of page {page.index}"


def _page(page: Page) -> str:
    if page.picture:
        alt = _text(describe_picture(page))
        picture = f'<img src="picture-{page.index}.png" alt="{alt}"/>'
    else:
        reason = f": <bdi>{_text(page.error)}</bdi>" if page.error else ""
        picture = f'<p class="missing">This page has no picture{reason}</p>'
    return f'<section>\n<figure>{picture}</figure>\n<p class="text" dir="auto">{_text(page.text)}</p>\n</section>'


def _text(words: str) -> str:
    """Escape text for XML, without the characters that XML cannot have."""
    return escape(_NOT_XML.sub("", words))


def _zip(files: dict[str, str | bytes], moment: datetime) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as book:
        for name, content in {"mimetype": MIMETYPE, **files}.items():
            info = zipfile.ZipInfo(name, moment.timetuple()[:6])
            # The first file tells readers what they have, so it is not compressed; pictures are already.
            is_stored = name == "mimetype" or name.endswith(".png")
            info.compress_type = zipfile.ZIP_STORED if is_stored else zipfile.ZIP_DEFLATED
            book.writestr(info, content)
    return data.getvalue()
