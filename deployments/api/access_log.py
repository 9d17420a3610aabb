"""Every request has an id, in its reply and in the log: one line of JSON each, without anything that was written."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.auth import CLIENT

logger = logging.getLogger("ray.serve")

HEADER = b"x-request-id"
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class AccessLog:
    """Outermost: a refusal has an id as well."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = dict(scope["headers"]).get(HEADER, b"")
        request_id = given if _ID.fullmatch(given) else f"req_{secrets.token_hex(8)}".encode()
        status, began = 0, time.monotonic()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), (HEADER, request_id)]}
            await send(message)

        try:
            await self.app(scope, receive, answer)
        finally:
            line = {
                "request": request_id.decode(),
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "seconds": round(time.monotonic() - began, 3),
                "key": scope.get(CLIENT),
            }
            logger.info(json.dumps(line))
