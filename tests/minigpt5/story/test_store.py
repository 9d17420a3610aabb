"""A story is stored whole, found again, and found nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from minigpt5.errors import StorageError, StoryNotFound
from minigpt5.story.state import StoryBuilder, new_story_id
from minigpt5.story.store import StoryStore, default_storage
from minigpt5.types import DrawSettings, Page, PageDone, Picture, StoryRequest, Vokens
from tests.helpers.fakes import make_png

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
