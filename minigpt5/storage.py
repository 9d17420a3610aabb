"""Folders and object stores by path or URI: opened in one way, each file written whole or not at all.

pyarrow's file systems do the work, S3, GCS and Azure among them. Credentials come from the provider's own variables,
profile files and roles, and never from a URI: see docs/operations.md.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import ArrowException, fs

from minigpt5.errors import StorageError

WAIT_S = 300.0
"""How long jobs and training wait for an object store that fails. Each try of its client has an end of its own."""
PAUSE_S, MAX_PAUSE_S = 0.5, 15.0
"""The first and the longest pause between two tries."""
READ_BYTES = 2**26
"""Bytes of a file that one request to an object store asks for."""
PASSES = re.compile(
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|THROTTLING|REQUEST_TIMEOUT)"
    r"|HTTP status (429|5\d\d)|curlCode|truncated|Expected \d+ bytes"
)
"""Failures of an object store that another try may not meet."""
PASSWORD = re.compile(r"[^/]*//[^/@:]*:(?!\d+/)[^@]*@")
"""A URI with a password, which may hold slashes; and not one with a port."""
ADVICE = {
    "NO_SUCH_BUCKET|Bucket '.*' not found": "create the bucket, or name another one",
    "ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|EXPIRED_TOKEN|HTTP status 40[13]": (
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role, that may list, read, write and delete there"
    ),
    "NETWORK_CONNECTION|curlCode": "check AWS_ENDPOINT_URL, AWS_REGION and the network",
}
"""What to do, by what an error's text holds."""

T = TypeVar("T")


def open_place(place: str | Path) -> tuple[fs.FileSystem, str]:
    """A path or a URI as a file system and the path there. Raises StorageError where it is none."""
    uri = str(place)
    if "://" not in uri:
        return fs.LocalFileSystem(), str(Path(uri).expanduser().resolve())
    parts = urlsplit(uri)
    if ("@" in parts.netloc and parts.scheme == "s3") or PASSWORD.match(uri):
        raise StorageError(
            f"this {parts.scheme}:// URI holds credentials, which logs would show: give them by the provider's "
            "variables, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if parts.scheme == "s3":  # one request for a small file, in place of the three of a multipart upload
        uri += f"{'&' if parts.query else '?'}allow_delayed_open=true"
    try:
        return fs.FileSystem.from_uri(uri)
    except (OSError, ArrowException) as error:
        raise unusable(place, "is no place that can be used", error) from error


def open_folder(place: str | Path) -> tuple[fs.FileSystem, str]:
    """Open a folder to write to, and make it. Raises StorageError where it cannot be written."""
    files, path = open_place(place)
    try:
        files.create_dir(path, recursive=True)  # on an object store it asks for the bucket and writes a marker
    except (OSError, ArrowException) as error:
        raise unusable(place, "cannot be written", error) from error
    return files, path


def unusable(place: str | Path, what: str, error: Exception) -> StorageError:
    """The error that says what cannot be done with a place, why, and what to do."""
    known = (advice for pattern, advice in ADVICE.items() if re.search(pattern, str(error)))
    advice = next(known, "name another folder or URI, or give it permission")
    return StorageError(f"{place} {what} ({error}): {advice}")


def write_whole(
    files: fs.FileSystem,
    path: str,
    data: bytes | memoryview | pa.Buffer,
    *,
    check: Callable[[], None] = lambda: None,
    wait_s: float = WAIT_S,
) -> None:
    """Put a file in place, whole or not at all, and for good. Raises OSError; then an earlier file is as it was.

    `check` may refuse it by an error, at the last moment and before each try."""
    if files.type_name == "local":
        _write_local(Path(path), data, check)
    else:
        patiently(lambda: _put(files, path, data, check), wait_s=wait_s)


def read_whole(files: fs.FileSystem, path: str, *, wait_s: float = WAIT_S) -> bytes | None:
    """A file's content; None where there is no file. Raises OSError."""

    def read() -> bytes | None:
        try:
            with files.open_input_file(path) as file:  # a stream would be read by 256 KiB, each a request
                return b"".join(iter(lambda: file.read(READ_BYTES), b""))
        except FileNotFoundError:
            return None

    return patiently(read, wait_s=wait_s)


def read_json(files: fs.FileSystem, path: str) -> dict[str, Any] | None:
    """A file's JSON object; None where there is no file. Raises OSError."""
    data = read_whole(files, path)
    return None if data is None else json.loads(data)


def patiently(work: Callable[[], T], *, wait_s: float = WAIT_S) -> T:
    """Do work on an object store; where the store fails, do it again with growing pauses, for `wait_s` seconds.

    The work must do no harm when it is done twice. Raises OSError."""
    deadline, pause_s = time.monotonic() + wait_s, PAUSE_S
    while True:
        try:
            return work()
        except OSError as error:
            if not PASSES.search(str(error)) or time.monotonic() + pause_s > deadline:
                raise
            time.sleep(random.uniform(pause_s / 2, pause_s))
            pause_s = min(2 * pause_s, MAX_PAUSE_S)


def _put(files: fs.FileSystem, path: str, data: bytes | memoryview | pa.Buffer, check: Callable[[], None]) -> None:
    """Needs no rename: a store shows an object only when it is complete, and the earlier one until then."""
    check()
    try:
        stream = files.open_output_stream(path)
    except FileNotFoundError:  # one that has folders, as HDFS
        files.create_dir(path.rpartition("/")[0], recursive=True)
        stream = files.open_output_stream(path)
    stream.write(data)
    stream.close()  # only now: closing after a failed write may put an empty object in place


def _write_local(path: Path, data: bytes | memoryview | pa.Buffer, check: Callable[[], None]) -> None:
    # Hidden, so that who lists the folder passes over it.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            file = partial.open("wb")
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = partial.open("wb")
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before what is renamed
        check()
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
