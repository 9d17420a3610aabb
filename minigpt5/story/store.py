"""StoryStore: stories on any file system, each file written whole or not at all.

stories/<id>/story.json                  the StoryState without its pages
stories/<id>/request.json                what was asked for, pictures and all
stories/<id>/pages/<n>/page.json         a PageState: text, then the picture's settings
stories/<id>/pages/<n>/vokens.safetensors
stories/<id>/pages/<n>/picture.png       the first picture; later variants are picture-1.png, picture-2.png, ...
images/<name>.<png, jpeg or webp>        pictures outside of stories, for an hour
once/<name>.json                         the story that a request which may come twice has begun
owners/<digest>/<id>                     an index: the stories of one owner; empty files
running/<id>                             while a story is being made: its owner's number; a process that resumes it
                                         finds it there

Ids of stories begin with the time of their making, so that their order is the order of time.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from pyarrow import ArrowException, fs

from minigpt5.codec import from_json, to_json
from minigpt5.errors import StorageError, StoryDamaged, StoryNotFound, StoryTaken
from minigpt5.storage import open_folder, patient, read_whole, unusable, write_whole
from minigpt5.story.state import PageState, Status, StoryState
from minigpt5.story.voken_file import pack, unpack
from minigpt5.types import Page, Picture, Story, StoryRequest, Vokens

logger = logging.getLogger("ray.serve")

T = TypeVar("T")
IMAGE_NAME = re.compile(r"img_[0-9a-f]{41}\.(png|jpeg|webp)", re.ASCII)
WAIT_S = 30.0
"""How long what is written waits for an object store that fails; and a read for a story that is being made."""
STORY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)


def default_storage() -> str:
    """`$XDG_DATA_HOME/minigpt5`, else `~/.local/share/minigpt5`."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return str(Path(home) / "minigpt5")


class StoryStore:
    """Stories under one URI (s3://..., gs://..., file://...) or folder.

    Example: store = StoryStore("s3://bucket/stories"); store.load("story_3f").status
    """

    def __init__(self, uri: str) -> None:
        """Raises StorageError where `uri` cannot be written."""
        try:
            self._readable, self._base = open_folder(uri, wait_s=0)
            probe = f"{self._base}/stories/.probe-{secrets.token_hex(4)}"
            write_whole(self._readable, probe, b"")
            self._readable.delete_file(probe)
        except (OSError, ArrowException) as error:
            raise unusable(f"storage {uri}", "cannot be written", error) from error
        self._writable = patient(self._readable, wait_s=WAIT_S)
        self.uri = uri
        self._number: int | None = None
        self._is_indexed = False

    def owned(self, number: int) -> StoryStore:
        """The same stories, for who changes one under a lease with this number: what is written after somebody with a
        higher one has taken the story raises StoryTaken. Its reads wait for a store that fails, as all writes do; a
        mere reader hears of it at once."""
        store = copy.copy(self)
        store._number, store._readable = number, self._writable
        return store

    def save(self, state: StoryState) -> None:
        """Everything but the pages, which `save_page` writes each by itself."""
        if state.status == "drawing":
            self._write(_entry(state.owner, state.id), b"")  # before the story: no story is missing from it
        self._write_of(state.id, "story.json", _to_bytes(to_json(dataclasses.replace(state, pages=()))))

    def save_page(self, story_id: str, page: PageState) -> None:
        self._write_of(story_id, f"{_page(story_id, page.index)}/page.json", _to_bytes(to_json(page)))

    def save_vokens(self, story_id: str, vokens: Vokens) -> None:
        self._write_of(story_id, f"{_page(story_id, vokens.page)}/vokens.safetensors", pack(vokens))

    def save_picture(self, story_id: str, picture: Picture, *, variant: int = 0) -> None:
        self._write_of(story_id, f"{_page(story_id, picture.page)}/{_picture_name(variant)}", picture.png)

    def save_request(self, story_id: str, request: StoryRequest) -> None:
        self._write_of(story_id, "request.json", _to_bytes(to_json(dataclasses.replace(request, previous=()))))

    def load_request(self, story_id: str) -> StoryRequest:
        """Raises StoryNotFound."""
        missing = f"story {story_id!r} has no stored request"
        return self._parse(StoryRequest, f"{_folder(story_id)}/request.json", missing)

    def mark(self, story_id: str, *, is_running: bool) -> None:
        """Note that a story is being made, by the owner of this store's number, or no longer. Raises StoryTaken."""
        path = f"running/{_checked(story_id)}"
        if is_running:
            number = str(self._number or 0).encode()
            self._write(path, number, check=lambda: self._check_owner(story_id, is_first=True))
        else:
            self._check_owner(story_id)
            self._delete(path)

    def _check_owner(self, story_id: str, *, is_first: bool = False) -> None:
        """`is_first`: there need not be one."""
        if self._number is None:
            return
        try:
            owner = int(self._read(f"running/{_checked(story_id)}", "") or 0)
        except StoryNotFound:
            owner = 0 if is_first else -1
        if owner == self._number or (is_first and owner < self._number):
            return
        raise StoryTaken(f"{story_id} is no longer made under number {self._number}: another process has taken it")

    def _write_of(self, story_id: str, name: str, data: bytes) -> None:
        """A file of a story."""
        self._write(f"{_folder(story_id)}/{name}", data, check=lambda: self._check_owner(story_id))

    def running(self) -> list[str]:
        """Stories that were being made when somebody last looked after them, oldest first."""
        return sorted(filter(STORY_ID.fullmatch, self._names("running")))

    def save_once(self, name: str, story_id: str, digest: str) -> None:
        """Note which story a request has begun, and a digest of its body. `name`: hexadecimal."""
        self._write(f"once/{name}.json", _to_bytes({"id": story_id, "digest": digest}))

    def load_once(self, name: str) -> tuple[str, str] | None:
        """Its story and digest, where there was such a request."""
        try:
            values = json.loads(self._read(f"once/{name}.json", ""))
        except StoryNotFound:
            return None
        return values["id"], values["digest"]

    def delete_once(self, *, older_than_s: float) -> None:
        """Forget which stories requests began that long ago."""
        oldest = time.time() - older_than_s
        for info in self._list("once"):
            if info.is_file and info.mtime.timestamp() < oldest:
                self._delete(info.path)

    def save_image(self, data: bytes, *, kind: str) -> str:
        """Keep a picture outside of any story. Returns its file name, which nobody guesses; later ones are greater.

        `kind`: "png", "jpeg" or "webp".
        """
        name = f"img_{int(time.time()):09x}{secrets.token_hex(16)}.{kind}"
        self._write(f"images/{name}", data)
        return name

    def load_image(self, name: str) -> bytes:
        """Raises StoryNotFound."""
        missing = f"no picture {name[:80]!r}"
        if not IMAGE_NAME.fullmatch(name):
            raise StoryNotFound(missing)
        return self._read(f"images/{name}", missing)

    def delete_images(self, *, older_than_s: float) -> None:
        oldest = f"img_{int(time.time() - older_than_s):09x}"
        for name in self._names("images"):
            if IMAGE_NAME.fullmatch(name) and name < oldest:
                self._delete(f"images/{name}")

    def list_ids(self, *, owner: str | None = None, after: str | None = None) -> list[str]:
        """Newest first, beginning with the one before `after`. With `owner` its own alone, once `index_owners` has
        run; those of all until then."""
        folder = "stories" if owner is None or not self._is_indexed else f"owners/{_digest(owner)}"
        ids = sorted(filter(STORY_ID.fullmatch, self._names(folder)), reverse=True)
        return [story_id for story_id in ids if after is None or story_id < after]

    def index_owners(self) -> None:
        """Add to the index the stories that are not in it, as those of earlier versions, and take out the deleted."""
        listed = self._list("owners", recursive=True)
        entries = {info.base_name: info.path for info in listed if STORY_ID.fullmatch(info.base_name) and info.is_file}
        stories = set(self.list_ids())  # after the entries: a story that begins now is not taken for a deleted one
        for story_id in stories - entries.keys():
            with contextlib.suppress(StoryNotFound):  # deleted meanwhile
                self._write(_entry(self.load_owner(story_id), story_id), b"")
        for story_id in entries.keys() - stories:
            self._delete(entries[story_id])
        self._is_indexed = True

    def sizes(self) -> dict[str, int]:
        """Bytes by story."""
        found: dict[str, int] = {}
        for info in self._list("stories", recursive=True):
            story_id = info.path.split("/")[1] if info.is_file else ""
            if STORY_ID.fullmatch(story_id):
                found[story_id] = found.get(story_id, 0) + info.size
        return found

    def delete(self, story_id: str) -> None:
        """Raises StoryNotFound."""
        self._check_owner(story_id)
        entry = ""
        with contextlib.suppress(StoryNotFound):  # one that was not begun after all has a folder and no owner
            entry = _entry(self.load_owner(story_id), story_id)
        try:
            with self._answers():
                self._writable.delete_dir(f"{self._base}/{_folder(story_id)}")
        except FileNotFoundError:
            raise StoryNotFound(f"no story {story_id!r}") from None
        if entry:
            self._delete(entry)

    def load_owner(self, story_id: str) -> str:
        """Load the owner of a story. Raises StoryNotFound."""
        return self._load_empty(story_id).owner

    def load_status(self, story_id: str) -> Status:
        """Load how far a story is. Raises StoryNotFound."""
        return self._load_empty(story_id).status

    def load(self, story_id: str) -> StoryState:
        """Raises StoryNotFound."""
        state = self._load_empty(story_id)
        infos = self._list(f"{_folder(story_id)}/pages", recursive=True)
        paths = [info.path for info in infos if info.base_name == "page.json"]
        pages = [self._parse(PageState, path, f"no story {story_id!r}") for path in paths]
        return dataclasses.replace(state, pages=tuple(sorted(pages, key=lambda page: page.index)))

    def _load_empty(self, story_id: str) -> StoryState:
        """Without its pages. Raises StoryNotFound."""
        return self._parse(StoryState, f"{_folder(story_id)}/story.json", f"no story {story_id!r}")

    def _parse(self, kind: type[T], path: str, missing: str) -> T:
        """Raises StoryNotFound, or StoryDamaged, which is one as well: who lists stories passes over it."""
        try:
            return from_json(kind, json.loads(self._read(path, missing)))
        except (ValueError, TypeError, AttributeError) as error:
            logger.error("%s is damaged: %s", path, error)
            raise StoryDamaged(f"{missing} that can be read: {path} is damaged") from error

    def load_vokens(self, story_id: str, page: int) -> Vokens:
        """Raises StoryNotFound."""
        data = self._read(
            f"{_folder(story_id)}/{_page(story_id, page)}/vokens.safetensors",
            f"story {story_id!r} has no vokens on page {page}",
        )
        return unpack(data, page=page)

    def load_story(self, story_id: str) -> Story:
        """With its pictures, those that are shown. Raises StoryNotFound."""
        state = self.load(story_id)
        pages = [
            Page(index=page.index, text=page.text, picture=self.load_shown(story_id, page), error=page.error)
            for page in state.pages
        ]
        return Story(
            id=state.id,
            prompt=state.prompt,
            seed=state.seed,
            model=state.model,
            pages=tuple(pages),
            usage=state.usage,
        )

    def load_shown(self, story_id: str, page: PageState) -> Picture | None:
        """The picture that a page shows, where it has one. Raises StoryNotFound."""
        if page.image is None:
            return None
        return Picture(
            page=page.index,
            png=self.load_picture(story_id, page.index, variant=page.variant),
            width=page.image.width,
            height=page.image.height,
            seed=page.image.seed,
            denoise_steps=page.image.draw.steps,
            is_resampled=page.image.is_resampled,
        )

    def load_page(self, story_id: str, page: int) -> PageState:
        """Raises StoryNotFound."""
        missing = f"story {story_id!r} has no page {page}"
        return self._parse(PageState, f"{_folder(story_id)}/{_page(story_id, page)}/page.json", missing)

    def load_picture(self, story_id: str, page: int, *, variant: int = 0) -> bytes:
        """The PNG. Raises StoryNotFound."""
        missing = f"story {story_id!r} has no picture{f' {variant}' if variant else ''} on page {page}"
        return self._read(f"{_folder(story_id)}/{_page(story_id, page)}/{_picture_name(variant)}", missing)

    def forget_drawing(self, story_id: str, page: int) -> None:
        """Remove a page's vokens and pictures: its text is another one now."""
        self._check_owner(story_id)
        folder = f"{_folder(story_id)}/{_page(story_id, page)}"
        for name in self._names(folder):
            if name != "page.json":
                self._delete(f"{folder}/{name}")

    def _write(self, path: str, data: bytes, *, check: Callable[[], None] = lambda: None) -> None:
        with self._answers():
            write_whole(self._writable, f"{self._base}/{path}", data, check=check)

    def _delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._answers():
            self._writable.delete_file(f"{self._base}/{path}")

    def _names(self, folder: str) -> list[str]:
        return [info.base_name for info in self._list(folder) if not info.base_name.endswith(".tmp")]

    def _list(self, folder: str, *, recursive: bool = False) -> list[fs.FileInfo]:
        """What is in a folder, by paths in this store; nothing where there is none."""
        files = fs.SubTreeFileSystem(self._base, self._readable)
        selector = fs.FileSelector(folder, allow_not_found=True, recursive=recursive)
        for _ in range(3):
            # A folder may come into being, or go, just then.
            with contextlib.suppress(FileNotFoundError), self._answers():
                return files.get_file_info(selector)
        return []

    def _read(self, path: str, missing: str) -> bytes:
        with self._answers():
            data = read_whole(self._readable, f"{self._base}/{path}")
        if data is None:
            raise StoryNotFound(missing)
        return data

    @contextlib.contextmanager
    def _answers(self) -> Iterator[None]:
        """Within it a failure of the file system is a StorageError, which says no more than a client may know."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, ArrowException) as error:
            raise StorageError("the storage of the stories does not answer: try again later") from error


def _checked(story_id: str) -> str:
    """An id that is no id of ours is a story that does not exist."""
    if not STORY_ID.fullmatch(story_id):
        raise StoryNotFound(f"no story {story_id[:80]!r}")
    return story_id


def _folder(story_id: str) -> str:
    """Where a story lies."""
    return f"stories/{_checked(story_id)}"


def _digest(owner: str) -> str:
    """An owner as a folder's name: owners may hold anything."""
    return hashlib.sha256(owner.encode()).hexdigest()[:32]


def _entry(owner: str, story_id: str) -> str:
    """Where the index of owners has a story."""
    return f"owners/{_digest(owner)}/{_checked(story_id)}"


def _page(story_id: str, page: int) -> str:
    """Where a page lies in it."""
    if not 1 <= page <= 9999:
        raise StoryNotFound(f"story {story_id!r} has no page {str(page)[:20]}")
    return f"pages/{page}"


def _picture_name(variant: int) -> str:
    return f"picture-{variant}.png" if variant else "picture.png"


def _to_bytes(values: dict[str, object]) -> bytes:
    return json.dumps(values, ensure_ascii=False, indent=1).encode()
