"""Keys: who is let in, how much, and to whose stories."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import httpx
import pytest

from deployments import auth
from deployments.api.images import Kind
from deployments.api.routes import create_api
from deployments.auth import COOKIE, VARIABLE, KeyGuard, Keys, KeysError, add_key, load_keys, watch_keys
from deployments.stories.ledger import LocalLedger
from minigpt5.errors import EngineLost
from tests.helpers.fakes import FakeGenerator
from tests.helpers.served import Served, assert_error, read_events

BODY = {"prompt": "A fox", "pages": 1, "seed": 7}


class Guarded(Served):
    """A server with the keys of alice and bob."""

    def __init__(self, folder: Path, *, per_minute: int = 100, concurrent: int = 8, **options: Any) -> None:
        self.file = folder / "keys.json"
        limits = {"per_minute": per_minute, "concurrent": concurrent}
        self.alice, self.bob = (
            {"Authorization": f"Bearer {add_key(self.file, n, **limits)}"} for n in ("alice", "bob")
        )
        keys = watch_keys(str(self.file))
        assert keys
        self.keys: Keys = keys
        super().__init__(folder, keys=keys, **options)


@pytest.fixture
def guarded(tmp_path: Path) -> Guarded:
    return Guarded(tmp_path)


# The file


def test_a_key_is_nowhere_but_in_its_owners_hand(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    given = add_key(file, "alice", per_minute=5, concurrent=2)
    assert given not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    keys = load_keys(str(file))
    assert keys and keys.find(given) == keys.named("alice")
    assert keys.find(given + "x") is None and keys.find("") is None
    secret = keys.secret
    add_key(file, "bob", per_minute=5, concurrent=2)
    again = load_keys(str(file))
    assert again and again.secret == secret and again.find(given) == again.named("alice")
    with pytest.raises(KeysError, match="taken"):
        add_key(file, "bob", per_minute=5, concurrent=2)
    with pytest.raises(KeysError, match="no name"):
        add_key(file, "a b", per_minute=5, concurrent=2)


def test_keys_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert load_keys(None) is None
    given = add_key(tmp_path / "keys.json", "alice", per_minute=5, concurrent=2)
    monkeypatch.setenv(VARIABLE, (tmp_path / "keys.json").read_text())
    keys = load_keys(None)
    assert keys and keys.find(given)


def test_a_byte_order_mark_that_an_editor_adds_does_not_matter(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    given = add_key(file, "alice", per_minute=5, concurrent=2)
    file.write_text("\ufeff" + file.read_text())
    add_key(file, "bob", per_minute=5, concurrent=2)
    keys = load_keys(str(file))
    assert keys and keys.find(given) and keys.named("bob")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"secret": "x", "keys": []}', '{"secret": 5, "keys": [{"name": 1}]}']
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(KeysError, match="keys.json"):
        load_keys(str(tmp_path / "keys.json"))


UNUSABLE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no hash": ({}, {"sha256": None}, r'"sha256" of alice \(NoneType\) must be 64 digits'),
    "a hash that is not ASCII": ({}, {"sha256": "\u00e9" * 64}, '"sha256" of alice'),
    "a hash of other digits": ({}, {"sha256": "x" * 64}, '"sha256" of alice'),
    "a short hash": ({}, {"sha256": "a" * 63}, r'"sha256" of alice \(63 characters\) must be 64 digits'),
    "no request a minute": ({}, {"per_minute": 0}, '"per_minute" of alice is 0: use a whole number'),
    "less than no request": ({}, {"per_minute": -1}, '"per_minute" of alice is -1'),
    "a rate in words": ({}, {"per_minute": "60"}, "\"per_minute\" of alice is '60'"),
    "a rate with a fraction": ({}, {"per_minute": 1.5}, '"per_minute" of alice is 1.5'),
    "no rate": ({}, {"per_minute": None}, '"per_minute" of alice is None'),
    "none at once": ({}, {"concurrent": 0}, '"concurrent" of alice is 0'),
    "true at once": ({}, {"concurrent": True}, '"concurrent" of alice is True'),
    "a list at once": ({}, {"concurrent": []}, r'"concurrent" of alice is \[\]'),
    "a number as name": ({}, {"name": 5}, '"name" of key 0 is 5: use 1 to 64 letters'),
    "a list as name": ({}, {"name": ["alice"]}, '"name" of key 0'),
    "a name with a space": ({}, {"name": "a b"}, "\"name\" of key 0 is 'a b'"),
    "a list as secret": ({"secret": ["a"] * 40}, {}, r'"secret" \(list\) must be text'),
    "a number as secret": ({"secret": 5}, {}, r'"secret" \(int\) must be text'),
    "a short secret": ({"secret": "short"}, {}, r'"secret" \(5 characters\) must be text'),
    "a secret that no UTF-8 holds": ({"secret": "\ud800" * 40}, {}, '"secret"'),
    "no keys": ({"keys": []}, {}, '"keys" is empty: add one'),
    "keys that are a number": ({"keys": 5}, {}, "not what python -m deployments.auth writes"),
    "an unknown field": ({}, {"rate": 5}, "not what python -m deployments.auth writes.*rate"),
}
"""Fields of the file and of its key, and what is said of them."""


def spoiled(good: str, case: str) -> tuple[bytes, str]:
    """A file with a value that cannot be used, and what is said of it."""
    if case == "bytes":
        return good.encode()[:-3] + b"\xff\xfe", "is not UTF-8 text.*save it as UTF-8"
    fields, of_key, message = UNUSABLE[case]
    values = json.loads(good)
    values["keys"][0] |= of_key
    return json.dumps(values | fields).encode(), message


each_unusable = pytest.mark.parametrize("case", [*UNUSABLE, "bytes"])


@each_unusable
def test_a_value_that_cannot_be_used_is_named(tmp_path: Path, case: str) -> None:
    file = tmp_path / "keys.json"
    add_key(file, "alice", per_minute=5, concurrent=2)
    text, message = spoiled(file.read_text(), case)
    file.write_bytes(text)
    with pytest.raises(KeysError, match=f"keys.json.*{message}"):
        load_keys(str(file))


@pytest.mark.usefixtures("no_wait")
@each_unusable
def test_a_value_that_cannot_be_used_leaves_the_keys_of_before(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.json"
    alice = add_key(file, "alice", per_minute=5, concurrent=2)
    keys = watch_keys(str(file))
    assert keys
    file.write_bytes(spoiled(file.read_text(), case)[0])
    with caplog.at_level("WARNING", logger="ray.serve"):
        assert all(keys.find(alice) == keys.named("alice") for _ in range(3))
    assert [record.message.startswith("the API keys stay as they were") for record in caplog.records] == [True]


def test_two_keys_of_one_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    add_key(file, "alice", per_minute=5, concurrent=2)
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"keys": values["keys"] * 2}))
    with pytest.raises(KeysError, match="alice is there twice: rename"):
        load_keys(str(file))


@pytest.mark.parametrize("limits", [{"per_minute": 0, "concurrent": 1}, {"per_minute": 1, "concurrent": -1}])
def test_a_key_that_may_do_nothing_is_not_made(tmp_path: Path, limits: dict[str, int]) -> None:
    with pytest.raises(KeysError, match="use a whole number from 1"):
        add_key(tmp_path / "keys.json", "alice", **limits)
    assert not (tmp_path / "keys.json").exists()


# The file changes


class Secret:
    """A secret as Kubernetes mounts it: `keys.json` is a link into the folder `..data`, which is a link as well. An
    update replaces the second link at once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self.number = folder, folder / "keys.json", 0
        folder.mkdir()
        (folder / "keys.json").symlink_to("..data/keys.json")

    def update(self, text: str) -> None:
        self.number += 1
        version = self.folder / f"..version_{self.number}"
        version.mkdir()
        (version / "keys.json").write_text(text)
        (self.folder / "..data_tmp").symlink_to(version.name)
        os.replace(self.folder / "..data_tmp", self.folder / "..data")
        for old in set(self.folder.glob("..version_*")) - {version}:
            (old / "keys.json").unlink()
            old.rmdir()


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "RELOAD_S", 0.0)


def new_keys(folder: Path, *names: str) -> tuple[str, list[str]]:
    """A file's text, and the keys in it."""
    file = folder / f"{'-'.join(names)}.json"
    given = [add_key(file, name, per_minute=100, concurrent=8) for name in names]
    return file.read_text(), given


@pytest.mark.usefixtures("no_wait")
def test_a_mounted_secret_is_read_again_when_kubernetes_replaces_it(tmp_path: Path) -> None:
    secret = Secret(tmp_path / "secret")
    first, (alice,) = new_keys(tmp_path, "alice")
    second, (bob,) = new_keys(tmp_path, "bob")
    secret.update(first)
    keys = watch_keys(str(secret.file))
    assert keys and keys.find(alice) and not keys.find(bob)
    url = keys.sign_url("/v1/stories/story_1.html")
    session = keys.new_session(keys.keys[0])
    secret.update(second)
    assert keys.find(bob) and not keys.find(alice)
    assert not keys.is_signed_url(*url.split("?")) and keys.read_session(session) is None


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize("text", ["", "{", '{"secret": "short", "keys": []}', None])
def test_a_file_that_became_unusable_changes_nothing_and_is_reported_once(
    tmp_path: Path, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.json"
    alice = add_key(file, "alice", per_minute=100, concurrent=8)
    keys, good = watch_keys(str(file)), file.read_text()
    assert keys
    file.unlink()
    if text is not None:
        file.write_text(text)
    with caplog.at_level("WARNING", logger="ray.serve"):
        assert all(keys.find(alice) for _ in range(5))
    assert [record.message.startswith("the API keys stay as they were") for record in caplog.records] == [True]
    file.write_text(good)
    bob = add_key(file, "bob", per_minute=100, concurrent=8)
    assert keys.find(alice) and keys.find(bob)


def test_a_server_looks_at_the_file_once_a_second_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, now, looks = tmp_path / "keys.json", 100.0, 0
    find_version = auth.KeyFile._find_version

    def counted(self: auth.KeyFile) -> tuple[int, ...] | None:
        nonlocal looks
        looks += 1
        return find_version(self)

    add_key(file, "alice", per_minute=100, concurrent=8)
    monkeypatch.setattr(auth, "time", SimpleNamespace(monotonic=lambda: now))
    keys = watch_keys(str(file))
    assert keys
    bob = add_key(file, "bob", per_minute=100, concurrent=8)
    monkeypatch.setattr(auth.KeyFile, "_find_version", counted)
    for second in range(3):
        now = 101.0 + second
        assert all(keys.find(bob) for _ in range(1000))
    assert looks == 3


@pytest.mark.usefixtures("no_wait")
def test_a_running_server_takes_new_keys_and_refuses_removed_ones(guarded: Guarded, tmp_path: Path) -> None:
    assert guarded.request("GET", "/v1/stories", headers=guarded.alice).status_code == 200
    text, (carol,) = new_keys(tmp_path, "carol")
    partial = tmp_path / "partial"
    partial.write_text(text)
    partial.replace(guarded.file)
    assert guarded.request("GET", "/v1/stories", headers={"Authorization": f"Bearer {carol}"}).status_code == 200
    assert_error(guarded.request("GET", "/v1/stories", headers=guarded.alice), 401, says=("asks for a key",))


# Who is let in


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/stories"),
        ("GET", "/v1/stories"),
        ("GET", "/v1/stories/story_1"),
        ("GET", "/v1/stories/story_1.html"),
        ("GET", "/v1/stories/story_1/events"),
        ("POST", "/v1/images/generations"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/pictures"),
        ("GET", "/v1/models"),
        ("GET", "/v1/nothing"),
    ],
)
def test_without_a_key_nothing_is_let_through(guarded: Guarded, method: str, path: str) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic abc"},
        {"Cookie": f"{COOKIE}=a.b.c"},
    ):
        reply = guarded.request(method, path, content=b"{" * 100, headers=headers)
        assert_error(reply, 401, says=("asks for a key",))
        assert "Bearer" in reply.headers["www-authenticate"]
    assert not guarded.generator.requests


@pytest.mark.parametrize(
    ("path", "query", "cookie"),
    [
        ("/v1/stories/x.html", b"expires=9999999999&signature=\xe9", b""),
        ("/v1/stories/x.html", b"expires=" + 5000 * b"9" + b"&signature=a", b""),
        ("/v1/stories/x.html", b"expires=\xb2&signature=a", b""),
        ("/v1/models", b"", b'minigpt5="alice.9999999999.\\377"'),
        ("/v1/models", b"", b"minigpt5=alice.9999999999.\xe9"),
        ("/v1/models", b"", b"minigpt5=alice." + 5000 * b"9" + b".x"),
        ("/v1/models", b"", b"minigpt5=alice..; minigpt5=\x00"),
    ],
)
def test_forgeries_of_any_shape_are_refused(guarded: Guarded, path: str, query: bytes, cookie: bytes) -> None:
    """Bytes that no client of good faith sends."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def never(*arguments: Any) -> None:
        raise AssertionError("it was let through")

    scope = {"type": "http", "method": "GET", "path": path, "query_string": query, "headers": [(b"cookie", cookie)]}
    asyncio.run(KeyGuard(never, keys=guarded.keys, quota=guarded.front.quota)(scope, never, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 401


def test_health_and_the_studio_are_for_everybody(guarded: Guarded) -> None:
    for path in ("/healthz", "/readyz", "/", "/studio/studio.js", "/docs"):
        assert guarded.request("GET", path).status_code == 200


def test_a_story_is_its_own_keys_alone(guarded: Guarded) -> None:
    story = guarded.request("POST", "/v1/stories", json=BODY, headers=guarded.alice).json()
    path = f"/v1/stories/{story['id']}"
    reads = ["", ".html", ".epub", "/events", "/pages/1.png", "/pages/1/vokens"]
    for rest in reads:
        assert guarded.request("GET", path + rest, headers=guarded.alice).status_code == 200, rest
        assert_error(guarded.request("GET", path + rest, headers=guarded.bob), 404)
    for method, rest, body in (
        ("POST", "/cancel", None),
        ("POST", "/pages", {}),
        ("PATCH", "/pages/1", {"variant": 0}),
        ("POST", "/pages/1/redraw", {}),
        ("POST", "/share", {}),
        ("DELETE", "", None),
    ):
        assert_error(guarded.request(method, path + rest, json=body, headers=guarded.bob), 404)
    for _ in range(2):  # before the index of owners is made, and after it
        assert guarded.request("GET", "/v1/stories", headers=guarded.bob).json()["data"] == []
        listed = guarded.request("GET", "/v1/stories", headers=guarded.alice).json()["data"]
        assert [one["id"] for one in listed] == [story["id"]]
        guarded.store.index_owners()
    assert guarded.request("GET", path, headers=guarded.alice).json() == story
    assert guarded.generator.requests[0].key == "key-alice"


def test_a_browser_logs_in_for_a_cookie(guarded: Guarded) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        assert_error(await client.get("/v1/models"), 401)
        assert_error(await client.post("/login", json={"key": "wrong"}), 401, param="key")
        given = guarded.alice["Authorization"].removeprefix("Bearer ")
        reply = await client.post("/login", json={"key": given})
        assert reply.status_code == 204
        cookie = reply.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and given not in cookie
        assert (await client.get("/v1/models")).status_code == 200  # the client keeps cookies as a browser does
        token = client.cookies[COOKIE]
        client.cookies.clear()
        assert_error(await client.get("/v1/models", headers={"Cookie": f"{COOKIE}={token[:-1]}x"}), 401)

    guarded.run(use)


def test_a_session_ends(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    key = guarded.keys.named("alice")
    assert key
    token = guarded.keys.new_session(key)
    assert guarded.keys.read_session(token) == key
    assert guarded.keys.read_session(token.replace("alice", "bob")) is None
    monkeypatch.setattr("deployments.auth.time.time", lambda: 2e12)
    assert guarded.keys.read_session(token) is None


def test_a_book_is_shared_by_a_link_that_expires(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    story = guarded.request("POST", "/v1/stories", json=BODY, headers=guarded.alice).json()
    path = f"/v1/stories/{story['id']}"
    links = guarded.request("POST", f"{path}/share", json={"expires_s": 60}, headers=guarded.alice).json()
    for kind in ("html", "epub", "pdf"):
        assert guarded.request("GET", links[kind]).status_code == 200
    assert_error(guarded.request("GET", links["html"].replace(".html", ".epub")), 401)
    assert_error(guarded.request("GET", links["html"][:-1]), 401)
    assert_error(guarded.request("GET", links["html"].replace("expires=", "expires=1")), 401)
    assert_error(guarded.request("GET", f"{path}?{links['html'].partition('?')[2]}"), 401)
    monkeypatch.setattr("deployments.auth.time.time", lambda: 2e12)
    assert_error(guarded.request("GET", links["html"]), 401)


def test_the_urls_in_replies_need_no_key_until_they_expire(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every URL in every kind of reply is signed, so that other pages and chats can show it."""
    create = guarded.request("POST", "/v1/stories", json={**BODY, "stream": True}, headers=guarded.alice)
    events = read_events(create.text)
    story = events[-1][2]
    path = f"/v1/stories/{story['id']}"
    redrawn = guarded.request("POST", f"{path}/pages/1/redraw", json={"seed": 3}, headers=guarded.alice).json()
    listed = guarded.request("GET", "/v1/stories", headers=guarded.alice).json()
    whole = guarded.request("GET", path, headers=guarded.alice).json()
    body = {"prompt": "A fox", "response_format": "url"}
    drawn = guarded.request("POST", "/v1/images/generations", json=body, headers=guarded.alice).json()
    urls = {data["url"] for _, name, data in events if name == "image"}
    urls |= {page["image"]["url"] for page in (*story["pages"], redrawn, *whole["pages"], *listed["data"][0]["pages"])}
    urls |= {variant["url"] for variant in redrawn["variants"]} | {drawn["data"][0]["url"]}
    assert len(urls) == 4
    for url in urls:
        assert guarded.request("GET", url).content.startswith(b"\x89PNG"), url
        assert guarded.request("GET", url, headers=guarded.alice).status_code == 200
        bare, _, query = url.partition("?")
        assert_error(guarded.request("GET", bare), 401)
        assert_error(guarded.request("GET", url[:-1] + ("0" if url[-1] != "0" else "1")), 401)
        assert_error(guarded.request("GET", f"{path}?{query}"), 401)
        assert_error(guarded.request("GET", url.replace("variant=0", "variant=1") + "&variant=1"), 401)
    monkeypatch.setattr("deployments.auth.time.time", lambda: 2e12)
    for url in urls:
        assert_error(guarded.request("GET", url), 401)


# How much


def test_a_key_has_so_many_requests_a_minute(tmp_path: Path) -> None:
    now = 0.0
    guarded = Guarded(tmp_path, per_minute=2, ledger=LocalLedger(clock=lambda: now))
    for _ in range(2):
        assert guarded.request("POST", "/v1/stories", json=BODY, headers=guarded.alice).status_code == 201
    reply = guarded.request("POST", "/v1/stories", json=BODY, headers=guarded.alice)
    assert_error(reply, 429, says=("2 requests a minute",))
    assert int(reply.headers["retry-after"]) == 30
    assert guarded.request("GET", "/v1/stories", headers=guarded.alice).status_code == 200
    assert guarded.request("POST", "/v1/stories", json=BODY, headers=guarded.bob).status_code == 201
    now = 31.0
    assert guarded.request("POST", "/v1/stories", json=BODY, headers=guarded.alice).status_code == 201


def test_a_key_has_so_many_requests_at_once(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, concurrent=1, generator=FakeGenerator())

    async def use(client: httpx.AsyncClient) -> None:
        guarded.generator.gate.clear()
        first = asyncio.create_task(client.post("/v1/stories", json={**BODY, "stream": True}, headers=guarded.alice))
        while not guarded.generator.requests:
            await asyncio.sleep(0.01)
        assert_error(await client.post("/v1/stories", json=BODY, headers=guarded.alice), 429, says=("1 at once",))
        guarded.generator.gate.set()
        assert read_events((await first).text)[-1][1] == "done"
        assert (await client.post("/v1/stories", json=BODY, headers=guarded.alice)).status_code == 201

    guarded.run(use)


def test_without_keys_everything_is_open(tmp_path: Path) -> None:
    served = Served(tmp_path)
    story = served.post(BODY).json()
    assert served.request("POST", "/login", json={"key": "any"}).status_code == 204
    links = served.request("POST", f"/v1/stories/{story['id']}/share", json={}).json()
    assert served.request("GET", links["html"]).status_code == 200
    assert json.dumps(story)


def test_no_prefix_leads_around_the_keys(guarded: Guarded) -> None:
    """Serve leaves an application's route_prefix in the path."""

    async def main() -> None:
        transport = httpx.ASGITransport(create_api(guarded.front), root_path="/api")
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for path in ("/api/v1/stories", "/v1/stories"):
                assert (await client.post(path, json=BODY)).status_code == 401
                assert (await client.post(path, json=BODY, headers=guarded.alice)).status_code == 201
            story = (await client.get("/api/v1/stories", headers=guarded.alice)).json()["data"][0]
            url = story["pages"][0]["image"]["url"]
            assert url.startswith("/api/v1/stories/")
            assert (await client.get(url)).status_code == 200
            links = (await client.post(f"/api/v1/stories/{story['id']}/share", json={}, headers=guarded.alice)).json()
            for kind in ("html", "epub", "pdf"):
                assert (await client.get(links[kind])).status_code == 200
            logged_in = await client.post("/api/login", json={"key": guarded.alice["Authorization"].split()[1]})
            assert "Path=/api/;" in logged_in.headers["Set-Cookie"], "for no other application of the cluster"
            assert (await client.get("/api/v1/stories")).status_code == 200, "by the cookie"
            bad = await client.post("/api/v1/chat/completions", json={"messages": 1}, headers=guarded.alice)
            assert bad.status_code == 400, "as OpenAI's clients expect it"

    asyncio.run(main())


def test_who_leaves_while_it_is_counted_is_counted_as_done(tmp_path: Path) -> None:
    class Remote(LocalLedger):
        async def begin(self, *arguments: Any, **options: Any) -> float:
            granted = await super().begin(*arguments, **options)
            await asyncio.sleep(0.02)  # the answer is on its way
            return granted

    guarded = Guarded(tmp_path, ledger=Remote(), concurrent=1)

    async def use(client: httpx.AsyncClient) -> None:
        task = asyncio.create_task(client.post("/v1/stories", json=BODY, headers=guarded.alice))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait({task})
        assert (await client.post("/v1/stories", json=BODY, headers=guarded.alice)).status_code == 201

    guarded.run(use)


def test_without_the_ledger_a_client_is_told_to_come_back(tmp_path: Path) -> None:
    class Away(LocalLedger):
        async def begin(self, *arguments: Any, **options: Any) -> float:
            raise EngineLost("the fronts' ledger does not answer")

    guarded = Guarded(tmp_path, ledger=Away())
    reply = guarded.request("POST", "/v1/stories", json=BODY, headers=guarded.alice)
    assert_error(reply, 503, says=("ledger does not answer",))
    assert reply.headers["Retry-After"] and reply.headers["X-Request-Id"]


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_picture_of_each_kind_is_read_by_its_signed_url(guarded: Guarded, kind: str) -> None:
    body = {"prompt": "A fox", "response_format": "url", "output_format": kind}
    made = guarded.request("POST", "/v1/images/generations", json=body, headers=guarded.alice).json()
    reply = guarded.request("GET", made["data"][0]["url"])
    assert reply.status_code == 200 and reply.headers["content-type"] == f"image/{kind}"
