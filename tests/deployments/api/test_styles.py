"""Style adapters over HTTP: listed, asked for by every route that draws, and checked before anything is queued."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.served import CONFIG, Served

CREATE = {"prompt": "A fox", "pages": 1}


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path, config=dataclasses.replace(CONFIG, styles=("ink", "oil")))


def drawn(served: Served) -> list[str]:
    return [request.settings.style for request in served.decoder.requests]


def test_the_models_styles_are_listed(served: Served) -> None:
    [model] = served.request("GET", "/v1/models").json()["data"]
    assert model["styles"] == ["ink", "oil"]
    assert model["defaults"]["style"] == ""


def test_a_story_has_its_style_and_a_redrawn_picture_keeps_it_or_gets_its_own(served: Served) -> None:
    story = served.post({**CREATE, "style": "ink"}).json()
    redraw = f"/v1/stories/{story['id']}/pages/1/redraw"
    for fields in ({}, {"style": "oil"}, {"style": ""}):
        assert served.post(fields, redraw).status_code == 201
    assert drawn(served) == ["ink", "ink", "oil", ""]
    [page] = served.request("GET", f"/v1/stories/{story['id']}").json()["pages"]
    assert [variant.get("style") for variant in page["variants"]] == ["ink", "ink", "oil", None]


def test_pictures_of_openais_route_have_a_style(served: Served) -> None:
    reply = served.post({"prompt": "A fox", "style": "oil"}, "/v1/images/generations").json()
    assert "x_ignored" not in reply
    reply = served.post({"prompt": "A fox", "style": "vivid"}, "/v1/images/generations").json()
    assert reply["x_ignored"] == ["style"]
    assert drawn(served) == ["oil", ""]


@pytest.mark.parametrize("style", ["pen", "../ink", "Ink"])
@pytest.mark.parametrize(
    ("path", "body", "status"), [("/v1/stories", CREATE, 422), ("/v1/images/generations", {"prompt": "A fox"}, 400)]
)
def test_another_style_is_refused_before_anything_is_written(
    served: Served, path: str, body: dict[str, Any], status: int, style: str
) -> None:
    reply = served.post({**body, "style": style}, path)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert (error["param"], error["message"]) == (
        "style",
        f"style is {style!r} but must be one of ink, oil, or left out",
    )
    assert not served.generator.requests and not served.decoder.requests


def test_a_model_without_styles_says_so(tmp_path: Path) -> None:
    reply = Served(tmp_path).post({**CREATE, "style": "ink"})
    assert reply.status_code == 422
    assert "but this model has no styles" in reply.json()["error"]["message"]
