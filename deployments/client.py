"""A client of the server, and its command line: `python -m deployments.client create "A fox who finds a balloon"`.

    with Client("http://127.0.0.1:8000") as client:
        for event in client.create("A fox who finds a red balloon", pages=4):
            print(event.name, event.data)

A story that was begun is followed to its end whatever happens to the connection or to the server: creating is safe to
repeat (an Idempotency-Key), and the stream resumes after the last event that was heard.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import os
import re
import secrets
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from deployments.sse import EventDecoder, EventTooLong
from minigpt5.errors import StorageError
from minigpt5.story.export.book_file import check_place, write_book

URL, URL_VARIABLE, KEY_VARIABLE = "http://127.0.0.1:8000", "MINIGPT5_URL", "MINIGPT5_KEY"
PATIENCE_S = 60.0
"""A server that is silent for this long is given up; an accepted story is finished there anyway."""
TIMEOUT = httpx.Timeout(10.0, read=60.0)  # a stream is never quiet for longer than 10 s
REFUSED, NO_ANSWER = (429, 503), (502, 504)
"""Statuses of a server that takes no more, and of a proxy in front of a server that is away."""
PAUSE_S = 0.5
"""Between two tries, where the server does not say how long with Retry-After."""


class ClientError(Exception):
    """A refusal of the server, or none of its answers; the message says what it was."""

    def __init__(self, message: str, *, status: int = 0, code: str | None = None, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after_s = status, code, retry_after_s


@dataclass(frozen=True, kw_only=True)
class Event:
    """One of a story's stream: see the HTTP contract for `data`."""

    id: str
    name: str
    data: dict[str, Any]


class Client:
    """Example: `Client(key="mg5-...").story("story_3f")["pages"][0]["text"]`"""

    def __init__(self, url: str = "", *, key: str = "", transport: httpx.BaseTransport | None = None) -> None:
        """`url` and `key`: default from MINIGPT5_URL and MINIGPT5_KEY, else this machine's server and none.

        Another machine is reached through the proxy that the environment names, if any. Raises ClientError where the
        URL or the proxy cannot be used."""
        key = (key or os.environ.get(KEY_VARIABLE, "")).strip()  # files of secrets end with a new line
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.url = url or os.environ.get(URL_VARIABLE, URL)
        parsed = _parse_url(self.url)
        proxy = "" if transport else find_proxy(parsed)
        self._peer = f"{self.url} through the proxy {_without_password(proxy)}" if proxy else self.url
        transport = transport or _open_transport(proxy, parsed.host)
        self._http = httpx.Client(base_url=parsed, headers=headers, timeout=TIMEOUT, transport=transport)

    def create(self, prompt: str | list[dict[str, str]], **settings: Any) -> Iterator[Event]:
        """Begin a story and follow it to its end. `settings`: as in POST /v1/stories."""
        return self.follow(self.submit(prompt, **settings)["id"])

    def submit(self, prompt: str | list[dict[str, str]], **settings: Any) -> dict[str, Any]:
        """Begin a story; returns it as it is then."""
        headers = {"Idempotency-Key": secrets.token_hex(16)}
        body = {"prompt": prompt, **settings, "wait": False}
        return self._ask("POST", "/v1/stories", json=body, headers=headers).json()

    def follow(self, story_id: str, *, after: str = "") -> Iterator[Event]:
        """A story's events, from its beginning or `after` an event's id, to its end."""
        path, heard_at = f"/v1/stories/{story_id}/events", time.monotonic()
        while True:
            try:
                headers = {"Last-Event-ID": after} if after else {}
                with self._http.stream("GET", path, headers=headers) as response:
                    if _validate_response(response).status_code == 204:  # nothing comes after that event
                        return
                    if not (kind := response.headers.get("Content-Type", "")).startswith("text/event-stream"):
                        raise ClientError(f"{self._peer} sent {kind[:40] or 'something'} and no story's events")
                    decoder = EventDecoder()
                    for chunk in response.iter_bytes():
                        heard_at = time.monotonic()
                        for event in decoder.feed(chunk):
                            after = event.id
                            yield Event(id=event.id, name=event.name, data=json.loads(event.data))
                            if event.name in ("done", "error"):
                                return
                raise httpx.RemoteProtocolError("the stream ended before the story")
            except (EventTooLong, json.JSONDecodeError) as failure:
                raise ClientError(f"{self._peer} sent no story's events: {failure}") from failure
            except (httpx.TransportError, ClientError) as failure:
                self._wait_after(failure, heard_at, again=True)

    def story(self, story_id: str) -> dict[str, Any]:
        return self._ask("GET", f"/v1/stories/{story_id}").json()

    def stories(self) -> Iterator[dict[str, Any]]:
        """Newest first."""
        after: dict[str, str] = {}
        while True:
            page = self._ask("GET", "/v1/stories", params={"limit": 50, **after}).json()
            yield from page["data"]
            if not page["has_more"]:
                return
            after = {"after": page["data"][-1]["id"]}

    def add_pages(self, story_id: str, count: int = 1) -> Iterator[Event]:
        """Add pages to a story that has ended, and follow it."""
        self._ask("POST", f"/v1/stories/{story_id}/pages", json={"count": count, "wait": False}, again=False)
        return self.follow(story_id)

    def redraw(self, story_id: str, page: int, **settings: Any) -> dict[str, Any]:
        """Another picture of a page; returns the page."""
        path = f"/v1/stories/{story_id}/pages/{page}/redraw"
        return self._ask("POST", path, json=settings, again=False).json()

    def edit(self, story_id: str, page: int, text: str) -> dict[str, Any]:
        """Another text, and its picture; returns the page."""
        path = f"/v1/stories/{story_id}/pages/{page}"
        return self._ask("PATCH", path, json={"text": text}, again=False).json()

    def cancel(self, story_id: str) -> dict[str, Any]:
        return self._ask("POST", f"/v1/stories/{story_id}/cancel").json()

    def delete(self, story_id: str) -> None:
        self._ask("DELETE", f"/v1/stories/{story_id}", again=False)

    def export(self, story_id: str, path: str | Path) -> Path:
        """Write a story's book, whole or not at all; the file's name says which: .html, .epub or .pdf."""
        path = Path(path)
        with _writing():
            check_place(path)
            write_book(path, self._ask("GET", f"/v1/stories/{story_id}{path.suffix.lower()}").content)
        return path

    def picture(self, url: str) -> bytes:
        """The PNG under a URL of a reply."""
        return self._ask("GET", self.address(url)).content

    def address(self, url: str) -> str:
        """A URL of a reply, whole. It has the prefix that Serve gives the application, and none that a proxy takes
        away."""
        base = self._http.base_url
        prefix = base.path.rstrip("/")
        return f"{str(base).rstrip('/')}{url.removeprefix(prefix) if url.startswith(f'{prefix}/') else url}"

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, method: str, path: str, *, again: bool = True, **options: Any) -> httpx.Response:
        """`again`: it may be asked twice, and is where there was no answer, or a busy server says when."""
        began = time.monotonic()
        while True:
            try:
                return _validate_response(self._http.request(method, path, **options))
            except httpx.TransportError as failure:
                self._wait_after(failure if again else ClientError(f"{method} {path}: {failure}"), began, again=again)
            except ClientError as failure:
                self._wait_after(failure, began, again=again)
            except UnicodeEncodeError as failure:
                text = failure.object[max(0, failure.start - 20) : failure.end]
                raise ClientError(
                    f"{text!r} holds half of a surrogate pair or a byte that is not UTF-8: write it as UTF-8"
                ) from None

    def _wait_after(self, failure: Exception, since: float, *, again: bool) -> None:
        """Wait as long as a busy server says, or for PAUSE_S. Raises ClientError where the failure does not pass, or
        not within PATIENCE_S."""
        passing = (*REFUSED, *NO_ANSWER) if again else REFUSED
        refusal = failure if isinstance(failure, ClientError) else None
        is_for_good = refusal is not None and refusal.status not in passing
        pause_s = max(PAUSE_S, refusal.retry_after_s) if refusal else PAUSE_S
        if is_for_good or time.monotonic() + pause_s - since > PATIENCE_S:
            if refusal:
                raise refusal
            raise ClientError(f"no answer from {self._peer}: {str(failure) or type(failure).__name__}") from failure
        time.sleep(pause_s)


def _validate_response(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    response.read()
    try:
        error = response.json()["error"]
        message, code = error["message"], error["code"]
    except (ValueError, KeyError, TypeError):  # of a proxy, maybe
        message, code = " ".join(f"{response.status_code} {response.text[:200]}".split()), None
    given = response.headers.get("Retry-After", "")
    retry_after_s = int(given) if given.isdecimal() else 0
    raise ClientError(message, status=response.status_code, code=code, retry_after_s=retry_after_s)


def _parse_url(url: str) -> httpx.URL:
    """Raises ClientError."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as failure:
        raise ClientError(f"{url!r} is no URL of a server: {failure}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ClientError(f"{url!r} is no URL of a server: write it like {URL}")
    return parsed


# The way to the server


def find_proxy(url: httpx.URL) -> str:
    """Find the proxy that HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY name for a URL; none is "".

    This machine itself is reached without one, whatever they say."""
    if is_this_machine(url.host) or urllib.request.proxy_bypass(url.netloc.decode()):
        return ""
    proxies = urllib.request.getproxies()
    found = proxies.get(url.scheme) or proxies.get("all", "")
    return found if not found or "://" in found else f"http://{found}"


def is_this_machine(host: str) -> bool:
    """Whether a host is a loopback address or a name of one."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback or address.is_unspecified


def _open_transport(proxy: str, host: str) -> httpx.HTTPTransport:
    """Raises ClientError where the proxy cannot be used."""
    try:
        return httpx.HTTPTransport(proxy=proxy or None)
    except (ImportError, ValueError, httpx.InvalidURL) as failure:
        shown = _without_password(proxy)
        kinds = "it must be http://, https:// or socks5://"
        reason = "SOCKS needs pip install 'httpx[socks]'" if isinstance(failure, ImportError) else kinds
        raise ClientError(
            f"the proxy {shown} of the environment cannot be used: {reason}, or NO_PROXY={host} goes without it"
        ) from failure


def _without_password(proxy: str) -> str:
    return re.sub(r"//.*@", "//", proxy)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Within it a book that cannot be written is a ClientError."""
    try:
        yield
    except StorageError as error:
        raise ClientError(str(error)) from error


# The command line


def show_progress(events: Iterator[Event], pages: int) -> dict[str, Any]:
    """Texts as their pages are written, and a bar of the pictures; returns the story."""
    texts: dict[int, str] = {}
    drawn: dict[int, float] = {}
    with tqdm(total=pages, unit="page", bar_format="{l_bar}{bar}| {n:.1f} of {total} pages, {elapsed}") as bar:
        for event in events:
            page = event.data.get("page", 0)
            if event.name == "text":
                texts[page] = texts.get(page, "") + event.data["delta"]
            elif event.name == "restart":
                texts[page] = ""
            elif event.name == "slot":
                bar.write(f"{page}. {texts.get(page, '')}", file=sys.stdout)
            elif event.name == "progress":
                drawn[page] = event.data["step"] / event.data["steps"]
            elif event.name == "page":
                drawn[event.data["index"]] = 1.0
                if event.data.get("error"):
                    bar.write(f"{event.data['index']}. (no picture: {event.data['error']})", file=sys.stdout)
            bar.n = min(sum(drawn.values()), pages)
            bar.refresh()
            if event.name == "error":
                raise ClientError(f"{event.data['id']} failed: {event.data['error']['message']}")
    return event.data


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deployments.client", description="Stories from a server.")
    parser.add_argument("--url", default="", help=f"(default: ${URL_VARIABLE}, else {URL})")
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="begin a story and follow it")
    create.add_argument("prompt")
    create.add_argument("--pages", type=int, default=4)
    create.add_argument("--seed", type=int)
    create.add_argument("--steps", type=int)
    create.add_argument("--guidance-scale", type=float)
    create.add_argument("--width", type=int)
    create.add_argument("--height", type=int)
    create.add_argument("--style", help="one of the model's style adapters")
    create.add_argument("--feedback", choices=("text", "pictures"), default="text")
    create.add_argument("--consistency", choices=("off", "story"), help="story: pages attend to the first one")
    create.add_argument("--out", type=Path, help="book to write at the end: .html, .epub or .pdf")
    commands.add_parser("list", help="stories, newest first")
    of_one = {
        "show": "a story as JSON",
        "follow": "follow a story that was begun",
        "continue": "more pages of a story",
        "redraw": "another picture of a page",
        "export": "write a story's book",
        "cancel": "stop a story",
        "delete": "remove a story",
    }
    one = {name: commands.add_parser(name, help=words) for name, words in of_one.items()}
    for command in one.values():
        command.add_argument("id")
    one["continue"].add_argument("--count", type=int, default=1)
    one["redraw"].add_argument("page", type=int)
    one["redraw"].add_argument("--seed", type=int)
    one["redraw"].add_argument("--width", type=int)
    one["redraw"].add_argument("--height", type=int)
    one["export"].add_argument("out", type=Path, help=".html, .epub or .pdf")
    return parser.parse_args(arguments)


def run(client: Client, options: argparse.Namespace) -> None:
    def chosen(*names: str) -> dict[str, Any]:
        values = {name: getattr(options, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    if options.command == "create":
        if options.out:
            with _writing():
                check_place(options.out)
        settings = chosen(
            *("pages", "seed", "steps", "guidance_scale", "width", "height", "style", "feedback", "consistency")
        )
        story = client.submit(options.prompt, **settings)
        print(f"{story['id']} is begun", file=sys.stderr)  # whatever happens here, it can be followed
        story = show_progress(client.follow(story["id"]), options.pages)
        print(client.export(story["id"], options.out) if options.out else story["id"])
    elif options.command == "follow":
        pages = len(client.story(options.id)["pages"])
        show_progress(client.follow(options.id), max(1, pages))
    elif options.command == "continue":
        pages = len(client.story(options.id)["pages"]) + options.count
        show_progress(client.add_pages(options.id, options.count), pages)
    elif options.command == "redraw":
        page = client.redraw(options.id, options.page, **chosen("seed", "width", "height"))
        print(client.address(page["image"]["url"]))
    elif options.command == "export":
        print(client.export(options.id, options.out))
    elif options.command == "list":
        for story in client.stories():
            print(f"{story['id']}  {story['status']:9}  {len(story['pages'])} pages  {story['prompt'][:60]}")
    elif options.command == "delete":
        client.delete(options.id)
    else:
        print(json.dumps({"show": client.story, "cancel": client.cancel}[options.command](options.id), indent=1))


def main() -> int:
    options = parse_args()
    try:
        with Client(options.url) as client:
            run(client, options)
    except (ClientError, OSError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nthe story goes on at the server", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
