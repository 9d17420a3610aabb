"""Files are put in place whole, or not at all."""

from __future__ import annotations

from typing import Any

import pytest

from minigpt5.storage import write_whole


class FailingStream:
    """Of an object store: closing one after a failed write may put an empty object in place."""

    is_closed = False

    def write(self, data: bytes) -> None:
        raise OSError("AWS Error ACCESS_DENIED")

    def close(self) -> None:
        self.is_closed = True


class FailingStore:
    type_name = "s3"

    def __init__(self) -> None:
        self.stream = FailingStream()

    def open_output_stream(self, path: str) -> FailingStream:
        return self.stream


def test_a_write_that_fails_leaves_the_earlier_object() -> None:
    store: Any = FailingStore()
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        write_whole(store, "bucket/object", b"new")
    assert not store.stream.is_closed
