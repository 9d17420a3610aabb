"""A judge behind OpenAI's interface: what it is sent, what it may answer, and what is never done."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from minigpt5.errors import InvalidRequest
from minigpt5.evaluation import judge as module
from minigpt5.evaluation.judge import ASPECTS, MAX_PICTURES, MAX_TEXT, Judge, JudgeError, judge, read_marks, to_messages

GOOD = json.dumps(dict.fromkeys(ASPECTS, 4) | {"helpfulness": 2})
RED = Image.new("RGB", (2000, 1000), "red")


class Server(ThreadingHTTPServer):
    """Answers with what it is given, in turn: a status and a text, or a place to go to."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, str]] = []
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.pause_s = 0.0
        """After each byte of an answer."""
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:  # noqa: N802 (http.server's name)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        status, said = self.server.answers.pop(0)
        data = json.dumps({"choices": [{"message": {"content": said}}]}).encode() if status == 200 else said.encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", said)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        for byte in data if self.server.pause_s else ():
            self.wfile.write(bytes([byte]))
            time.sleep(self.server.pause_s)
        if not self.server.pause_s:
            self.wfile.write(data)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    one = Server()
    thread = threading.Thread(target=one.serve_forever, daemon=True)
    thread.start()
    yield one
    one.shutdown()
    one.server_close()
    thread.join()


def new_judge(server: Server, **options: Any) -> Judge:
    return Judge(url=server.url, model="critic", timeout_s=10, **options)


def test_an_answer_gets_its_marks(server: Server) -> None:
    server.answers = [(200, f"```json\n{GOOD}\n```")]
    values = judge(["Draw a fox.", RED], ["Here.", RED], new_judge(server, key="secret"))
    assert values["judge"] == pytest.approx((4 * 4 + 2) / 5) and values["judge/helpfulness"] == 2
    ((path, headers, body),) = server.asked
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"]) == ("critic", 0)
    content = body["messages"][1]["content"]
    assert [part.get("text", "#") for part in content] == ["QUESTION:", "Draw a fox.", "#", "ANSWER:", "Here.", "#"]
    assert content[2]["image_url"]["url"].startswith("data:image/jpeg;base64,")


def test_no_key_is_sent_where_there_is_none(server: Server) -> None:
    server.answers = [(200, GOOD)]
    new_judge(server).marks(["a"], ["b"])
    assert "Authorization" not in server.asked[0][1]


def test_a_judge_that_stumbles_is_asked_again(server: Server) -> None:
    server.answers = [(503, "busy"), (200, "I think it is good."), (200, GOOD)]
    assert new_judge(server).marks(["a"], ["b"])["helpfulness"] == 2
    assert len(server.asked) == 3


def test_a_judge_that_fails_three_times_or_refuses_is_an_error(server: Server) -> None:
    server.answers = [(200, "no marks")] * 3
    with pytest.raises(JudgeError, match="critic at 127.0.0.1 gave no marks"):
        new_judge(server).marks(["a"], ["b"])
    server.answers, server.asked = [(401, "who are you?")], []
    with pytest.raises(JudgeError, match="401"):
        new_judge(server).marks(["a"], ["b"])
    assert len(server.asked) == 1


def test_a_reply_that_comes_byte_by_byte_ends_with_the_timeout(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRIES", 1)
    server.answers, server.pause_s = [(200, GOOD)], 0.05
    with pytest.raises(JudgeError, match="its reply was not there after 0.3 seconds"):
        dataclasses.replace(new_judge(server), timeout_s=0.3).marks(["a"], ["b"])
    server.pause_s = 0.001


def test_a_redirect_is_not_followed(server: Server) -> None:
    server.answers = [(302, f"{server.url}/elsewhere")]
    with pytest.raises(JudgeError, match="302"):
        new_judge(server, key="secret").marks(["a"], ["b"])
    assert len(server.asked) == 1


@pytest.mark.parametrize("url", ["file:///etc/passwd", "127.0.0.1:8000", "ftp://host/v1", "http://"])
def test_only_addresses_of_the_web_are_taken(url: str) -> None:
    with pytest.raises(InvalidRequest, match="http or https"):
        Judge(url=url, model="critic")


@pytest.mark.parametrize(
    "reply",
    ["", "{}", GOOD.replace("2", "6"), GOOD.replace("2", "-1"), GOOD.replace("2", "true"), GOOD.replace("2", "2.5")],
)
def test_marks_are_whole_numbers_from_0_to_5(reply: str) -> None:
    with pytest.raises(JudgeError, match="must be a whole number"):
        read_marks(reply)


def sent(question: list[Any], answer: list[Any]) -> tuple[str, str]:
    """What the judge sees of both: texts, and # for a picture."""
    (_, user) = to_messages(question, answer)
    said = [part.get("text", "#") for part in user["content"]]
    assert "" not in said
    start = said.index("ANSWER:")
    return "".join(said[1:start]), "".join(said[start + 1 :])


def test_what_is_sent_has_bounds() -> None:
    (_, user) = to_messages(["x" * MAX_TEXT, "y"], [RED] * (MAX_PICTURES + 5))
    texts = [part["text"] for part in user["content"] if part["type"] == "text"]
    assert sum(map(len, texts)) == MAX_TEXT + len("QUESTION:ANSWER:")
    assert len(user["content"]) - len(texts) == MAX_PICTURES
    assert len(user["content"][-1]["image_url"]["url"]) < 20_000, "2000 px are sent as 512"


def test_a_long_question_leaves_the_answer_its_half() -> None:
    red = RED.resize((8, 8))
    many = [red] * MAX_PICTURES
    assert sent(many, ["One.", red, "", "Two.", red]) == ("#" * (MAX_PICTURES - 2), "One.#Two.#")
    assert sent(many, many) == ("#" * (MAX_PICTURES // 2), "#" * (MAX_PICTURES // 2))
    assert sent(["a"], many) == ("a", "#" * MAX_PICTURES)
    long = "x" * MAX_TEXT
    assert [len(one) for one in sent([long], ["answer", long])] == [MAX_TEXT // 2, MAX_TEXT // 2]
    assert sent([long], ["answer"]) == ("x" * (MAX_TEXT - 6), "answer")


def test_a_key_is_never_said(server: Server) -> None:
    server.answers = [(200, GOOD)]
    judge = new_judge(server, key="secret-123\n")  # as files of secrets end
    judge.marks(["a"], ["b"])
    assert server.asked[0][1]["Authorization"] == "Bearer secret-123" and "secret" not in repr(judge)
    with pytest.raises(InvalidRequest, match="no header takes") as error:
        new_judge(server, key="secret\n123")
    assert "secret" not in str(error.value)
