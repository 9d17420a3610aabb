"""`make serve VLLM=FOLDER` with real processes: stories by vLLM, and its death under one. For make test-vllm."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.vllm import find_export
from minigpt5.config import default_model_folder
from minigpt5.engine.vllm.settings import VLLM_PYTHON
from tests.helpers.processes import find_free_port, start_server

START_S, STORY_S = 1500.0, 900.0
MODEL = default_model_folder()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not os.access(VLLM_PYTHON, os.X_OK), reason="there is no .venv-vllm: make install-vllm"),
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason=f"no model is shipped in {MODEL}"),
]


def test_vllm_writes_a_story_and_its_death_loses_none(tmp_path: Path) -> None:
    log, port = tmp_path / "log", find_free_port()
    options = ("--vllm", str(find_export(MODEL)), "--max-wait-s", "3000")
    with log.open("wb") as output:
        server = start_server(port, tmp_path / "storage", output, *options)
    try:
        wait_for(lambda: "ready after" in log.read_text() or server.poll() is not None, START_S)
        assert server.poll() is None, log.read_text()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=STORY_S, trust_env=False) as client:
            first = finish(client, begin(client, "A fox who finds a balloon", pages=2))
            assert [page["engine"].split()[0] for page in first["pages"]] == ["vllm"] * 2
            second = begin(client, "An owl who finds a tent", pages=6)
            wait_for(lambda: client.get(f"/v1/stories/{second}").json()["pages"], STORY_S)
            [engine] = engines(server.pid)
            engine.kill()
            story = finish(client, second)
            assert len(story["pages"]) == 6 and all(page["text"] and page["image"] for page in story["pages"])
            [other] = engines(server.pid)
            assert other.pid != engine.pid
    finally:
        server.terminate()
        server.wait(60)
    wait_for(lambda: not other.is_running(), 60)


def begin(client: httpx.Client, prompt: str, *, pages: int) -> str:
    """The id of a new story."""
    reply = client.post("/v1/stories", json={"prompt": prompt, "pages": pages, "seed": 7, "wait": False})
    assert reply.is_success, reply.text
    story_id: str = reply.json()["id"]
    return story_id


def finish(client: httpx.Client, story_id: str) -> dict[str, Any]:
    """A story that is done."""
    wait_for(lambda: client.get(f"/v1/stories/{story_id}").json()["status"] != "drawing", STORY_S)
    story: dict[str, Any] = client.get(f"/v1/stories/{story_id}").json()
    assert story["status"] == "done", story
    return story


def engines(server_pid: int) -> list[psutil.Process]:
    """vLLM's own processes of a server, without their workers."""
    children = psutil.Process(server_pid).children(recursive=True)
    return [child for child in children if child.cmdline()[:1] == ["VLLM::EngineCore"]]


def wait_for(is_so: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not so within {timeout_s:g} s"
        time.sleep(0.5)
