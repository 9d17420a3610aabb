"""Server-sent events on the wire: where lines end, where events do, and what is never sent."""

from __future__ import annotations

import json

import pytest

from deployments.sse import EventDecoder, EventTooLong, ServerSentEvent, encode, read_events

OTHER_LINE_ENDS = [
    chr(code) for code in range(0x3000) if len(f"a{chr(code)}b".splitlines()) > 1 and chr(code) not in "\r\n"
]
"""What str.splitlines splits at and a stream's reader must not."""


def read(*chunks: bytes) -> list[ServerSentEvent]:
    return list(read_events(chunks))


def test_python_knows_eight_more_line_ends() -> None:
    assert list("\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029") == OTHER_LINE_ENDS


@pytest.mark.parametrize("character", OTHER_LINE_ENDS, ids=ascii)
def test_a_line_does_not_end_there(character: str) -> None:
    [event] = read(f"id: 1{character}2\nevent: text\ndata: a{character}b\n\n".encode())
    assert event == ServerSentEvent(id=f"1{character}2", name="text", data=f"a{character}b")


@pytest.mark.parametrize("character", [*OTHER_LINE_ENDS, "\r", "\n"], ids=ascii)
def test_what_is_sent_has_no_line_end_in_its_data(character: str) -> None:
    data = {"prompt": f"狐狸{character}fox", f"key{character}": 1}
    text = encode(data, name="text", id="1")
    head, name, line, *rest = text.splitlines()
    assert (head, name, rest) == ("id: 1", "event: text", [""])
    assert json.loads(line.removeprefix("data: ")) == data
    assert "狐狸" in line


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"], ids=ascii)
def test_events_are_the_same_wherever_the_bytes_are_cut(end: str) -> None:
    lines = [": a comment", "id: 1", "event: text", "data: a\u2028狐", "", "data:b", "data: c", "", "data: d", ""]
    stream = "".join(f"{line}{end}" for line in lines).encode()
    expected = [
        ServerSentEvent(id="1", name="text", data="a\u2028狐"),
        ServerSentEvent(id="1", data="b\nc"),
        ServerSentEvent(id="1", data="d"),
    ]
    assert read(stream) == expected
    assert read(*(stream[at : at + 1] for at in range(len(stream)))) == expected
    for cut in range(len(stream)):
        assert read(stream[:cut], b"", stream[cut:]) == expected


def test_an_event_is_told_as_soon_as_its_line_end_is_there() -> None:
    decoder = EventDecoder()
    assert decoder.feed(b"data: a\r\n\r") == [ServerSentEvent(data="a")]
    assert decoder.feed(b"\ndata: b\r\r") == [ServerSentEvent(data="b")]


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"\xef\xbb\xbfdata: a\n\n", [ServerSentEvent(data="a")]),
        (b": comment\n\n", []),
        (b"event: text\n\ndata: a\n\n", [ServerSentEvent(data="a")]),
        (b"data\n\n", [ServerSentEvent(data="")]),
        (b"data:  a \n\n", [ServerSentEvent(data=" a ")]),
        (b"id: 1\0\ndata: a\n\n", [ServerSentEvent(data="a")]),
        (b"id: 1\ndata: a\n\nid\ndata: b\n\n", [ServerSentEvent(id="1", data="a"), ServerSentEvent(data="b")]),
        (b"retry: 5\ncolour: red\ndata: a\n\n", [ServerSentEvent(data="a")]),
        (b"data: a\xff\n\n", [ServerSentEvent(data="a\ufffd")]),
        (b"data: a\n\ndata: b\n", [ServerSentEvent(data="a")]),
    ],
)
def test_fields_are_read_as_browsers_do(stream: bytes, expected: list[ServerSentEvent]) -> None:
    assert read(stream) == expected


@pytest.mark.parametrize("part", [b"x" * 10, b"data: aaaa\n", b": comment, " * 2])
def test_an_event_without_an_end_is_refused(part: bytes) -> None:
    decoder = EventDecoder(max_bytes=100)
    with pytest.raises(EventTooLong, match="limit of 100 bytes"):
        for _ in range(12):
            decoder.feed(part)


def test_a_long_stream_of_short_events_is_read() -> None:
    decoder = EventDecoder(max_bytes=20)
    assert sum(len(decoder.feed(b": still here\n\ndata: aaaa\n\n")) for _ in range(100)) == 100
