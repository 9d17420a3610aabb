"""What version 0.1.0 stored is read: model configs, stories, a story that was cut off, a job that was killed.

The files in tests/data/version-0.1.0 were written by that version's server, killed in the second story, and by its bulk
job, killed before its row was in place.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from batch_jobs import illustrate, state
from batch_jobs.inputs import check_rows, digest_of, read_rows
from batch_jobs.job import Output
from batch_jobs.outputs import STORY_SCHEMA
from minigpt5.codec import from_json, to_json
from minigpt5.config import ModelConfig, default_model_folder, minigpt5_7b
from minigpt5.model.folder_config import check_folder
from minigpt5.story.state import StoryState
from minigpt5.story.store import StoryStore
from minigpt5.types import StoryRequest
from tests.batch_jobs.test_illustrate import make_pages_here, read_output
from tests.helpers.fakes import FakeDecoder, FakeGenerator
from tests.helpers.served import Served

STORED = Path(__file__).parent / "data" / "version-0.1.0"
DONE, CUT_OFF = "story_1a2207512cd7bf9dfcee2018c36", "story_1a220752103847b3fb4c7105def"


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORED / "stories", tmp_path / "stories"))


def with_later_fields(values: Any) -> Any:
    """JSON of that version -> the same with what is stored since: sizes of pictures, models and engines of pages, and
    how a story's pictures are alike."""
    if isinstance(values, list):
        return [with_later_fields(value) for value in values]
    if not isinstance(values, dict):
        return values
    new: dict[str, object] = {}
    if "scheduler" in values:
        new = {"width": 0, "height": 0, "style": ""}
    elif {"width", "height", "draw"} <= set(values):
        new = {"is_resampled": False, "fingerprint": ""}
    elif {"index", "is_written"} <= set(values):
        new = {"fingerprint": "", "engine": ""}
    elif {"prompt", "mode"} <= set(values):
        new = {"consistency": "off", "characters": []}
    return {name: with_later_fields(value) for name, value in values.items()} | new


@pytest.mark.parametrize("name", ["storybook", "minigpt5-7b"])
def test_a_config_is_read_and_written_as_it_was(name: str) -> None:
    """With the keys that version did not have."""
    values = json.loads((STORED / "models" / f"{name}.json").read_text())
    config = from_json(ModelConfig, values)
    new: dict[str, object] = {"about": "", "examples": [], "bases": [], "template": "published"}
    new |= {"condition_pooled": 0, "mapper_width": 0, "max_pixels": 0, "size_multiple": 8, "styles": []}
    new |= {"guides_in_one_call": False, "consistency": "off", "has_ip_adapter": False, "window_pages": 16}
    new |= {"upscale": 1, "caption_opens": ""}
    new["schedulers"] = ["ddim", "pndm", "dpm-solver++", "sde-dpm-solver++", "distilled"]
    new["vision"] = values["vision"] | {"picture": [], "grid_side": 0, "sees_whole_pictures": False}
    assert config.name == name and to_json(config) == with_later_fields(values) | new
    assert config.vision.eva == (minigpt5_7b().vision.eva if name == "minigpt5-7b" else None)


def test_the_shipped_model_folder_is_whole_and_another_than_that_versions() -> None:
    earlier = from_json(ModelConfig, json.loads((STORED / "models" / "storybook.json").read_text()))
    assert check_folder(default_model_folder()).fingerprint != earlier.fingerprint


def test_a_finished_story_is_read_with_its_variants_and_its_request(stories: Path) -> None:
    store = StoryStore(str(stories))
    assert store.list_ids() == [CUT_OFF, DONE] and store.running() == [CUT_OFF]
    state = store.load(DONE)
    assert (state.status, state.seed, state.num_pages, state.sampling.max_page_tokens) == ("done", 7, 2, 12)
    first, second = state.pages
    assert [one.seed for one in first.variants] == [1776908988, 9] and first.variant == 1
    assert first.image == first.variants[1] and first.image.draw.steps == 2
    assert second.text == "The fox goes home." and second.variants == ()
    story = store.load_story(DONE)
    assert all(page.picture and page.picture.png.startswith(b"\x89PNG") for page in story.pages)
    assert story.pages[0].picture and story.pages[0].picture.png == store.load_picture(DONE, 1, variant=1)
    assert store.load_vokens(DONE, 1).hidden_VH.shape == (8, 576)
    request = store.load_request(DONE)
    assert isinstance(request, StoryRequest) and request.draw.scheduler == "ddim"
    words, picture = request.prompt
    assert words == "A fox and a picture" and getattr(picture, "data", b"").startswith(b"\x89PNG")
    name, known = next((path.stem, path) for path in (stories / "once").iterdir())
    assert store.load_once(name) == (DONE, json.loads(known.read_text())["digest"])


def test_a_finished_story_is_written_as_it_was(stories: Path) -> None:
    store, folder = StoryStore(str(stories)), stories / "stories" / DONE
    names = ("story.json", "request.json", "pages/1/page.json", "pages/2/page.json")
    before = {name: json.loads((folder / name).read_text()) for name in names}
    state = store.load(DONE)
    store.save(state)
    store.save_request(DONE, store.load_request(DONE))
    for page in state.pages:
        store.save_page(DONE, page)
    after = {name: json.loads((folder / name).read_text()) for name in names}
    assert after["story.json"].pop("pages") == [] and after["request.json"].pop("previous") == []
    assert after == with_later_fields(before)


def test_a_story_that_was_cut_off_is_resumed_from_its_stored_page(stories: Path) -> None:
    store = StoryStore(str(stories))
    vokens, text = store.load_vokens(CUT_OFF, 1), store.load(CUT_OFF).pages[0].text
    generator, decoder = FakeGenerator(), FakeDecoder(fingerprint=vokens.fingerprint)
    generator.fingerprint = vokens.fingerprint
    served = Served(stories, generator=generator, decoder=decoder)
    final: list[StoryState] = []

    async def recover(client: httpx.AsyncClient) -> None:
        await served.front.coordinator.recover()
        await served.front.relay.wait(CUT_OFF)
        final.append(store.load(CUT_OFF))

    served.run(recover)
    (state,) = final
    assert state.status == "done" and [page.image is not None for page in state.pages] == [True] * 3
    assert state.pages[0].text == text and generator.requests[0].given == (text,)
    assert store.load_vokens(CUT_OFF, 1).hidden_VH.tobytes() == vokens.hidden_VH.tobytes()
    assert store.running() == []


def test_a_job_that_was_killed_is_finished_with_what_it_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "SILENCE_S", 0.0)  # its owner was a process of another machine
    folder = Path(shutil.copytree(STORED / "job", tmp_path / "job"))
    manifest = json.loads((folder / "out.state" / "manifest.json").read_text())
    assert digest_of(str(folder / "prompts.jsonl")) == manifest["plan"]["input_sha256"]
    pictures = [path.read_bytes() for path in sorted((folder / "out.state").rglob("*.png"))]
    config = from_json(ModelConfig, json.loads((STORED / "models" / "storybook.json").read_text()))
    assert manifest["plan"]["model"] == config.fingerprint
    output = Output.at(str(folder / "out"), STORY_SCHEMA, manifest["plan"])
    said: list[str] = []
    report = illustrate.illustrate(
        list(check_rows(read_rows(str(folder / "prompts.jsonl")), config)),
        output,
        make_pages=partial(make_pages_here, output=output),
        say=said.append,
    )
    assert (report.stories, report.errors) == (1, 0) and "1 more are begun" in said[0]
    story = read_output(folder)["given"]
    assert [page["png"] for page in story["pages"]] == pictures
    assert [page["text"] for page in story["pages"]] == [
        "A bear sits in the snow.",
        "A bear walks to the forest at night.",
    ]
    assert json.loads((folder / "out.state" / "manifest.json").read_text())["status"] == "finished"
