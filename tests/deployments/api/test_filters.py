"""Filters in the front: what is stopped, where it is said, and that the rest goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from minigpt5.errors import Blocked
from minigpt5.story.safety import TextFilter
from minigpt5.types import DecoderEvent, DrawRequest
from tests.helpers.fakes import FakeDecoder
from tests.helpers.served import Served, assert_error, read_events

BAD = "You stupid fucking idiot"


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path, text_filter=TextFilter())


def test_what_a_client_writes_is_filtered_everywhere(served: Served) -> None:
    story = served.post({"prompt": "A fox", "pages": 1}).json()
    path = f"/v1/stories/{story['id']}"
    chat = {"messages": [{"role": "user", "content": BAD}]}
    for reply, status in (
        (served.post({"prompt": BAD}), 422),
        (served.post({"prompt": [{"type": "text", "text": BAD}]}), 422),
        (served.post({"prompt": BAD}, "/v1/images/generations"), 400),
        (served.post(chat, "/v1/chat/completions"), 400),
        (served.request("PATCH", f"{path}/pages/1", json={"text": BAD}), 422),
    ):
        assert_error(reply, status, says=("stopped by the text filter",))
        assert reply.json()["error"]["code"] == "content_blocked"
    assert served.request("GET", path).json() == story
    assert served.store.running() == []


def test_a_story_whose_text_is_stopped_says_so(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    score = TextFilter.score
    monkeypatch.setattr(TextFilter, "score", lambda self, text: 1.0 if "Page 2" in text else score(self, text))
    events = read_events(served.post({"prompt": "A fox", "pages": 3, "stream": True}).text)
    assert events[-1][1] == "error"
    assert "page 2 was stopped by the text filter" in events[-1][2]["error"]["message"]
    assert "slot" not in {name for _, name, data in events if data.get("page") == 2}


def test_a_stopped_picture_is_a_stated_reason_on_its_page(tmp_path: Path) -> None:
    class Filtered(FakeDecoder):
        async def decode(self, request: DrawRequest):  # type: ignore[no-untyped-def]
            if request.vokens.page == 2:
                raise Blocked("the picture was stopped by the picture filter")
            event: DecoderEvent
            async for event in super().decode(request):
                yield event

    story = Served(tmp_path, decoder=Filtered()).post({"prompt": "A fox", "pages": 3}).json()
    assert story["status"] == "done"
    assert [page.get("error") for page in story["pages"]] == [
        None,
        "the picture was stopped by the picture filter",
        None,
    ]


def test_a_stopped_text_is_taken_back_and_kept_nowhere(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextFilter, "score", lambda self, text: float("Page 2" in text))
    events = read_events(served.post({"prompt": "A fox", "pages": 3, "stream": True}).text)
    story = events[0][2]["id"]
    last = [name for _, name, data in events if data.get("page") == 2][-1]
    assert last == "restart" and "Page 2" not in str(events[-1])
    pages = served.request("GET", f"/v1/stories/{story}").json()["pages"]
    assert [page["text"] for page in pages][1:] == [""] and "Page 1" in pages[0]["text"]
    assert "Page 2" not in served.request("GET", f"/v1/stories/{story}.html").text


def test_a_reply_of_a_chat_is_filtered_too(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextFilter, "score", lambda self, text: float("Page 2" in text))
    body = {"messages": [{"role": "user", "content": "A fox?"}], "pages": 2}
    reply = served.post(body, "/v1/chat/completions")
    assert_error(reply, 400, says=("the reply was stopped by the text filter",))
    streamed = served.post({**body, "stream": True}, "/v1/chat/completions").text
    assert "the reply was stopped by the text filter" in streamed and "[DONE]" not in streamed
