"""Consistency and characters over HTTP: checked at once, stored, and kept by everything that draws a page later."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from deployments.engines.handover import draw_across_models
from deployments.stories.admission import predict
from minigpt5.story.stream import page_seed
from minigpt5.types import DrawRequest, Reference, StoryRequest, Vokens
from tests.helpers.fakes import FakeDecoder, FakeGenerator, LocalEngines, make_png
from tests.helpers.served import CONFIG, Served, assert_error

BODY = {"prompt": "A fox", "pages": 3, "seed": 7, "consistency": "story"}
PNG = make_png()
FOX = {"name": "Page", "image": "data:image/png;base64," + base64.b64encode(PNG).decode()}


def drawn(served: Served) -> dict[int, list[DrawRequest]]:
    found: dict[int, list[DrawRequest]] = {}
    for request in served.decoder.requests:
        found.setdefault(request.vokens.page, []).append(request)
    return found


def seeds(requests: list[DrawRequest]) -> list[int | None]:
    return [request.reference and request.reference.seed for request in requests]


def test_every_way_to_a_picture_keeps_the_story_s_consistency(tmp_path: Path) -> None:
    served = Served(tmp_path)
    path = f"/v1/stories/{served.post(BODY).json()['id']}"
    first = page_seed(7, 1)
    assert {page: seeds(found) for page, found in drawn(served).items()} == {1: [None], 2: [first], 3: [first]}
    served.post({"count": 1}, f"{path}/pages")
    assert seeds(drawn(served)[4]) == [first]
    served.post({}, f"{path}/pages/3/redraw")
    assert served.request("PATCH", f"{path}/pages/2", json={"text": "A fox again."}).status_code == 200
    assert seeds(drawn(served)[3]) == seeds(drawn(served)[2]) == [first, first]
    served.post({"seed": 5}, f"{path}/pages/1/redraw")
    served.post({}, f"{path}/pages/3/redraw")
    served.request("PATCH", f"{path}/pages/2", json={"text": "A fox once more."})
    assert seeds(drawn(served)[1]) == [None, None]
    assert seeds(drawn(served)[3])[-1] == seeds(drawn(served)[2])[-1] == 5, "the first page as it is shown"


def test_a_story_that_is_resumed_after_its_first_page_draws_the_second_the_same(tmp_path: Path) -> None:
    whole = Served(tmp_path / "whole")
    whole.post(BODY)
    cut = Served(tmp_path / "cut", generator=FakeGenerator(fails_on_page=2))
    assert "broke" in cut.post(BODY).json()["error"]["message"]
    [story_id] = [path.name for path in (tmp_path / "cut" / "stories").iterdir()]
    after = Served(tmp_path / "cut")
    assert after.request("POST", f"/v1/stories/{story_id}/pages", json={"count": 2}).status_code == 201
    expected, found = drawn(whole), drawn(after)
    for page in (2, 3):
        (one,), (other,) = expected[page], found[page]
        assert one.reference and other.reference
        assert (one.seed, one.settings, one.reference.seed) == (other.seed, other.settings, other.reference.seed)
        assert (one.reference.vokens.hidden_VH == other.reference.vokens.hidden_VH).all()


def test_off_is_the_default_unless_the_model_says_otherwise(tmp_path: Path) -> None:
    served = Served(tmp_path)
    body = {name: value for name, value in BODY.items() if name != "consistency"}
    served.post(body)
    assert all(request.reference is None for request in served.decoder.requests)
    [model] = served.request("GET", "/v1/models").json()["data"]
    assert (model["defaults"]["consistency"], model["max_characters"]) == ("off", 0)
    keen = Served(tmp_path / "keen", config=dataclasses.replace(CONFIG, consistency="story"))
    keen.post(body)
    assert [request.reference is not None for request in keen.decoder.requests].count(True) == 2


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"consistency": "always"}, "consistency", ("off", "story")),
        ({"consistency": "story"}, "consistency", ("no self-attention", "off")),
        ({"characters": [FOX]}, "characters", ("IP-Adapter",)),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_anything_is_written(
    tmp_path: Path, fields: dict[str, Any], param: str, says: tuple[str, ...]
) -> None:
    served = Served(tmp_path, config=dataclasses.replace(CONFIG, consistency="none"))
    assert_error(served.post({"prompt": "A fox", **fields}), 422, param=param, says=says)
    assert not served.generator.requests
    assert served.post({"prompt": "A fox", "consistency": "off"}).status_code == 201


def test_characters_are_drawn_where_they_are_named_and_in_a_redraw(tmp_path: Path) -> None:
    served = Served(tmp_path, config=dataclasses.replace(CONFIG, has_ip_adapter=True))
    owl = {**FOX, "name": "owl"}
    path = f"/v1/stories/{served.post({**BODY, 'characters': [FOX, owl]}).json()['id']}"
    served.request("PATCH", f"{path}/pages/2", json={"text": "The owl and the page."})
    served.post({}, f"{path}/pages/3/redraw")
    found = drawn(served)
    assert [len(one.characters) for page in (1, 2, 3) for one in found[page]] == [1, 1, 2, 1, 1]
    assert found[1][0].characters[0].data == PNG
    assert all(one.reference and len(one.reference.characters) == 1 for one in found[2] + found[3])
    [model] = served.request("GET", "/v1/models").json()["data"]
    assert model["max_characters"] == 4


@pytest.mark.parametrize(
    ("characters", "param"),
    [
        ([{"name": "", "image": FOX["image"]}], "characters[0].name"),
        ([{"name": "fox"}], "characters[0].image"),
        ([{"name": "fox", "image": "https://example.org/fox.png"}], "characters[0].image"),
        ([FOX, {"name": "fox", "image": "data:image/png;base64,AAAA"}], "characters[1].image"),
        ([FOX] * 5, "characters"),
    ],
)
def test_characters_that_are_none_are_refused(tmp_path: Path, characters: list[Any], param: str) -> None:
    served = Served(tmp_path, config=dataclasses.replace(CONFIG, has_ip_adapter=True))
    assert_error(served.post({**BODY, "characters": characters}), 422, param=param)
    assert not served.generator.requests


def test_a_model_that_lacks_them_finishes_a_story_without(tmp_path: Path) -> None:
    before = Served(tmp_path, config=dataclasses.replace(CONFIG, has_ip_adapter=True))
    path = f"/v1/stories/{before.post({**BODY, 'characters': [FOX]}).json()['id']}"
    after = Served(tmp_path, config=dataclasses.replace(CONFIG, consistency="none"))
    assert after.request("POST", f"{path}/pages", json={"count": 1}).status_code == 201
    assert after.post({}, f"{path}/pages/2/redraw").status_code == 201
    assert [(one.reference, one.characters) for one in after.decoder.requests] == [(None, ())] * 2
    again = Served(tmp_path, config=dataclasses.replace(CONFIG, has_ip_adapter=True))
    assert again.request("POST", f"{path}/pages", json={"count": 1}).status_code == 201
    [last] = again.decoder.requests
    assert last.reference and [one.data for one in last.characters] == [PNG], "what was asked for is not forgotten"


def test_a_reference_of_another_model_is_left_out() -> None:
    decoder = FakeDecoder()

    def vokens(fingerprint: str) -> Vokens:
        return dataclasses.replace(FakeGenerator()._vokens(2), fingerprint=fingerprint)

    async def read_again() -> Vokens:
        return vokens(decoder.fingerprint)

    async def draw() -> None:
        old = vokens("cd" * 32)
        request = DrawRequest(vokens=old, seed=1, reference=Reference(vokens=old, seed=2))
        async for _ in draw_across_models(LocalEngines(FakeGenerator(), decoder), request, read_again):
            pass

    asyncio.run(draw())
    assert [one.reference is None for one in decoder.requests] == [False, True]


def test_a_page_is_redrawn_without_a_reference_where_an_edit_of_the_first_one_failed(tmp_path: Path) -> None:
    served = Served(tmp_path)
    path = f"/v1/stories/{served.post(BODY).json()['id']}"
    broken = Served(tmp_path, generator=FakeGenerator(fails_on_page=1))
    broken.request("PATCH", f"{path}/pages/1", json={"text": "An owl."})
    after = Served(tmp_path)
    assert after.post({}, f"{path}/pages/2/redraw").status_code == 201
    assert seeds(drawn(after)[2]) == [None]


def test_admission_is_told_of_what_is_left_of_a_story(tmp_path: Path) -> None:
    served = Served(tmp_path)
    told: list[float] = []
    reserve = served.front.admission.reserve

    def reserve_and_note(request: StoryRequest, **options: Any) -> Any:
        told.append(predict(request)["decoder"])
        return reserve(request, **options)

    served.front.admission.reserve = reserve_and_note  # type: ignore[method-assign]
    path = f"/v1/stories/{served.post(BODY).json()['id']}"
    whole = told.pop()
    served.post({"count": 1}, f"{path}/pages")
    assert served.request("PATCH", f"{path}/pages/2", json={"text": "A fox again."}).status_code == 200
    served.post({}, f"{path}/pages/3/redraw")
    samples = 2 * CONFIG.draw.steps
    assert whole == predict(StoryRequest(prompt=("",), pages=3, draw=CONFIG.draw))["decoder"] + 2 * samples
    assert told == [predict(StoryRequest(prompt=("",), pages=1, draw=CONFIG.draw))["decoder"] + samples] * 3
    assert served.front.admission.load.work == {"generator": {}, "decoder": {}}


def test_admission_counts_the_references() -> None:
    plain = StoryRequest(prompt=("x",), pages=4)
    samples = 2 * plain.draw.steps
    consistent = dataclasses.replace(plain, consistency="story")
    assert predict(consistent)["decoder"] == predict(plain)["decoder"] + 3 * samples
    assert predict(dataclasses.replace(consistent, pages=1)) == predict(dataclasses.replace(plain, pages=1))
