"""What a run leaves, on any file system: checkpoints, a log, sheets, the model. Files are whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pyarrow import fs

from minigpt5.errors import StorageError, TrainingError
from minigpt5.storage import open_folder, read_whole, write_whole

PART_BYTES = 2**16
"""A log on an object store is in parts of about this size: a line costs at most the writing of one part."""


class RunFolder:
    """A folder or a URI. Example: RunFolder("s3://bucket/runs/align").write("log.jsonl", b"...")"""

    def __init__(self, uri: str | Path) -> None:
        """Raises TrainingError where it cannot be written."""
        self.uri = str(uri)
        try:
            self._files, self._path = open_folder(self.uri)
        except StorageError as error:
            raise TrainingError(f"--out {error}") from error
        self.local = Path(self._path) if self._files.type_name == "local" else None
        """Where it lies on this machine; None on an object store."""
        self._last_parts: dict[str, tuple[int, bytes]] = {}
        """Name of a log on an object store -> the number of its last part, and what is in it."""

    def __reduce__(self) -> tuple[type[RunFolder], tuple[str]]:
        return RunFolder, (self.uri,)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Within it an OSError, a full disk included, is a TrainingError that says what to do."""
        try:
            yield
        except OSError as failure:
            raise TrainingError(
                f"{name} cannot be written to {self.uri}: {failure}; make room, then start the run again: it goes on "
                "from its newest checkpoint"
            ) from failure

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Raises TrainingError where it cannot be written; then there is nothing new."""
        with self.writing(name):
            write_whole(self._files, f"{self._path}/{name}", data)

    def write_tree(self, name: str, folder: Path) -> None:
        """All files of a local folder."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.write(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def append(self, name: str, text: str) -> None:
        """Add lines to a log, which one process writes. Objects cannot grow: on a store a log is `name`, `name.1`,
        `name.2` and so on, of which the last is written again."""
        if self.local is not None:
            with self.writing(name), (self.local / name).open("ab+") as file:
                if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                    text = f"\n{text}"  # a full disk cut the last line: the next one stands on its own
                file.write(text.encode())
            return
        if name not in self._last_parts:
            parts = self._log_parts(name) or [b""]
            self._last_parts[name] = (len(parts) - 1, parts[-1])
        number, part = self._last_parts[name]
        if len(part) >= PART_BYTES:
            number, part = number + 1, b""
        part += text.encode()
        self.write(_part_name(name, number), part)
        self._last_parts[name] = (number, part)

    def read_log(self, name: str) -> bytes:
        """All lines that were appended, in order."""
        return b"".join(self._log_parts(name))

    def _log_parts(self, name: str) -> list[bytes]:
        parts: list[bytes] = []
        while (part := self.read(_part_name(name, len(parts)))) is not None:
            parts.append(part)
        return parts

    def read(self, name: str) -> bytes | None:
        return read_whole(self._files, f"{self._path}/{name}")

    def names(self, folder: str = "") -> list[str]:
        """Files and folders right in it."""
        selector = fs.FileSelector(f"{self._path}/{folder}".rstrip("/"), allow_not_found=True)
        return sorted(info.base_name for info in self._files.get_file_info(selector))

    def drop(self, folder: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.delete_dir(f"{self._path}/{folder}")


def _part_name(name: str, number: int) -> str:
    return f"{name}.{number}" if number else name
