"""The user's cache: folders that are filled once, and the hashes of weight files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from minigpt5.errors import MiniGPT5Error, ModelFolderError
from minigpt5.types import DISTILLED_FOLDER

UNUSED_WEIGHTS = ("*.fp16[.-]*safetensors", "*.bf16[.-]*safetensors", "*pruned*.safetensors")
"""Second copies of weights in repositories of the hub, whole or in shards."""
QUANTISED = "quantised.safetensors"
"""A base model's own quantised weights, beside the float32 ones that they stand for: see `quantised.py`."""
KEPT_BYTES = 2**24
"""Smallest file whose hash is kept; a smaller one is read in no time."""
SETTLED_S = 2.0
"""Age of a file's last change before its hash is kept: a second change within a clock's tick has the same time."""
NOT_MODELS = re.compile("Scheduler|Tokenizer|Processor|FeatureExtractor")
"""In the class names of a pipeline's parts that have no weights."""


def keep_in_cache(name: str, fill: Callable[[Path], None]) -> Path:
    """A folder of the user's cache, filled now if it is not there: whole or absent, by one process at a time.

    `fill` is called with an empty folder. Raises MiniGPT5Error where the cache cannot be written.
    """
    target = cache_folder() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f"{target.name}.lock")):
            if not target.is_dir():  # another process may have done it while this one waited
                _fill(target, fill)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise
        raise MiniGPT5Error(
            f"cannot keep {target.name} in {target.parent}: {error}. "
            "Set XDG_CACHE_HOME to a folder that is writable and has room"
        ) from error
    return target


def _fill(target: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder beside the target and rename it there: the target is whole or absent. Needs the lock."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        partial.mkdir()
        fill(partial)
        for path in [partial, *partial.rglob("*")]:
            if path.is_file():
                path.chmod(0o644)  # safetensors makes its files private; a cache in an image has other readers
            _sync(path)
        os.replace(partial, target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def list_parts(folder: Path) -> tuple[str, ...]:
    """Folders of the models that diffusers and transformers read for a pipeline, as `model_index.json` lists them.
    Empty where a folder has no such file."""
    index = folder / "model_index.json"
    if not index.is_file():
        return ()
    entries = json.loads(index.read_text())
    return tuple(
        name
        for name, entry in entries.items()
        if isinstance(entry, list) and entry[0] in ("diffusers", "transformers") and not NOT_MODELS.search(entry[1])
    )


def hash_weights(folder: Path, *, without: str = "") -> str:
    """SHA-256 over the safetensors files of a base model, in order of path, but for a file named `without`. A
    large file is read once: see `hash_file`.

    Of a pipeline's folder only the parts count: beside them, the hub keeps the same weights as one file."""
    digest = hashlib.sha256()
    skipped = {path for pattern in (*UNUSED_WEIGHTS, QUANTISED, without) if pattern for path in folder.rglob(pattern)}
    parts = list_parts(folder)
    places = [folder / part for part in (*parts, DISTILLED_FOLDER)] if parts else [folder]
    paths = sorted({path for place in places for path in place.rglob("*.safetensors")} - skipped)
    if not paths:
        raise ModelFolderError(f"{folder} has no safetensors weights: convert it, other formats are not read")
    for path in paths:
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(hash_file(path).encode())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file. That of a large one is kept in the cache beside what changes with the file: its size, its
    inode, and its times of change, of which a program can set one back and not the other."""
    found = path.resolve().stat()
    if found.st_size < KEPT_BYTES:
        return _read_hash(path)
    name = f"{path.resolve()}\n{found.st_size}\n{found.st_ino}\n{found.st_mtime_ns}\n{found.st_ctime_ns}"
    key = hashlib.sha256(name.encode()).hexdigest()
    known = cache_folder() / "hashes" / key
    with contextlib.suppress(OSError):
        return known.read_text()
    is_settled = time.time() - max(found.st_mtime, found.st_ctime) > SETTLED_S
    digest = _read_hash(path)
    if is_settled:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time alone
            known.parent.mkdir(parents=True, exist_ok=True)
            partial = known.with_name(f"{key}.{os.getpid()}.tmp")
            partial.write_text(digest)
            os.replace(partial, known)
    return digest


def _read_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    file_descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file_descriptor)
    finally:
        os.close(file_descriptor)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system releases by itself when its process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cache_folder() -> Path:
    """Return $XDG_CACHE_HOME/minigpt5, else ~/.cache/minigpt5."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "minigpt5"
