"""A book's file: what it may be called, and how it is written, whole or not at all. No torch here."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from minigpt5.errors import StorageError

BOOKS = (".html", ".epub", ".pdf")


def check_place(path: str | Path) -> None:
    """Raise StorageError where no book can be written: for a look before the work that a story is."""
    target = Path(path)
    if target.suffix.lower() not in BOOKS:
        raise StorageError(f"{str(path)!r} must end in one of {', '.join(BOOKS)}: name a file such as story.html")
    try:
        if not target.parent.is_dir():
            raise StorageError(
                f"{path} cannot be written: there is no folder {target.parent}; create it or name another"
            )
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(target.stat().st_mode):
                raise StorageError(f"{path} cannot be written: it is a folder; name a file in it")
    except OSError as error:
        raise _unwritable(path, error) from error
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise StorageError(f"{path} cannot be written: folder {target.parent} is read-only; name another")


def write_book(path: str | Path, data: bytes) -> None:
    """Put a book in place. Raises StorageError; then an earlier one is as it was."""
    target = Path(path)
    partial = target.with_name(f".{secrets.token_hex(8)}.tmp")  # short, so that every legal name can be written
    try:
        partial.write_bytes(data)
        os.replace(partial, target)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _unwritable(path: str | Path, error: OSError) -> StorageError:
    return StorageError(f"{path} cannot be written ({error.strerror}): name another file")
