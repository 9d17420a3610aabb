"""Files are put in place whole, or not at all."""

from __future__ import annotations

from typing import Any

import pytest

from minigpt5.errors import StorageError
from minigpt5.storage import open_place, write_whole


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


@pytest.mark.parametrize("uri", ["s3://key:abc/def@bucket/x", "s3://key@bucket/x", "abfs://account:secret@container/x"])
def test_a_uri_with_credentials_is_refused_without_showing_them(uri: str) -> None:
    with pytest.raises(StorageError, match="holds credentials") as refusal:
        open_place(uri)
    assert not {"key", "abc", "secret"} & set(str(refusal.value).replace("/", " ").replace(":", " ").split())


def test_a_path_may_hold_an_at_sign() -> None:
    assert open_place("s3://bucket/a@b:c@d?region=eu-west-1")[1] == "bucket/a@b:c@d"
