"""The client and its command line, over the real front with fakes behind it, on a real socket."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments import client as module
from deployments.client import Client, ClientError, find_proxy, is_this_machine, main, parse_args, run
from deployments.sse import MAX_EVENT_BYTES
from tests.deployments.test_auth import Guarded
from tests.deployments.test_sse import OTHER_LINE_ENDS
from tests.helpers.fakes import FakeGenerator
from tests.helpers.processes import find_free_port
from tests.helpers.served import Listening, Served, under


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


@pytest.mark.parametrize("is_known", [True, False])
def test_a_server_under_a_prefix_is_asked_there(
    tmp_path: Path, port: int, is_known: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    listening = Listening(Served(tmp_path), port, put=lambda app: under("/some/app", app, is_known=is_known))
    for url in (f"http://127.0.0.1:{port}/some/app", f"http://127.0.0.1:{port}/some/app/"):
        with Client(url) as client:
            story = list(client.create("A fox", pages=1))[-1].data
            picture = story["pages"][0]["image"]["url"]
            assert picture.startswith("/some/app/v1/") == is_known
            assert client.picture(picture).startswith(b"\x89PNG")
            assert client.export(story["id"], tmp_path / "book.html").read_bytes()
            run(client, parse_args(["redraw", story["id"], "1"]))
        assert capsys.readouterr().out.startswith(f"http://127.0.0.1:{port}/some/app/v1/stories/")
    listening.stop()


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


def test_a_prompt_with_any_line_end_comes_back_whole(url: str) -> None:
    with Client(url) as client:
        for character in [*OTHER_LINE_ENDS, "\r", "\n"]:
            prompt = f"A fox{character}and a balloon"
            *_, done = client.create(prompt, pages=1, seed=7)
            assert (done.name, done.data["prompt"]) == ("done", prompt), ascii(character)


def test_a_story_that_was_heard_to_its_end_has_no_more_events(url: str) -> None:
    with Client(url) as client:
        *_, done = client.create("A fox", pages=1, seed=7)
        assert list(client.follow(done.data["id"], after=done.id)) == []


STREAM = {"Content-Type": "text/event-stream"}


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (httpx.Response(200, text="<h1>Log in</h1>", headers={"Content-Type": "text/html"}), "text/html"),
        (httpx.Response(200, text="data: {\n\n", headers=STREAM), "no story's events"),
        (httpx.Response(200, content=b"x" * (MAX_EVENT_BYTES + 1), headers=STREAM), "longer than the limit"),
        (httpx.Response(502, text="<h1>Bad\n\nGateway</h1>"), "502 <h1>Bad Gateway</h1>$"),
    ],
    ids=["a login page", "no JSON", "an endless line", "a page of a proxy"],
)
def test_an_answer_of_another_server_is_one_line(
    monkeypatch: pytest.MonkeyPatch, reply: httpx.Response, says: str
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0)
    with Client(transport=httpx.MockTransport(lambda request: reply)) as client:
        with pytest.raises(ClientError, match=says) as failure:
            list(client.follow("story_1"))
        assert "\n" not in str(failure.value)


SERVES_REFUSAL = "Request dropped due to backpressure (num_queued_requests=800, max_queued_requests=800)."
OUR_REFUSAL = {"error": {"message": "full", "type": "server_error", "param": None, "code": "overloaded"}}


@pytest.mark.parametrize("body", [{"text": SERVES_REFUSAL}, {"json": OUR_REFUSAL}], ids=["Serve's", "ours"])
def test_a_full_server_is_asked_again_when_it_says(monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]) -> None:
    waited: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    replies = [httpx.Response(503, headers={"Retry-After": "5"}, **body), httpx.Response(200, json={"id": "story_1"})]
    with Client(transport=httpx.MockTransport(lambda request: replies.pop(0))) as client:
        assert client.story("story_1") == {"id": "story_1"}
    assert waited == [5]


@pytest.mark.parametrize("after", ["300", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_a_server_that_is_full_for_long_is_given_up(monkeypatch: pytest.MonkeyPatch, after: str) -> None:
    waited: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    monkeypatch.setattr(module, "PATIENCE_S", 60.0 if after.isdecimal() else 0.0)
    reply = httpx.Response(503, headers={"Retry-After": after}, json=OUR_REFUSAL)
    transport = httpx.MockTransport(lambda request: reply)
    with Client(transport=transport) as client, pytest.raises(ClientError, match="full") as refusal:
        client.story("story_1")
    assert (refusal.value.status, refusal.value.code, waited) == (503, "overloaded", [])


@pytest.mark.parametrize("end", [b"", b": keep-alive\n\n"])
def test_a_stream_that_ends_before_its_story_is_taken_up_again(end: bytes) -> None:
    begin = b'id: 0-story-0\nevent: story\ndata: {"id": "story_1"}\n\n'
    streams = [begin + b"id: 1-te", end, b"id: 4-done-0\nevent: done\ndata: {}\n\n"]
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("Last-Event-ID"))
        return httpx.Response(200, content=streams[len(seen) - 1], headers=STREAM)

    with Client(transport=httpx.MockTransport(answer)) as client:
        assert [event.name for event in client.follow("story_1")] == ["story", "done"]
    assert seen == [None, "0-story-0", "0-story-0"]


# Proxies and URLs


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that names no proxy."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.mark.parametrize("name", ["ALL_PROXY", "HTTP_PROXY", "http_proxy"])
@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "http://127.0.0.1:9", "what://is this"])
def test_this_machine_is_reached_without_a_proxy(
    url: str, environment: pytest.MonkeyPatch, name: str, proxy: str
) -> None:
    environment.setenv(name, proxy)
    for host in ("127.0.0.1", "localhost"):
        with Client(url.replace("127.0.0.1", host)) as client:
            assert list(client.stories()) == []


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("LOCALHOST.", True),
        ("studio.localhost", True),
        ("127.0.0.1", True),
        ("127.255.255.254", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", True),
        ("notlocalhost", False),
        ("localhost.example.com", False),
        ("128.0.0.1", False),
        ("192.168.0.7", False),
        ("fe80::1", False),
        ("", False),
    ],
)
def test_this_machine_has_many_names(host: str, expected: bool) -> None:
    assert is_this_machine(host) == expected


@pytest.mark.parametrize(
    ("variables", "url", "expected"),
    [
        ({}, "http://gpu.example.com", ""),
        ({"HTTP_PROXY": "proxy:3128"}, "http://gpu.example.com:8000", "http://proxy:3128"),
        ({"HTTP_PROXY": "http://proxy:3128"}, "https://gpu.example.com", ""),
        (
            {"HTTPS_PROXY": "http://proxy:3128", "ALL_PROXY": "socks5://p:1"},
            "https://a.example.com",
            "http://proxy:3128",
        ),
        ({"ALL_PROXY": "socks5://p:1"}, "http://gpu.example.com", "socks5://p:1"),
        ({"ALL_PROXY": "socks5://p:1", "NO_PROXY": "example.com"}, "http://gpu.example.com", ""),
        ({"ALL_PROXY": "socks5://p:1", "NO_PROXY": "*"}, "http://gpu.example.com", ""),
        ({"ALL_PROXY": "socks5://p:1", "NO_PROXY": "gpu:8000"}, "http://gpu:8000", ""),
        ({"ALL_PROXY": "socks5://p:1"}, "http://[::1]:8000", ""),
    ],
)
def test_the_environment_names_the_proxy_of_other_machines(
    environment: pytest.MonkeyPatch, variables: dict[str, str], url: str, expected: str
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    assert find_proxy(httpx.URL(url)) == expected


@pytest.mark.parametrize(
    ("proxy", "says"),
    [
        ("socks5://fox:secret@proxy:1080", r"socks5://proxy:1080 .* pip install 'httpx\[socks\]'"),
        ("socks4://proxy:1080", "socks4://proxy:1080 .* must be http://, https:// or socks5://"),
        ("http://proxy:port", "http://proxy:port .* NO_PROXY=gpu.example.com"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_one_line(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], proxy: str, says: str
) -> None:
    environment.setenv("ALL_PROXY", proxy)
    environment.setitem(sys.modules, "socksio", None)  # as it is without httpx[socks]
    with pytest.raises(ClientError, match=says):
        Client("http://gpu.example.com:8000")
    environment.setattr(sys, "argv", ["client", "--url", "http://gpu.example.com:8000", "list"])
    assert main() == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the proxy ") and error.count("\n") == 1 and "secret" not in error


def test_a_proxy_that_does_not_answer_is_named(environment: pytest.MonkeyPatch, port: int) -> None:
    environment.setattr(module, "PATIENCE_S", 0.2)
    environment.setenv("HTTP_PROXY", f"http://fox:secret@127.0.0.1:{port}")
    with Client("http://gpu.example.com") as client, pytest.raises(ClientError) as failure:
        client.story("story_1")
    assert f"through the proxy http://127.0.0.1:{port}" in str(failure.value)


def test_other_machines_are_reached_through_the_proxy(url: str, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HTTP_PROXY", url)  # the server itself: it finds the path in the proxied request
    with Client("http://gpu.example.com") as client:
        assert list(client.stories()) == []


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "gpu:8000", "ftp://gpu", "http://", "http://[::1", "http://gpu:port", "gpu"]
)
def test_what_is_no_url_is_said_at_once(url: str) -> None:
    with pytest.raises(ClientError, match="is no URL of a server"):
        Client(url)


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


def made_at_once(request: httpx.Request) -> httpx.Response:
    """A server whose stories are made at once; its books are larger than some disks."""
    if request.method == "POST":
        return httpx.Response(202, json={"id": "story_1"})
    if request.url.path.endswith("/events"):
        return httpx.Response(200, headers=STREAM, text='id: 1\nevent: done\ndata: {"id": "story_1"}\n\n')
    return httpx.Response(200, content=b"x" * 1000)


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("nowhere/story.pdf", "no folder .*nowhere"),
        ("story.docx", "must end in one of"),
        ("books.pdf", "it is a folder"),
    ],
)
def test_a_book_that_cannot_be_written_is_refused_before_a_story_is_begun(tmp_path: Path, out: str, says: str) -> None:
    (tmp_path / "books.pdf").mkdir()
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return made_at_once(request)

    with Client("http://gpu", transport=httpx.MockTransport(answer)) as client:
        with pytest.raises(ClientError, match=says):
            run(client, parse_args(["create", "A fox", "--out", str(tmp_path / out)]))
        with pytest.raises(ClientError, match=says):
            client.export("story_1", tmp_path / out)
    assert not asked


def test_a_full_disk_costs_neither_the_earlier_book_nor_the_storys_id(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    book = tmp_path / "story.pdf"
    book.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # the kernel refuses to write on, as on a full disk
    try:
        client = Client("http://gpu", transport=httpx.MockTransport(made_at_once))
        with client, pytest.raises(ClientError, match="cannot be written .File too large"):
            run(client, parse_args(["create", "A fox", "--out", str(book)]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("story.pdf", "old")]
    assert capsys.readouterr().err.startswith("story_1 is begun\n")


def test_the_id_is_said_before_the_story_is_followed(capsys: pytest.CaptureFixture[str]) -> None:
    def leave(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            raise KeyboardInterrupt
        return made_at_once(request)

    with Client("http://gpu", transport=httpx.MockTransport(leave)) as client, pytest.raises(KeyboardInterrupt):
        run(client, parse_args(["create", "A fox"]))
    assert capsys.readouterr().err.startswith("story_1 is begun\n")


@pytest.mark.parametrize(
    "words", [["create", "caf\udce9"], ["create", "A fox", "--style", "\udce9"], ["show", "\udce9"]]
)
def test_words_that_are_not_utf_8_are_one_line(words: list[str]) -> None:
    client = Client("http://gpu", transport=httpx.MockTransport(made_at_once))
    with (
        client,
        pytest.raises(ClientError, match=r"\\udce9' holds half of a surrogate pair or a byte that is not UTF-8"),
    ):
        run(client, parse_args(words))


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
