"""What no client of good faith sends, against a real server: refused, and without taking its memory."""

from __future__ import annotations

import base64
import http.client
import io
import socket
import time
import zipfile

import psutil
import pytest
from PIL import Image

from tests.helpers.fakes import make_png
from tests.helpers.processes import MODEL, Server
from tests.helpers.served import data_url

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason=f"no model is shipped in {MODEL}"),
]

MIB = 2**20
MAX_GROWTH = 200 * MIB
"""Largest growth of any process of the server, over all requests here."""


def memory(server: Server) -> dict[tuple[int, str], int]:
    """Measure the memory of the proxy, the front and the engines, in bytes."""
    found = {}
    for process in psutil.Process(server.process.pid).children(recursive=True):
        title = process.cmdline()[0] if process.cmdline() else ""
        if "ServeReplica" in title or "ProxyActor" in title:
            found[process.pid, title.split(".")[0]] = process.memory_info().rss
    return found


def send(server: Server, *pieces: bytes, answer_s: float = 20) -> bytes:
    """Bytes as they are; the beginning of the answer, or what came instead."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=answer_s) as line:
        try:
            for piece in pieces:
                line.sendall(piece)
        except OSError as failure:  # it has hung up: what it said before is still to be read
            last = repr(failure).encode()
        else:
            last = b""
        try:
            return line.recv(4096) or last
        except OSError as failure:
            return last or repr(failure).encode()


def post(server: Server, body: bytes) -> tuple[int, bytes]:
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    line.request("POST", "/v1/stories", body, {"Content-Type": "application/json"})
    reply = line.getresponse()
    status, text = reply.status, reply.read()
    line.close()
    return status, text


def test_hostile_input_is_refused_and_memory_is_bounded(server: Server) -> None:
    server.client.post("/v1/images/generations", json={"prompt": "A fox"}).raise_for_status()  # all is loaded
    before = memory(server)
    assert len(before) == 4
    head = b"POST /v1/stories HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

    # A gigabyte, in chunks without an announced length, and an announced one.
    chunk = b"%x\r\n" % 65536 + b"a" * 65536 + b"\r\n"
    answer = send(server, head + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 16384, b"0\r\n\r\n")
    assert b" 413 " in answer.split(b"\r\n")[0]
    assert b" 413 " in send(server, head + b"Content-Length: 1099511627776\r\n\r\n", b"a" * MIB).split(b"\r\n")[0]

    # Headers without end: one, many, and slowly.
    get = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
    for flood in (b"X: " + b"a" * 32 * MIB, b"".join(b"X-%d: a\r\n" % i for i in range(100_000)) + b"\r\n"):
        answer = send(server, get + flood)
        assert b" 431 " in answer.split(b"\r\n")[0] or b"reset" in answer or b"Broken" in answer, answer
    assert b" 200 " not in send(server, b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")

    # JSON that is deep, wide, or long.
    for body, status in (
        (b'{"prompt":' + b"[" * 3_000_000 + b"]" * 3_000_000 + b"}", 400),
        (b'{"a":' * 1_000_000 + b"1" + b"}" * 1_000_000, 400),
        (b'{"prompt": "a", "seed": ' + b"9" * 5_000_000 + b"}", 400),
        (b"{" + b",".join(b'"k%d":1' % i for i in range(400_000)) + b"}", 422),
        (b'{"prompt": "' + b"a" * 7 * MIB + b'"}', 422),
        (b"\xff\xfe\x00", 400),
    ):
        assert post(server, body)[0] == status, body[:40]

    # Pictures that are bombs, or something else as well.
    large = io.BytesIO()
    Image.new("1", (60_000, 60_000)).save(large, "PNG")
    at_the_limit = io.BytesIO()
    Image.new("RGB", (8192, 4096)).save(at_the_limit, "PNG")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x.html", "<script>alert(1)</script>")
    page = b"<script>alert(1)</script>"
    for picture, status in (
        (large.getvalue(), 422),
        *[(at_the_limit.getvalue(), 201)] * 3,
        (b"GIF89a" + page, 422),
        (page, 422),
        (make_png() + archive.getvalue(), 201),  # a picture all the same: the server shows only its own drawing of it
    ):
        body = {"prompt": [{"type": "image", "image": data_url(picture)}], "pages": 1, "steps": 1}
        reply = server.client.post("/v1/stories", json=body)
        assert reply.status_code == status, reply.text
        if status == 201:
            drawn = server.client.get(reply.json()["pages"][0]["image"]["url"])
            assert b"script" not in drawn.content and drawn.headers["content-type"] == "image/png"
    vokens = base64.b64encode(b"\xff" * 8 + b"{}" * 1000).decode()
    assert server.client.post("/v1/pictures", json={"vokens": vokens}).status_code == 422

    # Ids that are paths.
    for path in ("..%2f..%2fetc/pages/1.png", "%00/pages/1.png", "....//events", "%2e%2e%2frunning", "x" * 5000):
        reply = send(server, b"GET /v1/stories/" + path.encode() + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 404 " in reply or b" 414 " in reply, path
    assert sorted(path.name for path in (server.log.parent / "storage").iterdir()) == ["running", "stories"]

    time.sleep(0.5)
    after = memory(server)
    assert set(after) == set(before)  # nothing was restarted
    growth = {name: (after[pid, name] - size) // MIB for (pid, name), size in before.items()}
    assert max(growth.values()) * MIB < MAX_GROWTH, growth
    print(f"memory grew by (MiB) {growth}")
    assert server.client.post("/v1/stories", json={"prompt": "A fox", "pages": 1, "steps": 2}).status_code == 201
