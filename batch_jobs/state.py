"""What a job keeps beside its output, so that a later run resumes where this one was killed.

For an output at URI:

    URI.state/manifest.json              what the job is: input, model, settings; at its end its counts
    URI.state/owner.json                 which process works on it
    URI.state/pages/<story>/<n>.json     a page's text and vokens, from when they are written
    URI.state/pages/<story>/<n>.png      its picture, from when it is drawn
    URI.pictures/<story>-<n>.png         instead of the line above, where rows are to name pictures and not to hold them

The unit of resume is the page's text and the page's picture: each is stored whole or not at all, before anybody hears
of it, and one that is stored is never made again. A story whose row lies in the output needs its pages no longer.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import psutil
from pyarrow import ArrowException, fs

from minigpt5.errors import MiniGPT5Error
from minigpt5.storage import open_place, read_json, read_whole, unusable, write_whole

HEARTBEAT_S = 5.0
"""How often a working job says that it lives."""
SILENCE_S = 20.0
"""A job on another machine that says nothing for so long is dead."""


@dataclass(frozen=True, kw_only=True)
class StoredPage:
    """A page's text with its vokens, as `voken_file.pack` packs them."""

    text: str
    vokens: bytes


class PageStore:
    """Pages that are made but not yet in the output. Cheap to open: every actor opens its own. All raises StorageError
    where the store fails.

    Example: PageStore("s3://bucket/stories").save_text("fox", 1, StoredPage(text="...", vokens=b"..."))
    """

    def __init__(self, output: str, *, keeps_pictures: bool = False) -> None:
        """`keeps_pictures`: pictures stay files of their own, beside the output."""
        self.output, self.keeps_pictures = output.rstrip("/"), keeps_pictures
        self._files, base = open_place(self.output)
        self._base = base
        self._pages, self._pictures = f"{base}.state/pages", f"{base}.pictures"

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_page_store, (self.output, self.keeps_pictures)

    def load_texts(self, story: str) -> list[StoredPage]:
        """The story's pages from the first on, as far as they are written."""
        pages: list[StoredPage] = []
        while (data := self._read(f"{self._folder(story)}/{len(pages) + 1}.json")) is not None:
            values = json.loads(data)
            pages.append(StoredPage(text=values["text"], vokens=base64.b64decode(values["vokens"])))
        return pages

    def save_text(self, story: str, page: int, stored: StoredPage) -> None:
        values = {"text": stored.text, "vokens": base64.b64encode(stored.vokens).decode()}
        self._write(f"{self._folder(story)}/{page}.json", json.dumps(values).encode())

    def has_picture(self, story: str, page: int) -> bool:
        path = self._picture(story, page)
        with self._answers():
            return self._files.get_file_info(path).type == fs.FileType.File

    def load_picture(self, story: str, page: int) -> bytes | None:
        return self._read(self._picture(story, page))

    def save_picture(self, story: str, page: int, png: bytes) -> None:
        self._write(self._picture(story, page), png)

    def picture_uri(self, story: str, page: int) -> str:
        """Where a picture that is kept lies, beside the output and named as the output is."""
        return f"{self.output}.pictures/{_key(story)}-{page}.png"

    def drop(self, story: str) -> None:
        """Its row is in the output: what was kept for it goes. Pictures that rows name stay."""
        with self._answers(), contextlib.suppress(FileNotFoundError):
            self._files.delete_dir(self._folder(story))

    def drop_all_but(self, stories: set[str]) -> int:
        """Keep what belongs to `stories`, of whom some have pages; the number of those."""
        keys = {_key(story) for story in stories}
        kept = 0
        with self._answers():
            for info in self._files.get_file_info(fs.FileSelector(self._pages, allow_not_found=True)):
                if info.base_name in keys:
                    kept += 1
                else:
                    self._files.delete_dir(info.path)
        return kept

    def left_over(self) -> list[str]:
        """Folders beside the output that hold files which a job would take for its own. Before a job has begun there
        should be none."""
        endings = (".state/pages", ".pictures", ".books")
        with self._answers():
            return [self.output + ending for ending in endings if self._has_files(self._base + ending)]

    def _has_files(self, folder: str) -> bool:
        found = self._files.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
        return any(info.is_file and not info.base_name.startswith(".") for info in found)

    def _read(self, path: str) -> bytes | None:
        with self._answers():
            return read_whole(self._files, path)

    def _write(self, path: str, data: bytes) -> None:
        with self._answers():
            write_whole(self._files, path, data)

    @contextlib.contextmanager
    def _answers(self) -> Iterator[None]:
        """Within it a failure of the file system is a StorageError."""
        try:
            yield
        except (OSError, ArrowException) as error:
            raise unusable(f"output {self.output}", "does not answer", error) from error

    def _folder(self, story: str) -> str:
        return f"{self._pages}/{_key(story)}"

    def _picture(self, story: str, page: int) -> str:
        if self.keeps_pictures:
            return f"{self._pictures}/{_key(story)}-{page}.png"
        return f"{self._folder(story)}/{page}.png"


def _new_page_store(output: str, keeps_pictures: bool) -> PageStore:
    return PageStore(output, keeps_pictures=keeps_pictures)


def _key(story: str) -> str:
    """An id as a file's name: ids may hold anything."""
    return hashlib.sha256(story.encode()).hexdigest()[:32]


class JobState:
    """The manifest and the owner of one output.

    Example: state = JobState(uri); if not state.is_finished(plan): state.take(plan); ...; state.finish(counts)
    """

    def __init__(self, output: str) -> None:
        self.output = output.rstrip("/")
        self._files, base = open_place(self.output)
        self._manifest, self._owner = f"{base}.state/manifest.json", f"{base}.state/owner.json"
        self._token = secrets.token_hex(8)
        self._plan: dict[str, Any] = {}
        self._num_heartbeats, self._heartbeat_at = 0, 0.0

    def is_finished(self, plan: dict[str, Any], *, earlier: Mapping[str, Any] = MappingProxyType({})) -> bool:
        """Whether an earlier run did all of `plan`. Raises MiniGPT5Error where it was another plan.

        `earlier`: what an earlier version noted in the place of some of its values."""
        manifest = self.manifest()
        if manifest is None:
            return False
        old = manifest["plan"]
        known = {**plan, **{name: value for name, value in earlier.items() if old.get(name) == value}}
        changed = [name for name in sorted({*old, *plan}) if old.get(name) != known.get(name)]
        if changed:
            differences = ", ".join(f"{name} is {plan.get(name)!r} but was {old.get(name)!r}" for name in changed)
            raise MiniGPT5Error(
                f"output {self.output} belongs to a job with other settings ({differences}): name another output, or "
                "ask for the same again"
            )
        return manifest["status"] == "finished"

    def manifest(self) -> dict[str, Any] | None:
        return read_json(self._files, self._manifest)

    def take(self, plan: dict[str, Any]) -> bool:
        """Become the owner; whether an earlier run had begun. Raises MiniGPT5Error while another process is."""
        owner = read_json(self._files, self._owner)
        if owner and _is_alive(owner, lambda: read_json(self._files, self._owner)):
            raise MiniGPT5Error(
                f"output {self.output} is being worked on by process {owner['pid']} on {owner['host']}: wait for its "
                "end, or stop it first"
            )
        was_begun = self.manifest() is not None
        self._plan = plan
        self._put(self._manifest, {"status": "begun", "plan": plan})
        self.heartbeat()
        return was_begun

    def heartbeat(self) -> None:
        """Say that this process lives, at most every HEARTBEAT_S."""
        if self._num_heartbeats and time.monotonic() - self._heartbeat_at < HEARTBEAT_S:
            return
        process, began = psutil.Process(), time.monotonic()
        owner = {"token": self._token, "host": socket.gethostname(), "pid": process.pid}
        owner |= {"started": process.create_time(), "beat": self._num_heartbeats + 1}
        self._put(self._owner, owner)
        self._num_heartbeats, self._heartbeat_at = self._num_heartbeats + 1, began

    def check_owner(self) -> None:
        """Raise MiniGPT5Error where another process took over: nothing may be put into the output any more."""
        self._num_heartbeats = max(1, self._num_heartbeats)
        self._check_owner()

    def finish(self, counts: dict[str, Any]) -> None:
        self.check_owner()
        self._put(self._manifest, {"status": "finished", "plan": self._plan, **counts})

    def release(self) -> None:
        """Give the output back, so that another run may take it."""
        owner = read_json(self._files, self._owner)
        if owner and owner["token"] == self._token:
            self._files.delete_file(self._owner)

    def _put(self, path: str, content: dict[str, Any]) -> None:
        """Raises MiniGPT5Error where another process took over, also while the store did not answer."""
        try:
            write_whole(self._files, path, _to_json(content), check=self._check_owner)
        except (OSError, ArrowException) as error:
            raise unusable(f"output {self.output}", "cannot be written", error) from error

    def _check_owner(self) -> None:
        owner = read_json(self._files, self._owner) if self._num_heartbeats else None
        if owner and owner["token"] != self._token:
            raise MiniGPT5Error(
                f"output {self.output} was taken over by process {owner['pid']} on {owner['host']}: this one stops"
            )


def _is_alive(owner: dict[str, Any], read_again: Any) -> bool:
    """Whether an owner works: its process where it is of this machine, else its beat."""
    if owner["host"] == socket.gethostname():
        try:
            process = psutil.Process(owner["pid"])
            return process.create_time() == owner["started"] and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
    deadline = time.monotonic() + SILENCE_S
    while time.monotonic() < deadline:
        time.sleep(1)
        again = read_again()
        if again is None:
            return False
        if again["beat"] != owner["beat"] or again["token"] != owner["token"]:
            return True
    return False


def _to_json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, indent=1, default=str).encode()
