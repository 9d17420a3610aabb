"""Where a model folder comes from, and that nothing outside of the one that is written changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyarrow import fs

from minigpt5.errors import ModelFolderError
from minigpt5.model import folder as model_folder
from minigpt5.model.folder_config import check_folder, load_config
from minigpt5.model.locate import locate
from tests.helpers.tiny import save_tiny, tiny_config, tiny_diffusion, tiny_language, tiny_mapper, tiny_vision


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `bucket://` URIs name, as an object store that is not on this machine."""
    root = tmp_path / "bucket"

    def from_uri(uri: str) -> tuple[fs.FileSystem, str]:
        return fs.SubTreeFileSystem(str(root), fs.LocalFileSystem()), uri.removeprefix("bucket://")

    monkeypatch.setattr("minigpt5.storage.open_place", from_uri)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return root


def test_a_model_by_uri_is_fetched_once(store: Path) -> None:
    saved = save_tiny(store / "runs" / "model")
    (store / "runs" / "model" / "weights.pkl").write_bytes(b"")
    found = locate("bucket://runs/model")
    assert found.name.startswith(saved.fingerprint) and not (found / "weights.pkl").exists()
    assert check_folder(found) == saved
    (store / "runs" / "model" / "mapper.safetensors").unlink()
    assert locate("bucket://runs/model") == found
    half = (
        (store / "runs" / "model" / "config.json").read_text().replace('"context_tokens": 600', '"context_tokens": 500')
    )
    (store / "runs" / "model" / "config.json").write_text(half)
    with pytest.raises(ModelFolderError, match="have fingerprint"):  # the changed folder, which is not whole
        locate("bucket://runs/model")


def test_a_uri_that_holds_no_model_says_so(store: Path) -> None:
    store.mkdir()
    with pytest.raises(ModelFolderError, match="bucket://none cannot be read as a model folder"):
        locate("bucket://none")
    (store / "evil").mkdir()
    (store / "evil" / "config.json").write_text(Path("models/storybook/config.json").read_text())
    text = (store / "evil" / "config.json").read_text()
    fingerprint = load_config(store / "evil").fingerprint
    (store / "evil" / "config.json").write_text(text.replace(fingerprint, "../../outside"))
    with pytest.raises(ModelFolderError, match="its fingerprint is"):
        locate("bucket://evil")


def test_no_key_of_a_store_leaves_the_cache(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        """Its keys may hold any text."""

        type_name = "s3"
        open_input_file = fs.LocalFileSystem().open_input_file

        def get_file_info(self, selector: fs.FileSelector) -> list[SimpleNamespace]:
            return [SimpleNamespace(path=f"{selector.base_dir}/../../../escaped.txt", is_file=True)]

    save_tiny(store / "runs" / "model")
    (tmp_path / "escaped.txt").write_text("mine")
    (store / "escaped.txt").write_text("theirs")
    monkeypatch.setattr("minigpt5.storage.open_place", lambda uri: (Store(), str(store / "runs" / "model")))
    with pytest.raises(ModelFolderError, match="it has a file named .*escaped.txt"):
        locate("bucket://runs/model")
    assert not list((tmp_path / "cache").rglob("escaped.txt")) and (tmp_path / "escaped.txt").read_text() == "mine"


def test_a_path_is_itself_and_a_missing_one_is_said(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    assert locate(tmp_path / "model") == tmp_path / "model"
    with pytest.raises(ModelFolderError, match="is not a model folder"):
        check_folder(locate(tmp_path / "none"))


def test_a_base_diffusion_model_is_never_written(tmp_path: Path) -> None:
    base = tmp_path / "users-own"
    model_folder.save_diffusion(tiny_diffusion(tiny_config()), base)
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    config = dataclasses.replace(tiny_config(), diffusion=str(base))
    for folder, start in ((tmp_path / "one", None), (tmp_path / "two", tmp_path / "one")):
        model_folder.save(
            folder,
            config,
            language=tiny_language(config),
            mapper=tiny_mapper(config),
            vision=tiny_vision(config),
            start=start,
        )
        assert not (folder / "decoder").exists()
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before
    assert model_folder.load_decoder_model(tmp_path / "two")[2].denoiser.config.sample_size == 8


def test_a_decoder_inside_the_start_is_copied_as_it_is(tmp_path: Path) -> None:
    save_tiny(tmp_path / "start")
    config = load_config(tmp_path / "start")
    model_folder.save(
        tmp_path / "next",
        config,
        language=tiny_language(config),
        mapper=tiny_mapper(config),
        vision=tiny_vision(config),
        start=tmp_path / "start",
    )
    files = sorted(path.relative_to(tmp_path / "start") for path in (tmp_path / "start" / "decoder").rglob("*.*"))
    assert files
    for name in files:
        assert (tmp_path / "next" / name).read_bytes() == (tmp_path / "start" / name).read_bytes()
