"""Server-sent events, written for the front's streams and read by the client, the benchmarks and the tests.

Lines of a stream end at CR, LF and CRLF (https://html.spec.whatwg.org/multipage/server-sent-events.html).
str.splitlines knows more line ends, and so do readers that are built on it. Hence bytes are split here, and no event
that is sent holds one of those.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAX_EVENT_BYTES = 32 * 2**20
"""Above an event with the largest picture that the server sends: 1792 x 1024 without compression, in base64."""
KEEP_ALIVE = ": keep-alive\n\n"
"""A comment, which readers ignore."""

_LINE_END = re.compile(rb"\r\n|\r|\n")
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}
"""The line ends of str.splitlines that JSON does not escape by itself."""


class EventTooLong(ValueError):
    """An event above the limit: what is read is no stream of this server."""


@dataclass(frozen=True, kw_only=True)
class ServerSentEvent:
    """One event as it was read. Example: ServerSentEvent(id="1-slot-0.2-0-0.0", name="slot", data='{"page": 1}')"""

    data: str
    name: str = "message"
    id: str = ""
    """Id of this event, or else of the last one that had an id."""


def encode(data: object, *, name: str = "", id: str = "") -> str:
    """One event with JSON as its data. Raises TypeError where `data` is no JSON."""
    text = json.dumps(data, ensure_ascii=False).translate(_ESCAPES)
    head = (f"id: {id}\n" if id else "") + (f"event: {name}\n" if name else "")
    return f"{head}data: {text}\n\n"


class EventDecoder:
    """A stream's bytes -> its events, wherever the bytes are cut. An event that the stream does not end is left out."""

    def __init__(self, *, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._line = bytearray()
        self._is_first_line = True
        self._ends_in_cr = False
        self._id, self._name = "", ""
        self._data: list[str] = []
        self._num_bytes = 0
        """Bytes of the data lines."""

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """The events that end in `chunk`. Raises EventTooLong."""
        if self._ends_in_cr and chunk.startswith(b"\n"):  # the other half of a CRLF, whose line has ended
            chunk, self._ends_in_cr = chunk[1:], False
        if chunk:
            self._ends_in_cr = chunk.endswith(b"\r")
        *ends, rest = _LINE_END.split(chunk)
        events = []
        for end in ends:
            self._grow(end)
            line, self._line = bytes(self._line), bytearray()
            if event := self._take(line):
                events.append(event)
        self._grow(rest)
        return events

    def _grow(self, part: bytes) -> None:
        if self._num_bytes + len(self._line) + len(part) > self._max_bytes:
            raise EventTooLong(f"an event is longer than the limit of {self._max_bytes} bytes")
        self._line += part

    def _take(self, line: bytes) -> ServerSentEvent | None:
        if self._is_first_line:
            self._is_first_line, line = False, line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            return self._end_event()
        field, _, value = line.partition(b":")  # a comment is a field without a name
        text = value.removeprefix(b" ").decode(errors="replace")
        if field == b"data":
            self._data.append(text)
            self._num_bytes += len(line)
        elif field == b"event":
            self._name = text
        elif field == b"id" and "\0" not in text:
            self._id = text
        return None

    def _end_event(self) -> ServerSentEvent | None:
        name, data = self._name or "message", self._data
        self._name, self._data, self._num_bytes = "", [], 0
        return ServerSentEvent(id=self._id, name=name, data="\n".join(data)) if data else None


def read_events(chunks: Iterable[bytes]) -> Iterator[ServerSentEvent]:
    """Yield the events of a stream as they end. Raises EventTooLong."""
    decoder = EventDecoder()
    for chunk in chunks:
        yield from decoder.feed(chunk)
