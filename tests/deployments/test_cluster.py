"""The whole path on a real Ray: `python -m deployments` with the shipped model, used over HTTP, ended with Ctrl-C."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from deployments import sse
from minigpt5.model.folder_config import load_config
from tests.helpers.processes import END_TIMEOUT_S, MODEL, Server, start_server

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason=f"no model is shipped in {MODEL}"),
]


def read_events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    for event in sse.read_events(response.iter_bytes()):
        yield event.name, json.loads(event.data)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


def test_it_says_where_it_is(server: Server) -> None:
    text = server.log.read_text()
    assert f"http://127.0.0.1:{server.port}" in text
    assert "curl " in text
    assert str(server.log.parent / "storage") in text
    assert server.client.get("/readyz").status_code == 200
    assert server.client.get("/healthz").status_code == 200


def test_a_story_plain_and_streamed_is_the_same(server: Server) -> None:
    body = {"prompt": "A fox who finds a red balloon", "pages": 2, "seed": 7, "steps": 4}
    reply = server.client.post("/v1/stories", json=body)
    assert reply.status_code == 201, reply.text
    plain = reply.json()
    assert [page["index"] for page in plain["pages"]] == [1, 2]
    assert server.client.get(f"/v1/stories/{plain['id']}").json() == plain

    with server.client.stream("POST", "/v1/stories", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        events = list(read_events(response))
    assert events[0][0] == "story"
    assert events[-1][0] == "done"
    streamed = events[-1][1]
    assert [page["text"] for page in streamed["pages"]] == [page["text"] for page in plain["pages"]]
    for first, second in zip(plain["pages"], streamed["pages"], strict=True):
        one, other = (server.client.get(page["image"]["url"]) for page in (first, second))
        assert one.headers["content-type"] == "image/png"
        drawn_px = load_config(MODEL).drawn_px
        assert pixels(one.content).shape == (drawn_px, drawn_px, 3)
        assert np.abs(pixels(one.content) - pixels(other.content)).max() <= 1


def test_text_comes_before_the_story_is_done(server: Server) -> None:
    started_at = time.monotonic()
    times: dict[str, float] = {}
    with server.client.stream("POST", "/v1/stories", json={"prompt": "A cat", "pages": 2, "stream": True}) as response:
        for name, _ in read_events(response):
            times.setdefault(name, time.monotonic() - started_at)
    assert times["text"] < times["slot"] < times["progress"] < times["image"] < times["done"]
    assert times["text"] < times["done"] / 2


def test_a_story_is_finished_though_its_client_went_away(server: Server) -> None:
    body = {"prompt": "A dog", "pages": 2, "steps": 4, "stream": True}
    with server.client.stream("POST", "/v1/stories", json=body) as response:
        _, data = next(read_events(response))
    deadline = time.monotonic() + 60
    while (story := server.client.get(f"/v1/stories/{data['id']}").json())["status"] == "drawing":
        assert time.monotonic() < deadline, story
        time.sleep(0.2)
    assert story["status"] == "done"
    assert all("image" in page for page in story["pages"])


def test_pictures_of_a_caption(server: Server) -> None:
    body = {"prompt": "A fox on a hill", "n": 2, "seed": 3}
    reply = server.client.post("/v1/images/generations", json=body)
    assert reply.status_code == 200, reply.text
    first, second = (base64.b64decode(item["b64_json"]) for item in reply.json()["data"])
    assert pixels(first).shape == pixels(second).shape
    assert first != second


def test_bad_input_is_refused_and_the_server_lives_on(server: Server) -> None:
    image = {"type": "image", "image": "data:image/png;base64,bm90IGFuIGltYWdl"}
    bodies: list[tuple[dict[str, object], str]] = [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "A fox", "pages": 0}, "pages"),
        ({"prompt": "A fox", "pages": 65}, "pages"),
        ({"prompt": "A fox", "colour": "red"}, "colour"),
        ({"prompt": "fox " * 3900}, "prompt"),  # beyond the context window
        ({"prompt": [image]}, "prompt[0].image"),
    ]
    for body, param in bodies:
        reply = server.client.post("/v1/stories", json=body)
        assert reply.status_code == 422, reply.text
        assert reply.json()["error"]["param"] == param
    tokens = load_config(MODEL).context_tokens
    assert str(tokens) in server.client.post("/v1/stories", json={"prompt": "fox " * 3900}).text
    assert server.client.post("/v1/stories", content=b"x" * (9 * 2**20)).status_code == 413
    assert server.client.get("/nothing").json()["error"]["code"] == "not_found"
    assert server.client.post("/v1/stories", json={"prompt": "A fox", "pages": 1, "steps": 2}).status_code == 201


def test_the_front_never_loads_torch_and_the_engines_do(server: Server) -> None:
    def has_torch(deployment: str) -> bool:
        return "libtorch" in Path(f"/proc/{server.replica(deployment).pid}/maps").read_text()

    assert has_torch("VokenGenerator")
    assert has_torch("DiffusionDecoder")
    assert not has_torch("Ingress")


def test_a_second_server_on_the_port_says_what_to_do(server: Server, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as output:
        second = start_server(server.port, tmp_path, output)
        assert second.wait(60) == 2
    text = (tmp_path / "log").read_text()
    assert f"port {server.port}" in text
    assert "make serve PORT=" in text
    assert "Traceback" not in text


def test_ctrl_c_ends_every_process(server: Server) -> None:
    """Last of the files that share the server, too: it is gone afterwards."""
    processes = psutil.Process(server.process.pid).children(recursive=True)
    assert len(processes) > 5
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.process.wait(END_TIMEOUT_S) == 0
    left = [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not left
    assert "Traceback" not in server.log.read_text()
    with pytest.raises(httpx.ConnectError):
        server.client.get("/healthz")
