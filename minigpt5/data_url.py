"""Data URLs -> bytes, as WHATWG's data: URL processor and its forgiving base64 read them. Nothing is ever fetched.

Browsers and client libraries write them in many ways: another case, line breaks, no padding, percent escapes. base64's
URL-safe alphabet is read too, which the standard refuses.
"""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote_to_bytes

MAX_CHARACTERS = 128 * 2**20
"""Of a whole URL: 96 MiB of picture."""
_OUTSIDE = "".join(map(chr, range(0x21)))
"""Control characters and the space, which no URL has at either end."""
_BASE64_MARK = re.compile(r"; *base64\Z", re.IGNORECASE | re.ASCII)
_STANDARD = bytes.maketrans(b"-_", b"+/")
_NO_BASE64 = re.compile(rb"[^A-Za-z0-9+/]")


def is_data_url(text: str) -> bool:
    return text[:64].lstrip(_OUTSIDE)[:5].lower() == "data:"


def decode(url: str) -> bytes:
    """Raises ValueError, whose text is the reason."""
    if len(url) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(url)} characters but at most {MAX_CHARACTERS} are read")
    for ignored in "\t\n\r":
        url = url.replace(ignored, "")
    head, comma, body = url.strip(_OUTSIDE).partition("#")[0].partition(",")
    if not is_data_url(head) or not comma:
        raise ValueError("it does not begin with data:, a type and a comma")
    if 3 * body.count("%") > len(body):  # an escape takes three characters; a flood of % signs would take time
        raise ValueError("its percent escapes are broken")
    data = unquote_to_bytes(body)
    return decode_base64(data) if _BASE64_MARK.search(head.rstrip(_OUTSIDE)) else data


def decode_base64(text: bytes) -> bytes:
    """White space counts for nothing, and the padding at the end may be left out. Raises ValueError."""
    text = text.translate(_STANDARD, delete=b" \t\n\f\r")
    if len(text) % 4 == 0:
        text = text.removesuffix(b"=").removesuffix(b"=")
    if other := _NO_BASE64.search(text):
        raise ValueError(f"its base64 is broken: {other[0]!r} at byte {other.start()} is none of its letters")
    if len(text) % 4 == 1:
        raise ValueError(f"its base64 is broken: no file is encoded as {len(text)} letters")
    return base64.b64decode(text + b"=" * (-len(text) % 4))
