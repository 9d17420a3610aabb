"""Folders and object stores by path or URI: opened in one way, each file written whole or not at all.

pyarrow's file systems do the work, S3, GCS and Azure among them. Those of object stores are opened patient: a request
that the store fails to answer is made again, for a bounded time. Credentials come from the provider's own variables,
profile files and roles, and never from a URI: see docs/operations.md.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import ArrowException, fs

from minigpt5.errors import StorageError

logger = logging.getLogger(__name__)

WAIT_S = 300.0
"""How long jobs and training wait for an object store that fails. Each try of its client has an end of its own."""
TRY_S = 10
"""How long the client of GCS tries by itself: its own default is 15 minutes."""
PAUSE_S, MAX_PAUSE_S = 0.5, 15.0
"""The first and the longest pause between two tries."""
READ_BYTES = 2**26
"""Bytes of a file that one request to an object store asks for."""
SMALL_BYTES = 5 * 2**20
"""Size of a file below which pyarrow sends it to S3 in one request; it sends larger ones in parts of 10 MiB."""
READ_TRIES = 20
"""How often a file is read again that is replaced meanwhile."""
FINAL_KINDS = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
    ValueError,  # ArrowInvalid among them: a bad name
    TypeError,
    NotImplementedError,
    pa.ArrowCancelled,
)
FINAL_NUMBERS = (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)
FINAL_TEXT = re.compile(
    r"AWS Error (NO_SUCH_(BUCKET|KEY)|RESOURCE_NOT_FOUND|ACCESS_DENIED|\w*INVALID\w*|SIGNATURE_DOES_NOT_MATCH"
    r"|EXPIRED_TOKEN)|is a directory|Not a (regular file|directory)|Bucket '.*' not found"
    r"|(HTTP status|Azure Error: \[\w*\]) 4(?!08|29)\d\d"
)
"""Failures that say no more than OSError by their kind. S3 and Azure have such; GCS has kinds for all."""
SECRET = re.compile(r"[?&](client_secret|sas_token|account_key|access_key|secret_key)=", re.IGNORECASE)
"""A URI with a key among its options."""
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


def open_place(place: str | Path, *, wait_s: float = WAIT_S) -> tuple[fs.FileSystem, str]:
    """A path or a URI as a file system and the path there. Raises StorageError where it is none.

    `wait_s`: how long its requests are made again while an object store fails."""
    uri = str(place)
    if "://" not in uri:
        return fs.LocalFileSystem(), str(Path(uri).expanduser().resolve())
    parts = urlsplit(uri)
    if ("@" in parts.netloc and parts.scheme == "s3") or PASSWORD.match(uri) or SECRET.search(uri):
        raise StorageError(
            f"this {parts.scheme}:// URI holds credentials, which logs would show: give them by the provider's "
            "variables, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if parts.fragment:
        raise StorageError(f"{uri} has a #, behind which nothing of a URI counts: write %23")
    joint = "&" if parts.query else "?"
    if parts.scheme in ("gs", "gcs") and "retry_limit_seconds" not in parts.query:
        uri += f"{joint}retry_limit_seconds={TRY_S}"
    try:
        files, path = patiently(lambda: fs.FileSystem.from_uri(uri), wait_s=wait_s)  # may ask where a bucket lies
        is_s3 = parts.scheme == "s3"
        small = fs.FileSystem.from_uri(f"{uri}{joint}allow_delayed_open=true")[0] if is_s3 else None
    except (OSError, ArrowException) as error:
        raise unusable(place, "is no place that can be used", error) from error
    return patient(files, wait_s=wait_s, small=small), path


def open_folder(place: str | Path, *, wait_s: float = WAIT_S) -> tuple[fs.FileSystem, str]:
    """Open a folder to write to, and make it. Raises StorageError where it cannot be written."""
    files, path = open_place(place, wait_s=wait_s)
    try:
        files.create_dir(path, recursive=True)  # on an object store it asks for the bucket and writes a marker
    except (OSError, ArrowException) as error:
        raise unusable(place, "cannot be written", error) from error
    return files, path


def patient(files: fs.FileSystem, *, wait_s: float, small: fs.FileSystem | None = None) -> fs.FileSystem:
    """The same files, whose requests are made again for `wait_s` seconds while the store fails. A local file system
    stays as it is: its failures do not pass. `small`: see _PatientFiles."""
    if handler := _patience_of(files):
        files, small = handler.files, handler.small
    if files.type_name == "local":
        return files
    return fs.PyFileSystem(_PatientFiles(files, wait_s, small))


def unusable(place: str | Path, what: str, error: Exception) -> StorageError:
    """The error that says what cannot be done with a place, why, and what to do."""
    known = (advice for pattern, advice in ADVICE.items() if re.search(pattern, str(error)))
    advice = next(known, "name another folder or URI, or give it permission")
    return StorageError(f"{place} {what} ({error}): {advice}")


def write_whole(
    files: fs.FileSystem, path: str, data: bytes | memoryview | pa.Buffer, *, check: Callable[[], None] = lambda: None
) -> None:
    """Put a file in place, whole or not at all, and for good. Raises OSError; then an earlier file is as it was.

    `check` may refuse it by an error, at the last moment and before each try."""
    if files.type_name == "local":
        _write_local(Path(path), data, check)
        return
    handler = _patience_of(files)
    patiently(lambda: _put(files, path, data, check), wait_s=handler.wait_s if handler else 0)


def read_whole(files: fs.FileSystem, path: str) -> bytes | None:
    """A file's content, as it was put in place; None where there is no file. Raises OSError."""
    handler = _patience_of(files)
    try:
        if handler:
            return handler.read_whole(path)
        with files.open_input_file(path) as file:
            return file.read()
    except FileNotFoundError:
        return None


def read_json(files: fs.FileSystem, path: str) -> dict[str, Any] | None:
    """A file's JSON object; None where there is no file. Raises OSError."""
    data = read_whole(files, path)
    return None if data is None else json.loads(data)


def is_final(error: BaseException) -> bool:
    """Whether another try would fail alike: there is no such file, or it may not be used, or its name is none. Whatever
    else a store answers may pass."""
    return (
        isinstance(error, FINAL_KINDS)
        or (isinstance(error, OSError) and error.errno in FINAL_NUMBERS)
        or FINAL_TEXT.search(str(error)) is not None
    )


def patiently(work: Callable[[], T], *, wait_s: float = WAIT_S) -> T:
    """Do work on an object store; where the store fails, do it again with growing pauses, for `wait_s` seconds.

    The work must do no harm when it is done twice. Raises OSError and ArrowException."""
    deadline, pause_s, is_told = time.monotonic() + wait_s, PAUSE_S, False
    while True:
        try:
            return work()
        except (OSError, ArrowException) as error:
            if is_final(error) or time.monotonic() + pause_s > deadline:
                raise
            if not is_told:
                logger.warning("the store fails, and is asked again for up to %.0f s: %.200s", wait_s, error)
                is_told = True
            time.sleep(random.uniform(pause_s / 2, pause_s))
            pause_s = min(2 * pause_s, MAX_PAUSE_S)


class _PatientFiles(fs.FileSystemHandler):
    """A file system whose every request is made again while the store fails. `write_whole` repeats what is written,
    from its beginning: so a stream to write to is the store's own."""

    def __init__(self, files: fs.FileSystem, wait_s: float, small: fs.FileSystem | None = None) -> None:
        """`small`: the same S3, which begins to write with the first part of a file. That takes one request for a small
        one, in place of three; of a large one whose beginning fails it would leave an empty object."""
        self.files, self.wait_s, self.small = files, wait_s, small

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _PatientFiles) and (self.files, self.wait_s) == (other.files, other.wait_s)

    def read_whole(self, path: str) -> bytes:
        """Read a file of one version. pyarrow asks for its size first: of one that is replaced then, it would give the
        beginning, or the whole and zeros behind it. Raises OSError."""
        for _ in range(READ_TRIES):
            file = self._again(lambda: self.files.open_input_file(path))
            reader = _PatientReader(file, self._again(file.size), self._again)
            # A stream would be read by 256 KiB, each a request.
            data, failure = b"", None
            try:
                data = b"".join(iter(lambda: reader.read(READ_BYTES), b""))  # noqa: B023
            except OSError as error:
                failure = error
            tag = _tag(file)
            reader.close()
            if not tag or _is_of(tag, data) or tag == self._again(lambda: _tag(self.files.open_input_file(path))):
                if failure:
                    raise failure
                return data
        raise OSError(f"{path} was replaced {READ_TRIES} times while it was read")

    def _again(self, work: Callable[[], T]) -> T:
        return patiently(work, wait_s=self.wait_s)

    def _remove(self, work: Callable[[], None]) -> None:
        """A try that seemed to fail may have removed it."""
        num_tries = 0

        def remove() -> None:
            nonlocal num_tries
            num_tries += 1
            try:
                work()
            except FileNotFoundError:
                if num_tries == 1:
                    raise

        self._again(remove)

    def get_type_name(self) -> str:
        return f"patient-{self.files.type_name}"

    def normalize_path(self, path: str) -> str:
        return str(self.files.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return self._again(lambda: self.files.get_file_info(paths))

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        return self._again(lambda: self.files.get_file_info(selector))

    def open_input_file(self, path: str) -> pa.NativeFile:
        file = self._again(lambda: self.files.open_input_file(path))
        return pa.PythonFile(cast(Any, _PatientReader(file, self._again(file.size), self._again)), mode="r")

    open_input_stream = open_input_file

    def open_output_stream(self, path: str, metadata: dict[str, str]) -> pa.NativeFile:
        return self.files.open_output_stream(path, metadata=metadata)

    def open_append_stream(self, path: str, metadata: dict[str, str]) -> pa.NativeFile:
        return self.files.open_append_stream(path, metadata=metadata)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._again(lambda: self.files.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        self._remove(lambda: self.files.delete_dir(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._again(lambda: self.files.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("nobody empties a whole store")

    def delete_file(self, path: str) -> None:
        self._remove(lambda: self.files.delete_file(path))

    def move(self, src: str, dest: str) -> None:
        self.files.move(src, dest)  # done twice it fails

    def copy_file(self, src: str, dest: str) -> None:
        self._again(lambda: self.files.copy_file(src, dest))


def _patience_of(files: fs.FileSystem) -> _PatientFiles | None:
    is_patient = isinstance(files, fs.PyFileSystem) and isinstance(files.handler, _PatientFiles)
    return cast(_PatientFiles, files.handler) if is_patient else None


def _tag(file: pa.NativeFile) -> str:
    """Of an object's content, which a store sends with its size; nothing of a file of another kind."""
    tags = {key.lower(): value for key, value in (file.metadata() or {}).items()}
    return tags.get("etag", b"").decode().strip('"')


def _is_of(tag: str, data: bytes) -> bool:
    """Whether a tag says by itself that it is of this content: on S3 it is a hash, but for what came in parts or is
    encrypted by a key of KMS."""
    return len(tag) == 32 and tag == hashlib.md5(data, usedforsecurity=False).hexdigest()


class _PatientReader:
    """What pyarrow asks of a Python file that it reads. Each part of the object is a request, made again by itself."""

    def __init__(self, file: pa.NativeFile, size: int, again: Callable[[Callable[[], bytes]], bytes]) -> None:
        self._file, self._size, self._again, self._at = file, size, again, 0

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def close(self) -> None:
        self._file.close()

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        size = left if size < 0 else min(size, left)
        data = self._again(lambda: self._read_part(size))
        self._at += size
        return data

    def _read_part(self, size: int) -> bytes:
        data = bytes(self._file.read_at(size, self._at)) if size else b""
        if len(data) < size:
            raise OSError(f"the store sent {len(data)} bytes of {size}")
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at


def _put(files: fs.FileSystem, path: str, data: bytes | memoryview | pa.Buffer, check: Callable[[], None]) -> None:
    """Needs no rename: a store shows an object only when it is complete, and the earlier one until then."""
    handler = _patience_of(files)
    if handler and handler.small and memoryview(data).nbytes < SMALL_BYTES:
        files = handler.small
    check()
    try:
        stream = files.open_output_stream(path)
    except FileNotFoundError:  # one that has folders, as HDFS
        files.create_dir(path.rpartition("/")[0], recursive=True)
        stream = files.open_output_stream(path)
    try:
        stream.write(data)
        stream.close()  # not by `with`, which would close it after a failed write too, and some stores keep what came
    except BaseException:
        del stream  # pyarrow closes one that nobody holds: now, and not after somebody else has written
        raise


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
