"""What Serve's HTTP proxies are given at their start: headers have an end, in bytes and in seconds,
and none of them gives orders to Serve or decides what is traced.

Serve reads RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.proxy.guard in the environment of every node. The
proxies' parser otherwise keeps a header for as long as it grows, before any application hears of the request.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any, cast

import uvicorn.config
from starlette.middleware import Middleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

logger = logging.getLogger("ray.serve")

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "deployments.proxy.guard"
MAX_HEADER_BYTES = 64 * 2**10
HEADER_S = 30.0
OF_SERVE = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
"""Headers by which Serve would let a client set the timeout of its request, and keep its work going when it leaves."""
OF_TRACES = (b"traceparent", b"tracestate")
"""Headers by which a client would make its request a part of its own trace. Serve then samples as the client says, and
not by its own ratio."""
TRUST_VARIABLE = "MINIGPT5_TRUST_TRACEPARENT"
"""1 where all clients are trusted, as behind a gateway that writes `traceparent` itself."""
REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b'content-length: 144\r\n\r\n{"error": {"message": "headers are over the limit of 65536 bytes", '
    b'"type": "invalid_request_error", "param": null, "code": "headers_too_large"}}'
)


def warn_where_unguarded() -> None:
    """Say so in the log of a node whose environment does not name the guard. What names another callback is silent."""
    if not os.environ.get(CALLBACK_VARIABLE):
        logger.warning(
            "Serve's HTTP proxies have no bounds of headers: set %s=%s on every node before `ray start`",
            CALLBACK_VARIABLE,
            CALLBACK,
        )


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's own, which refuses a request whose headers do not end."""

    _num_bytes = 0
    _is_in_headers = True
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))  # uvicorn's own asks for more than asyncio says
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_in_headers and self._timer is None:
            self._expect_headers()
        self._num_bytes += len(data)
        super().data_received(data)
        if self._is_in_headers and self._num_bytes > MAX_HEADER_BYTES:
            self._refuse()

    def on_message_begin(self) -> None:
        self._is_in_headers = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_headers, self._num_bytes = False, 0
        self._stop_timer()
        ignored = OF_SERVE if os.environ.get(TRUST_VARIABLE) == "1" else OF_SERVE + OF_TRACES
        self.headers[:] = [(name, value) for name, value in self.headers if name not in ignored]
        if sum(len(name) + len(value) for name, value in self.headers) > MAX_HEADER_BYTES:
            return self._refuse()
        return super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_headers, self._num_bytes = True, 0
        if not self.transport.is_closing():
            super().on_message_complete()

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def _expect_headers(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(HEADER_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = None

    def _refuse(self) -> None:
        if not self.transport.is_closing():
            logger.warning("%s sent headers of more than %d bytes", self.client, MAX_HEADER_BYTES)
            self.transport.write(REFUSAL)
            self.transport.close()


def guard() -> list[Middleware]:
    """Called by each proxy before it listens; no middlewares are added."""
    protocols: dict[str, Any] = uvicorn.config.HTTP_PROTOCOLS
    protocols["auto"] = f"{__name__}:{BoundedProtocol.__name__}"
    return []
