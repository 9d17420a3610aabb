"""Stories that readers follow to their end while something breaks, and what is lost, doubled or changed afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from deployments.sse import read_events
from minigpt5.errors import StorageError, StoryNotFound
from minigpt5.story.store import StoryStore

ROUND_S = 240.0
"""A story that has not ended by then is lost."""
POST_S = 60.0
"""How long a post without an answer is repeated, under the same Idempotency-Key."""
RETRY_S = 0.3
ACCEPTED = 202
UNKNOWN = (500, 502, 504)
"""Answers of a proxy whose server died over the request: nobody knows whether the story has begun."""
WRONG = ("lost", "pages_missing", "pages_twice", "pictures_missing", "pictures_changed", "pages_told_otherwise")
"""Counts of `verdict` that have to be 0."""


class Reader(threading.Thread):
    """Posts a story and follows it as a browser does, until its end: a lost stream is taken up by `Last-Event-ID`."""

    def __init__(self, url: str, body: dict[str, Any], *, key: str) -> None:
        super().__init__(daemon=True)
        self.url, self.body, self.key = url, body, key
        self.status, self.story_id, self.last = 0, "", ""
        """Status of the answer to the post; 0: there is none."""
        self.texts: dict[int, str] = {}
        self.events: list[tuple[str, int, float]] = []
        """Name, page and time (`time.monotonic`) of each."""
        self.num_lost = self.num_restarts = 0
        self.end: dict[str, Any] | None = None

    def run(self) -> None:
        if not self.status:
            self.post()
        if self.is_accepted:
            self._follow()

    def post(self) -> None:
        """Ask for the story; again where no answer comes."""
        deadline, headers = time.monotonic() + POST_S, {"Idempotency-Key": self.key}
        body = {**self.body, "wait": False}
        while not self.status and time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                reply = httpx.post(f"{self.url}/v1/stories", json=body, headers=headers, timeout=60, trust_env=False)
                if reply.status_code not in UNKNOWN:
                    self.status = reply.status_code
                    self.story_id = reply.json()["id"] if self.is_accepted else ""
                    return
            time.sleep(RETRY_S)

    def _follow(self) -> None:
        deadline, url = time.monotonic() + ROUND_S, f"{self.url}/v1/stories/{self.story_id}/events"
        while self.end is None and time.monotonic() < deadline:
            headers = {"Last-Event-ID": self.last} if self.last else {}
            try:
                with httpx.stream("GET", url, headers=headers, timeout=30, trust_env=False) as reply:
                    if reply.status_code == 200:
                        self._read(reply)
            except httpx.HTTPError:
                pass
            if self.end is None:
                self.num_lost += 1
                time.sleep(RETRY_S)

    def _read(self, reply: httpx.Response) -> None:
        for event in read_events(reply.iter_bytes()):
            data = json.loads(event.data)
            page = data.get("page", data.get("index", 0))
            if event.name == "text":
                self.texts[page] = self.texts.get(page, "") + data["delta"]
            elif event.name == "restart":
                self.texts[page] = ""
                self.num_restarts += 1
            elif event.name in ("done", "error"):
                self.end = data
            self.events.append((event.name, page, time.monotonic()))
            self.last = event.id

    @property
    def is_accepted(self) -> bool:
        return self.status == ACCEPTED

    @property
    def is_under_way(self) -> bool:
        return self.is_accepted and self.end is None

    def has(self, name: str) -> bool:
        return any(event == name for event, _, _ in self.events)

    def num_pages_twice(self) -> int:
        """Pages that this reader was told of more than once."""
        told = [page for name, page, _ in self.events if name == "page"]
        return len(told) - len(set(told))

    def next_page_s(self, since: float) -> float:
        """Seconds from `since` to the next page, or to the end where no page was left; to now where neither came."""
        for name, _, at in self.events:
            if at > since and name in ("page", "done"):
                return at - since
        return time.monotonic() - since


def finished_pictures(store: StoryStore, ids: Sequence[str]) -> dict[tuple[str, int], str]:
    """(story, page) -> digest of every picture whose page says that it is there."""
    found = {}
    for story_id in ids:
        with contextlib.suppress(StoryNotFound, StorageError):
            for page in store.load(story_id).pages:
                if page.image:
                    picture = store.load_picture(story_id, page.index, variant=page.variant)
                    found[story_id, page.index] = hashlib.sha256(picture).hexdigest()
    return found


def verdict(readers: Sequence[Reader], store: StoryStore, before: dict[tuple[str, int], str]) -> dict[str, Any]:
    """What came of the accepted stories of `readers`. `before`: their finished pictures when something broke."""
    accepted = [reader for reader in readers if reader.is_accepted]
    stories = [stored(reader) for reader in accepted]
    after = finished_pictures(store, [reader.story_id for reader in accepted])
    lists = [[page["index"] for page in story["pages"]] for story in stories]
    told = list(zip(accepted, stories, strict=True))
    return {
        "lost": sum(story["status"] != "done" for story in stories),
        "pages_missing": sum(
            len(set(range(1, reader.body["pages"] + 1)) - set(numbers))
            for reader, numbers in zip(accepted, lists, strict=True)
        ),
        "pages_twice": sum(len(numbers) - len(set(numbers)) for numbers in lists)
        + sum(reader.num_pages_twice() for reader in accepted),
        "pictures_missing": sum("image" not in page for story in stories for page in story["pages"]),
        "pictures_finished_before": len(before),
        "pictures_changed": sum(after.get(place) != digest for place, digest in before.items()),
        "pages_told_otherwise": sum(
            reader.texts.get(page["index"]) != page["text"] for reader, story in told for page in story["pages"]
        ),
        "restarts": sum(reader.num_restarts for reader in accepted),
        "streams_lost": sum(reader.num_lost for reader in accepted),
    }


def stored(reader: Reader) -> dict[str, Any]:
    """The story as the server shows it."""
    for _ in range(100):
        with contextlib.suppress(httpx.HTTPError):
            reply = httpx.get(f"{reader.url}/v1/stories/{reader.story_id}", timeout=30, trust_env=False)
            if reply.status_code == 200:
                return reply.json()
        time.sleep(RETRY_S)
    raise AssertionError(f"{reader.story_id} cannot be read")


def wait_for(condition: Callable[[], bool], seconds: float = ROUND_S, *, pause_s: float = 0.001) -> None:
    """Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not come within {seconds:g} s")
        time.sleep(pause_s)
