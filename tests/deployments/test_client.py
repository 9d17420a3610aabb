"""The client and its command line, over the real front with fakes behind it, on a real socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from deployments import client as module
from deployments.api.routes import create_api
from deployments.client import Client, ClientError, parse_args, run
from tests.deployments.test_auth import Guarded
from tests.helpers.fakes import FakeGenerator
from tests.helpers.processes import find_free_port
from tests.helpers.served import Served


class Listening:
    """A front on a socket, which may be cut off and come back."""

    def __init__(self, served: Served, port: int) -> None:
        config = uvicorn.Config(create_api(served.front), port=port, log_level="error", timeout_graceful_shutdown=0)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)


@pytest.fixture
def port() -> int:
    return find_free_port()


@pytest.fixture
def url(tmp_path: Path, port: int) -> Iterator[str]:
    listening = Listening(Served(tmp_path), port)
    yield f"http://127.0.0.1:{port}"
    listening.stop()


def test_a_story_is_made_followed_changed_and_taken_away(url: str, tmp_path: Path) -> None:
    with Client(url) as client:
        events = list(client.create("A fox", pages=2, seed=7))
        assert [events[0].name, events[-1].name] == ["story", "done"]
        story = events[-1].data
        assert client.story(story["id"]) == story
        assert [one["id"] for one in client.stories()] == [story["id"]]
        assert client.picture(story["pages"][0]["image"]["url"]).startswith(b"\x89PNG")
        assert client.redraw(story["id"], 1, seed=5)["variant"] == 1
        assert client.edit(story["id"], 2, "The fox slept.")["text"] == "The fox slept."
        assert len(list(client.add_pages(story["id"]))[-1].data["pages"]) == 3
        for kind, start in ((".html", b"<!doctype"), (".epub", b"PK"), (".pdf", b"%PDF")):
            assert client.export(story["id"], tmp_path / f"book{kind}").read_bytes().startswith(start)
        assert client.cancel(story["id"])["status"] == "done"
        client.delete(story["id"])
        with pytest.raises(ClientError, match="no story") as missing:
            client.story(story["id"])
        assert (missing.value.status, missing.value.code) == (404, "not_found")
        with pytest.raises(ClientError, match="must end in one of .html, .epub, .pdf"):
            client.export(story["id"], tmp_path / "book.docx")
        with pytest.raises(ClientError, match="pages is 99"):
            list(client.create("A fox", pages=99))


def test_a_server_that_dies_and_comes_back_is_waited_for(tmp_path: Path, port: int) -> None:
    first = Listening(Served(tmp_path, generator=FakeGenerator(delay_s=0.05)), port)
    with Client(f"http://127.0.0.1:{port}") as client:
        events = client.create("A fox", pages=3, seed=7)
        heard = [next(events) for _ in range(4)]
        first.stop()
        second: list[Listening] = []
        timer = threading.Timer(1.0, lambda: second.append(Listening(Served(tmp_path), port)))
        timer.start()
        heard += list(events)
        texts = "".join(event.data["delta"] for event in heard if event.name == "text")
        assert texts == "Page 1 of 7.Page 2 of 7.Page 3 of 7."
        assert heard[-1].name == "done"
    second[0].stop()


def test_no_server_is_an_error_in_time(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.2)
    with Client(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(ClientError, match="no answer"):
            client.submit("A fox")
        with pytest.raises(ClientError, match="POST .*redraw"):
            client.redraw("story_1", 1)


def test_a_key_comes_from_the_environment(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = Guarded(tmp_path)
    listening = Listening(guarded, port)
    with Client(f"http://127.0.0.1:{port}") as client, pytest.raises(ClientError, match="asks for a key"):
        client.submit("A fox")
    monkeypatch.setenv(module.KEY_VARIABLE, guarded.alice["Authorization"].removeprefix("Bearer "))
    monkeypatch.setenv(module.URL_VARIABLE, f"http://127.0.0.1:{port}")
    with Client() as client:
        assert client.submit("A fox", pages=1)["status"] in ("drawing", "done")
    listening.stop()


def test_the_command_line(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: str) -> str:
        options = parse_args(["--url", url, *arguments])
        with Client(options.url) as client:
            run(client, options)
        return capsys.readouterr().out

    out = call("create", "A fox", "--pages", "2", "--seed", "7", "--out", str(tmp_path / "story.pdf"))
    assert "1. Page 1 of 7.\n2. Page 2 of 7.\n" in out and out.endswith("story.pdf\n")
    [line] = call("list").splitlines()
    story_id = line.split()[0]
    assert "done" in line and "2 pages" in line and "A fox" in line
    assert '"status": "done"' in call("show", story_id)
    assert "3. Page 3 of 7." in call("continue", story_id, "--count", "1")
    assert "pages/1.png" in call("redraw", story_id, "1", "--seed", "3")
    assert "1. Page 1 of 7." in call("follow", story_id)
    assert call("export", story_id, str(tmp_path / "story.epub")).endswith("story.epub\n")
    assert '"status": "done"' in call("cancel", story_id)
    assert call("delete", story_id) == "" and call("list") == ""
