"""Every request has an id, in its reply and in the log: one line each, without anything that was written."""

from __future__ import annotations

import logging
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.errors import RESULT
from deployments.api.paths import enter_application, route_path
from deployments.auth import CLIENT
from deployments.observability.metrics import HTTP_REQUESTS
from deployments.observability.recording import begin_at_zero, record
from deployments.observability.story_context import enter_request, new_request_id
from minigpt5.errors import StorageError

logger = logging.getLogger("ray.serve")

HEADER = b"x-request-id"
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
RESULTS = {
    401: "unauthorized",
    404: "not_found",
    409: "conflict",
    413: "too_large",
    414: "too_large",
    429: "rate_limited",
    503: "overloaded",
}
"""Status -> what the metric calls it, where this is not what it calls all of 2xx, 4xx or 5xx."""


class AccessLog:
    """Outermost: a refusal has an id as well."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        begin_at_zero([HTTP_REQUESTS])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        enter_application(scope)
        given = dict(scope["headers"]).get(HEADER, b"")
        request_id = given if _ID.fullmatch(given) else new_request_id().encode()
        enter_request(request_id.decode())
        status, began = 0, time.monotonic()
        result = "abandoned"  # by a client that leaves before its answer begins

        async def answer(message: Message) -> None:
            nonlocal status, result
            if message["type"] == "http.response.start":
                status = message["status"]
                result = scope.get(RESULT) or _result_of(status)
                message = {**message, "headers": [*message.get("headers", []), (HEADER, request_id)]}
            await send(message)

        try:
            await self.app(scope, receive, answer)
        except Exception as failure:  # the reply of a failure is made around this one
            result = "storage_error" if isinstance(failure, OSError | StorageError) else "internal_error"
            raise
        finally:
            if route_path(scope).startswith("/v1/"):
                record(HTTP_REQUESTS, 1, result=result)
            fields = {
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "result": result,
                "seconds": round(time.monotonic() - began, 3),
                "key": scope.get(CLIENT),
            }
            logger.info("%(method)s %(path)s %(status)s", fields, extra=fields)


def _result_of(status: int) -> str:
    if status < 400:
        return "answered"
    return RESULTS.get(status, "invalid" if status < 500 else "internal_error")
