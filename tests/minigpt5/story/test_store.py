"""A story is stored whole, found again, and found nowhere else."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

from minigpt5 import storage
from minigpt5.errors import StorageError, StoryNotFound
from minigpt5.story import store as store_module
from minigpt5.story.state import StoryBuilder, new_story_id
from minigpt5.story.store import StoryStore, default_storage
from minigpt5.types import DrawSettings, Page, PageDone, Picture, StoryRequest, Vokens
from tests.helpers.fakes import make_png
from tests.helpers.flaky_files import FlakyFiles

REQUEST = StoryRequest(prompt=("A fox",), pages=12, seed=7, draw=DrawSettings(steps=4))


@pytest.fixture(params=["path", "uri"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StoryStore:
    return StoryStore(str(tmp_path / "a b") if request.param == "path" else f"file://{tmp_path}/stories")


def picture(page: int) -> Picture:
    return Picture(page=page, png=make_png(), width=16, height=16, seed=5, denoise_steps=4)


def test_a_story_is_loaded_as_it_was_saved(store: StoryStore) -> None:
    builder = StoryBuilder(REQUEST, story_id=new_story_id(), model="storybook")
    store.save(builder.state())
    for index in (11, 2, 1):  # 11 comes after 2, not after 1
        builder.add(PageDone(page=Page(index=index, text=f"Seite {index} \u00e4", picture=picture(index))))
        store.save_page(builder.state().id, builder.page_state(index))
    state = builder.state("done")
    store.save(state)
    assert store.load(state.id) == state
    assert [page.index for page in state.pages] == [1, 2, 11]


def test_vokens_and_pictures_come_back_byte_for_byte(store: StoryStore) -> None:
    hidden_VH = np.random.default_rng(0).normal(size=(8, 576)).astype(np.float32)
    store.save_vokens("story_1", Vokens(page=2, hidden_VH=hidden_VH, fingerprint="abc"))
    store.save_picture("story_1", picture(2))
    vokens = store.load_vokens("story_1", 2)
    assert (vokens.page, vokens.fingerprint) == (2, "abc")
    np.testing.assert_array_equal(vokens.hidden_VH, hidden_VH)
    assert store.load_picture("story_1", 2) == make_png()


@pytest.mark.parametrize(
    "story_id", ["story_none", "", "..", "../x", "a/b", "a\\b", "a\0b", ".x", "x" * 65, "st\u00f6ry"]
)
def test_an_unknown_id_is_no_story(store: StoryStore, story_id: str) -> None:
    with pytest.raises(StoryNotFound):
        store.load(story_id)
    with pytest.raises(StoryNotFound):
        store.load_picture(story_id, 1)


@pytest.mark.parametrize("page", [0, -1, 3, 10**30])
def test_an_unknown_page_has_no_picture(store: StoryStore, page: int) -> None:
    store.save_picture("story_1", picture(1))
    with pytest.raises(StoryNotFound):
        store.load_picture("story_1", page)


def test_no_half_written_file_is_left(tmp_path: Path) -> None:
    store = StoryStore(str(tmp_path))
    store.save_picture("story_1", picture(1))
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert files == ["stories/story_1/pages/1/picture.png"]


@pytest.mark.parametrize("uri", ["nosuch://x/y", "/proc/version/stories"])
def test_storage_that_cannot_be_written_is_refused(uri: str) -> None:
    with pytest.raises(StorageError, match="name another folder"):
        StoryStore(uri)


def test_the_default_storage_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    assert default_storage() == "/somewhere/minigpt5"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_storage() == os.path.expanduser("~/.local/share/minigpt5")


def begin(store: StoryStore, owner: str) -> str:
    request = dataclasses.replace(REQUEST, key=owner)
    state = StoryBuilder(request, story_id=new_story_id(), model="storybook").state()
    store.save(state)
    return state.id


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[StoryStore, FlakyFiles]:
    """A store that is not local, and what is asked of it."""
    files = FlakyFiles(tmp_path)
    monkeypatch.setattr(store_module, "open_folder", lambda uri, wait_s: (fs.PyFileSystem(files), "store"))
    return StoryStore("s3://bucket/store"), files


def test_a_listing_costs_the_same_however_many_stories_others_have(remote: tuple[StoryStore, FlakyFiles]) -> None:
    store, files = remote
    own = sorted(begin(store, "alice") for _ in range(3))  # those of one tick have any order
    store.index_owners()
    num_requests = []
    for num_others in (0, 40):
        for _ in range(num_others):
            begin(store, "bob")
        files.requests, files.num_listed = [], 0
        assert store.list_ids(owner="alice") == own[::-1]
        num_requests.append((len(files.requests), files.num_listed))
    assert num_requests[0] == num_requests[1] == (1, 3)
    assert store.list_ids(owner="alice", after=own[1]) == own[:1]
    assert store.list_ids(owner="carol") == []
    assert len(store.list_ids()) == 43


def test_stories_of_an_earlier_version_are_found_and_then_indexed(remote: tuple[StoryStore, FlakyFiles]) -> None:
    store, files = remote
    own, other = begin(store, "alice"), begin(store, "bob")
    fs.PyFileSystem(files).delete_dir("store/owners")
    assert own in store.list_ids(owner="alice")  # among all: the caller looks whose they are
    store.index_owners()
    assert store.list_ids(owner="alice") == [own] and store.list_ids(owner="bob") == [other]
    files.requests = []
    store.index_owners()
    assert files.requests == ["list store/owners", "list store/stories"]  # no story is read again


def test_a_deleted_story_leaves_the_index(remote: tuple[StoryStore, FlakyFiles]) -> None:
    store, files = remote
    first, second = begin(store, "alice"), begin(store, "alice")
    store.index_owners()
    store.delete(first)
    assert store.list_ids(owner="alice") == [second]
    fs.PyFileSystem(files).delete_dir(f"store/stories/{second}")  # as by a process that died while it deleted
    assert store.list_ids(owner="alice") == [second]
    store.index_owners()
    assert store.list_ids(owner="alice") == []


def test_what_a_request_has_begun_is_forgotten_in_time(tmp_path: Path) -> None:
    store = StoryStore(str(tmp_path))
    for name in ("aa", "bb"):
        store.save_once(name, "story_1", "digest")
    old = time.time() - 100
    os.utime(tmp_path / "once/aa.json", (old, old))
    store.delete_once(older_than_s=50)
    assert store.load_once("aa") is None and store.load_once("bb") == ("story_1", "digest")


def test_a_reader_hears_at_once_of_a_store_that_fails_and_an_owner_waits(
    remote: tuple[StoryStore, FlakyFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PAUSE_S", 0.01)
    store, files = remote
    story_id = begin(store, "alice")
    owned = store.owned(1)
    files.failures_left = 1
    with pytest.raises(StorageError, match="does not answer"):
        store.load_owner(story_id)
    files.failures_left = 2
    assert owned.load_owner(story_id) == "alice" and files.failures_left == 0
    files.failures_left = 2
    assert owned.list_ids() == [story_id] and files.failures_left == 0
    files.failures_left = 2
    store.save_once("aa", story_id, "digest")
    assert files.failures_left == 0
