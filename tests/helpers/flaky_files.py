"""A store over a local folder, whose requests fail when a test says so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa
from pyarrow import fs

T = TypeVar("T")


class FlakyFiles(fs.FileSystemHandler):
    """Example: store = FlakyFiles(folder); store.failures_left = 2; fs.PyFileSystem(store).get_file_info("a")"""

    def __init__(self, folder: Path) -> None:
        self.files = fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem())
        self.failures_left, self.num_failures = 0, 0
        self.broken = ""
        """Requests that match it always fail."""
        self.num_reads, self.failing_read, self.cuts = 0, 0, False
        self.error: Exception = OSError("AWS Error INTERNAL_FAILURE during a request")
        self.does_it_first = False
        """The answer is lost, and not the request."""
        self.requests: list[str] = []
        self.num_listed = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlakyFiles) and self.files == other.files

    __hash__ = None  # type: ignore[assignment]

    def _do(self, name: str, work: Callable[[], T]) -> T:
        self.requests.append(name)
        if self.broken and re.search(self.broken, name):
            self.failures_left += 1
        if not self.failures_left:
            return work()
        self.failures_left -= 1
        self.num_failures += 1
        if self.does_it_first:
            work()
        raise self.error

    def get_type_name(self) -> str:
        return "flaky"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return self._do(f"info {paths}", lambda: self.files.get_file_info(paths))

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        infos = self._do(f"list {selector.base_dir}", lambda: self.files.get_file_info(selector))
        self.num_listed += len(infos)
        return infos

    def open_input_file(self, path: str) -> pa.NativeFile:
        file = self._do(f"open {path}", lambda: self.files.open_input_file(path))
        return pa.PythonFile(cast(Any, _CountedFile(file, self)), mode="r")

    open_input_stream = open_input_file

    def open_output_stream(self, path: str, metadata: dict[str, str]) -> pa.NativeFile:
        self._do(f"write {path}", lambda: self.files.create_dir(path.rpartition("/")[0] or ".", recursive=True))
        return self.files.open_output_stream(path)

    def open_append_stream(self, path: str, metadata: dict[str, str]) -> pa.NativeFile:
        raise NotImplementedError

    def create_dir(self, path: str, recursive: bool) -> None:
        self._do(f"make {path}", lambda: self.files.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        self._do(f"delete {path}", lambda: self.files.delete_dir(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        raise NotImplementedError

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self._do(f"delete {path}", lambda: self.files.delete_file(path))

    def move(self, src: str, dest: str) -> None:
        raise NotImplementedError

    def copy_file(self, src: str, dest: str) -> None:
        raise NotImplementedError


class _CountedFile:
    """One whose read number `failing_read` fails, or is cut."""

    def __init__(self, file: pa.NativeFile, store: FlakyFiles) -> None:
        self._file, self._store = file, store

    def read(self, size: int = -1) -> bytes:
        self._store.num_reads += 1
        if self._store.num_reads == self._store.failing_read:
            if self._store.cuts:
                return self._file.read(size // 2)
            raise self._store.error
        return self._file.read(None if size < 0 else size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
