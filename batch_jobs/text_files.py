"""Text files as people send them -> their lines: gzip is unpacked, a byte-order mark is dropped, and what is not UTF-8
is named, a whole file in UTF-16 or a single line."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minigpt5.errors import StorageError

MAX_LINE = 2**26
"""Characters of a line or a CSV field: pictures may stand in it as data URLs."""
BUFFER_BYTES = 2**22
"""What is read at once: of an object store, each read is a request."""
GZIP = b"\x1f\x8b"
CUT = (EOFError, zlib.error, gzip.BadGzipFile)
"""What a gzip file raises that ends early or is damaged."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line without its end."""

    number: int
    """From 1."""
    raw: str
    """The text, in which a byte that is not UTF-8 is a lone surrogate."""

    @property
    def text(self) -> str:
        """Raises ValueError where it cannot be read."""
        if len(self.raw) > MAX_LINE:
            raise ValueError(f"it is longer than {MAX_LINE} characters")
        return check_utf8(self.raw)


def check_utf8(text: str) -> str:
    """A text of `open_text` as it is. Raises ValueError where some of its bytes are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it is not UTF-8: save the file in UTF-8") from None
    return text


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, also where it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def unpack(file: Any) -> io.BufferedReader:
    """The content of a binary file, unpacked where it begins as gzip does, whatever the file's name is."""
    buffered = io.BufferedReader(file, BUFFER_BYTES)
    if buffered.peek(2)[:2] != GZIP:
        return buffered
    return io.BufferedReader(_Unpacked(buffered), BUFFER_BYTES)


class _Unpacked(io.RawIOBase):
    """The content of a gzip file up to where it is cut: `GzipFile.read` gives nothing of a read that meets the cut."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._content = gzip.GzipFile(fileobj=file)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._content.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._content.seek(offset, whence)


def open_text(file: Any, *, name: str, newline: str | None = None) -> io.TextIOWrapper:
    """A binary file as text. A byte that is not UTF-8 becomes a lone surrogate, which `check_utf8` finds.

    Raises StorageError where the whole file is in UTF-16 or UTF-32, and CUT.
    """
    content = unpack(file)
    encoding = json.detect_encoding(content.peek(4)[:4])
    if not encoding.startswith("utf-8"):
        kind = encoding.upper().removesuffix("-LE").removesuffix("-BE")
        raise StorageError(f"{name} is in {kind}: save it in UTF-8, as with iconv -f {kind} -t UTF-8")
    return io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def read_lines(file: Any, *, name: str) -> Iterator[Line]:
    """The lines of a binary file that are not blank. Raises StorageError where it is in UTF-16 or UTF-32, or is cut."""
    number = 0
    try:
        text = open_text(file, name=name)
        while raw := text.readline(MAX_LINE + 1):
            number += 1
            if not raw.endswith("\n") and len(raw) > MAX_LINE:
                while (rest := text.readline(BUFFER_BYTES)) and not rest.endswith("\n"):
                    pass
            if raw := raw.rstrip("\n"):
                yield Line(number=number, raw=raw)
    except CUT as error:
        raise StorageError(f"{name} ends early, after line {number} ({error}): get it again") from error
