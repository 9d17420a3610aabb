"""The model folder: what it says to people is kept, and neither changes its fingerprint nor harms a reader."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from minigpt5.codec import to_json
from minigpt5.config import LoraConfig, default_model_folder, storybook
from minigpt5.errors import ModelFolderError
from minigpt5.model import cache
from minigpt5.model.cache import KEPT_BYTES
from minigpt5.model.folder import MAX_EXAMPLE_PICTURE_BYTES, load_example_pictures, save_distilled
from minigpt5.model.folder_config import check_folder, compute_fingerprint, load_config, write_config
from tests.helpers.tiny import save_tiny, tiny_config, tiny_diffusion, tiny_language

WEBP = b"RIFF\x1a\x00\x00\x00WEBPVP8L"


def change_config(folder: Path, **values: object) -> None:
    (folder / "config.json").write_text(json.dumps(to_json(storybook()) | values))


def put(folder: Path, number: int, data: bytes) -> None:
    (folder / "examples").mkdir(exist_ok=True)
    (folder / "examples" / f"{number}.webp").write_bytes(data)


def test_a_saved_folder_says_what_the_config_said(tmp_path: Path) -> None:
    saved = save_tiny(tmp_path)
    assert saved.about and (saved.about, saved.examples) == (tiny_config().about, tiny_config().examples)
    assert load_config(tmp_path) == saved and load_example_pictures(tmp_path, saved) == {}
    again = replace(saved, about="Another text.", examples=())
    (tmp_path / "config.json").write_text(json.dumps(to_json(again)))
    put(tmp_path, 1, WEBP)
    assert check_folder(tmp_path) == again and compute_fingerprint(tmp_path) == saved.fingerprint


def test_who_saves_an_adapter_asks_nobody_for_its_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*arguments: object) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", ask)
    language = tiny_language(tiny_config())
    language.add_adapter(LoraConfig(rank=2, alpha=4, dropout=0.0, targets=("q_proj",)))
    save_tiny(tmp_path / "first", language=language)
    again = tiny_language(tiny_config())
    again.load_adapter(tmp_path / "first" / "adapter", is_trained=True)  # as the next stage does
    save_tiny(tmp_path / "second", language=again)
    first, second = (load_file(tmp_path / one / "adapter" / "adapter_model.safetensors") for one in ("first", "second"))
    assert first.keys() == second.keys() and all("lora_" in name for name in first)


def test_a_large_file_is_hashed_once_and_its_damage_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    save_tiny(folder)
    hashes = tmp_path / "cache" / "minigpt5" / "hashes"
    large = folder / "decoder" / "large.safetensors"
    with large.open("wb") as file:
        file.truncate(KEPT_BYTES)
    saved = write_config(folder, load_config(folder))
    check_folder(folder)
    assert not hashes.exists()  # the file may still change within a tick of its clock

    monkeypatch.setattr(cache, "SETTLED_S", -1.0)
    assert check_folder(folder) == saved
    (kept,) = hashes.iterdir()
    kept.write_text("0" * 64)
    with pytest.raises(ModelFolderError, match="damaged, missing or foreign"):  # it is what is kept that counts
        check_folder(folder)
    kept.unlink()
    check_folder(folder)

    before = large.stat()
    time.sleep(0.05)
    with large.open("r+b") as file:
        file.seek(KEPT_BYTES // 2)
        file.write(b"x")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps times has it
    assert large.stat().st_size == before.st_size and large.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(ModelFolderError, match="damaged, missing or foreign"):
        check_folder(folder)


def test_a_folder_of_before_says_nothing(tmp_path: Path) -> None:
    values = to_json(storybook())
    del values["about"], values["examples"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = load_config(tmp_path)
    assert (config.about, config.summary, config.examples) == ("", "", ())


@pytest.mark.parametrize(("part", "consistency"), [("unet", "off"), ("transformer", "none")])
def test_a_folder_of_before_says_whether_its_pictures_can_share_attention(
    tmp_path: Path, part: str, consistency: str
) -> None:
    values = to_json(storybook())
    del values["consistency"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / values["diffusion"] / part).mkdir(parents=True)
    assert load_config(tmp_path).consistency == consistency


def test_an_about_of_1001_characters_is_refused_with_its_file(tmp_path: Path) -> None:
    change_config(tmp_path, about="x" * 1001)
    with pytest.raises(ModelFolderError, match=r"config.json is damaged \(about has 1001 characters"):
        load_config(tmp_path)


def test_pictures_belong_to_examples_by_their_number(tmp_path: Path) -> None:
    change_config(tmp_path, examples=["A fox", "A bear"])
    for number in (0, 2, 3):
        put(tmp_path, number, WEBP + bytes([number]))
    assert load_example_pictures(tmp_path, load_config(tmp_path)) == {2: WEBP + b"\x02"}


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (WEBP.ljust(MAX_EXAMPLE_PICTURE_BYTES + 1, b"\x00"), "1.webp has over 32768 bytes"),
        (b"\x89PNG\r\n\x1a\n", "1.webp begins with .*PNG.* and is no WebP picture"),
        (b"<svg onload='alert(1)'/>", "is no WebP picture"),
        (b"", "is no WebP picture"),
    ],
)
def test_a_picture_that_is_too_large_or_no_webp_is_named(tmp_path: Path, data: bytes, complaint: str) -> None:
    put(tmp_path, 1, data)
    with pytest.raises(ModelFolderError, match=complaint):
        load_example_pictures(tmp_path, storybook())


def test_a_distilled_folder_keeps_the_pictures_of_its_examples(tmp_path: Path) -> None:
    start = tmp_path / "start"
    config = save_tiny(start)
    put(start, 1, WEBP)
    distilled = tiny_diffusion(config, is_distilled=True).distilled
    saved = save_distilled(tmp_path / "made", config, start=start, distilled=distilled)
    assert saved.examples and load_example_pictures(tmp_path / "made", saved) == {1: WEBP}


def test_the_shipped_pictures_are_small_and_one_for_each_example() -> None:
    config = load_config(default_model_folder())
    pictures = load_example_pictures(default_model_folder(), config)
    assert len(pictures) == len(config.examples) and sum(map(len, pictures.values())) < 30_000
