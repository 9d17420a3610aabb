"""Tar files as webdataset writes them -> the parts of its samples, in order. dataset_readers.py makes items of them.

A sample is the members that follow one another and have the same key: `a/1.input.jpg` and `a/1.output.txt` are the
parts `input.jpg` and `output.txt` of `a/1`. `tarfile` alone takes a damaged header, and the missing end of a file that
was cut, for the end of the archive.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace

from batch_jobs.text_files import CUT
from minigpt5.errors import StorageError

MAX_PART_BYTES = 2**26
BLOCK = 512

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.S)
"""A key ends at the first dot of the base name."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A member of a tar file. Example: Part(key="a/1", extension="input.jpg", data=b"...", size_bytes=3)"""

    key: str
    extension: str
    data: bytes | None
    """None where it is no picture and no caption, or is too large."""
    size_bytes: int

    @property
    def suffix(self) -> str:
        return "." + self.extension.rpartition(".")[2]


class _Member(tarfile.TarInfo):
    """A header that is no header is an error: `tarfile` takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # typeshed has the class's public parents alone
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def read_parts(file: io.BufferedReader, *, name: str, suffixes: tuple[str, ...]) -> Iterator[Part]:
    """The parts of a seekable tar file; those with other suffixes have no data.

    Raises StorageError, which names the byte, where the archive ends early, is damaged, or has more behind its end.
    """
    whole_until = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as archive:
            while member := archive.next():
                named = _NAME.fullmatch(member.name)
                if named and member.isfile():
                    part = Part(key=named[1], extension=named[2].lower(), data=None, size_bytes=member.size)
                    content = archive.extractfile(member)
                    if content and part.suffix in suffixes and member.size <= MAX_PART_BYTES:
                        part = replace(part, data=content.read())
                    yield part
                whole_until = member.offset_data + -(-member.size // BLOCK) * BLOCK
        while rest := file.read(2**20):
            if rest.strip(b"\0"):
                raise tarfile.ReadError("there is more behind its end, as where two were joined: split them")
    except (tarfile.TarError, ValueError, OverflowError, *CUT) as error:
        raise StorageError(f"{name} is whole up to byte {whole_until} and no further ({error})") from error


def only(parts: list[Part], suffixes: tuple[str, ...]) -> Part | None:
    """The part of these suffixes; of several the one that has no other extension. Raises ValueError where several do,
    or none."""
    found = [part for part in parts if part.suffix in suffixes]
    plain = [part for part in found if part.suffix == f".{part.extension}"]
    chosen = plain or found
    if len(chosen) > 1:
        raise ValueError(f"several parts: {', '.join(part.extension for part in chosen)} have this key; leave one")
    return chosen[0] if chosen else None
