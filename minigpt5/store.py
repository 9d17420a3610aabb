"""StoryStore: stories on any file system, each file written whole or not at all.

stories/<id>/story.json                  the StoryState without its pages
stories/<id>/pages/<n>/page.json         a PageState: text, then the picture's settings
stories/<id>/pages/<n>/vokens.safetensors
stories/<id>/pages/<n>/picture.png
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
from pathlib import Path

from pyarrow import fs

from minigpt5.errors import StorageError, StoryNotFound
from minigpt5.story import PageState, StoryState, page_from_json, state_from_json
from minigpt5.types import Picture, Vokens
from minigpt5.voken_file import pack, unpack

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
            if "://" in uri:
                filesystem, base = fs.FileSystem.from_uri(uri)
            else:
                filesystem, base = fs.LocalFileSystem(), str(Path(uri).expanduser().resolve())
            filesystem.create_dir(f"{base}/stories", recursive=True)
            self._is_local = filesystem.type_name == "local"
            self._files = fs.SubTreeFileSystem(base, filesystem)
            self._write(f"stories/.probe-{secrets.token_hex(4)}", None)
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise StorageError(
                f"storage {uri} cannot be written ({error}): name another folder or URI, or give it write permission"
            ) from error
        self.uri = uri

    def save(self, state: StoryState) -> None:
        """Everything but the pages, which `save_page` writes each by itself."""
        values = dataclasses.asdict(state)
        del values["pages"]
        self._write(f"{_folder(state.id)}/story.json", _to_bytes(values))

    def save_page(self, story_id: str, page: PageState) -> None:
        self._write(f"{_folder(story_id, page.index)}/page.json", _to_bytes(dataclasses.asdict(page)))

    def save_vokens(self, story_id: str, vokens: Vokens) -> None:
        self._write(f"{_folder(story_id, vokens.page)}/vokens.safetensors", pack(vokens))

    def save_picture(self, story_id: str, picture: Picture) -> None:
        self._write(f"{_folder(story_id, picture.page)}/picture.png", picture.png)

    def load(self, story_id: str) -> StoryState:
        """Raises StoryNotFound."""
        values = json.loads(self._read(f"{_folder(story_id)}/story.json", f"no story {story_id!r}"))
        selector = fs.FileSelector(f"{_folder(story_id)}/pages", allow_not_found=True, recursive=True)
        paths = [info.path for info in self._files.get_file_info(selector) if info.base_name == "page.json"]
        pages = [page_from_json(json.loads(self._read(path, f"no story {story_id!r}"))) for path in paths]
        return state_from_json(values, pages=tuple(sorted(pages, key=lambda page: page.index)))

    def load_vokens(self, story_id: str, page: int) -> Vokens:
        """Raises StoryNotFound."""
        data = self._read(
            f"{_folder(story_id, page)}/vokens.safetensors", f"story {story_id!r} has no vokens on page {page}"
        )
        return unpack(data, page=page)

    def load_picture(self, story_id: str, page: int) -> bytes:
        """The PNG. Raises StoryNotFound."""
        return self._read(f"{_folder(story_id, page)}/picture.png", f"story {story_id!r} has no picture on page {page}")

    def _write(self, path: str, data: bytes | None) -> None:
        """Put a whole file in place; `None` only proves that one could be."""
        # A rename is atomic on a local file system; an object store shows an object only when it is complete.
        written = f"{path}.{secrets.token_hex(4)}.tmp" if self._is_local else path
        self._files.create_dir(path.rpartition("/")[0], recursive=True)
        with self._files.open_output_stream(written) as file:
            file.write(data or b"")
        if data is None:
            self._files.delete_file(written)
        elif written != path:
            self._files.move(written, path)

    def _read(self, path: str, missing: str) -> bytes:
        try:
            with self._files.open_input_stream(path, compression=None) as file:
                return file.read()
        except FileNotFoundError:
            raise StoryNotFound(missing) from None


def _folder(story_id: str, page: int | None = None) -> str:
    """Where a story or one of its pages lies. An id that is no id of ours is a story that does not exist."""
    if not STORY_ID.fullmatch(story_id):
        raise StoryNotFound(f"no story {story_id[:80]!r}")
    if page is None:
        return f"stories/{story_id}"
    if not 1 <= page <= 9999:
        raise StoryNotFound(f"story {story_id!r} has no page {str(page)[:20]}")
    return f"stories/{story_id}/pages/{page}"


def _to_bytes(values: dict[str, object]) -> bytes:
    return json.dumps(values, ensure_ascii=False, indent=1).encode()
