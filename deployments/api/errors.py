"""Every failure as OpenAI's error object: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.paths import route_path
from deployments.observability.story_context import current_request
from deployments.schemas import UNION_TAGS, shown
from deployments.stories.admission import Overloaded
from deployments.stories.idempotency import KeyTaken
from deployments.stories.leases import StoryBusy
from minigpt5.errors import (
    Blocked,
    EngineFull,
    EngineLost,
    FingerprintMismatch,
    InvalidRequest,
    StorageError,
    StoryNotFound,
    StoryTaken,
)

logger = logging.getLogger("ray.serve")

RESULT = "minigpt5.result"
"""Key of a scope under which a handler says how the request ended, where its status does not."""
RETRY_AFTER_S = 5
"""Where it is not known how long something takes."""
MAX_BODY_BYTES = 8 * 2**20
BODY_S = 120.0
"""A body that is not complete by then gives its place at the front to another request."""
MAX_PATH_CHARACTERS = 2000
"""The router cannot read a number of more than 4,300 digits, which a longer path may hold."""
OPENAI_PATHS = ("/v1/images/", "/v1/chat/")
"""Where OpenAI's clients expect 400 for what our own endpoints answer with 422."""


class ApiError(Exception):
    """A refusal with its status."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


class ErrorDetail(BaseModel):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's shape."""

    error: ErrorDetail


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": words}
    for status, words in {
        400: "What was sent is not JSON, or not what this endpoint takes",
        401: "A key is missing or wrong, where there are keys",
        404: "There is no such story, page, picture or path",
        405: "The path has other methods",
        408: "The body comes too slowly",
        409: "It is being worked on, or was begun with another body",
        413: "The body is too large",
        414: "The path is too long",
        422: "A field is out of range, unknown, or stopped by the text filter",
        429: "More requests than the key has",
        500: "The story failed: its text says why",
        503: "The server is full or starting, or its storage does not answer: come back after Retry-After",
    }.items()
}
"""What any route may answer with."""


def document(media_type: str, description: str, *, is_binary: bool = True) -> dict[int | str, dict[str, Any]]:
    """A route's reply that is no JSON, for the API's document."""
    kind = {"type": "string", "format": "binary"} if is_binary else {"type": "string"}
    return {200: {"content": {media_type: {"schema": kind}}, "description": description}}


PNG = document("image/png", "A picture")
EVENT = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("id", "event", "data")},
    "required": ["data"],
}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": EVENT}}, "description": "Server-sent events, JSON in `data`"}
}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    content = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(content, status, headers=dict(headers or {}))


def lost_response(error: EngineLost) -> JSONResponse:
    return error_response(503, str(error), code="engine_lost", headers={"Retry-After": str(RETRY_AFTER_S)})


def install_error_handlers(api: FastAPI) -> None:
    @api.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> JSONResponse:
        return error_response(error.status, error.message, param=error.param, code=error.code)

    @api.exception_handler(InvalidRequest)
    async def refuse_request(request: Request, error: InvalidRequest) -> JSONResponse:
        return error_response(_invalid_status(request), error.message, param=error.field, code="invalid_value")

    @api.exception_handler(Blocked)
    async def stop(request: Request, error: Blocked) -> JSONResponse:
        return error_response(_invalid_status(request), str(error), code="content_blocked")

    @api.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return error_response(400, f"body is not JSON: {first['ctx']['error']}", code="invalid_json")
        param, message, code = _read_validation_error(first)
        return error_response(_invalid_status(request), message, param=param, code=code)

    @api.exception_handler(EngineLost)
    async def ask_again(request: Request, error: EngineLost) -> JSONResponse:
        request.scope[RESULT] = "internal_error"
        return lost_response(error)

    @api.exception_handler(StorageError)
    async def wait_for_storage(request: Request, error: StorageError) -> JSONResponse:
        logger.error("%s", error.__cause__ or error)
        request.scope[RESULT] = "storage_error"
        return error_response(503, str(error), code="storage_unavailable", headers={"Retry-After": str(RETRY_AFTER_S)})

    @api.exception_handler(KeyTaken)
    async def refuse_key(request: Request, error: KeyTaken) -> JSONResponse:
        return error_response(409, str(error), param="Idempotency-Key", code="idempotency_key_taken")

    @api.exception_handler(StoryBusy)
    @api.exception_handler(StoryTaken)
    async def refuse_change(request: Request, error: StoryBusy | StoryTaken) -> JSONResponse:
        return error_response(409, str(error), code="story_busy")

    @api.exception_handler(StoryNotFound)
    async def miss(request: Request, error: StoryNotFound) -> JSONResponse:
        return error_response(404, str(error), code="not_found")

    @api.exception_handler(FingerprintMismatch)
    async def stop_mismatch(request: Request, error: FingerprintMismatch) -> JSONResponse:
        return error_response(500, str(error), code="fingerprint_mismatch")

    @api.exception_handler(EngineFull)
    @api.exception_handler(Overloaded)
    async def turn_away(request: Request, error: Overloaded | EngineFull) -> JSONResponse:
        seconds = error.retry_after_s if isinstance(error, Overloaded) else RETRY_AFTER_S
        return error_response(503, str(error), code="overloaded", headers={"Retry-After": str(seconds)})

    @api.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> JSONResponse:
        route = f"{request.method} {request.url.path[:100]}"
        unread = "body is no JSON that can be read: it is nested too deeply, or has a number of too many digits"
        messages = {
            400: unread,
            404: f"{route}: no such path, see GET /docs",
            405: f"{route}: the path has other methods",
        }
        codes = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}
        headers = dict(error.headers or {})
        if error.status_code == 405:  # several routes may share a path
            paths = api.openapi()["paths"]
            template = getattr(request.scope.get("route"), "path_format", "")
            headers["Allow"] = ", ".join(sorted(method.upper() for method in paths.get(template, {}))) or "GET"
        return error_response(
            error.status_code,
            messages.get(error.status_code, str(error.detail)),
            code=codes.get(error.status_code),
            headers=headers,
        )

    @api.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        message = "internal error: the server's log has the details"
        headers = {"X-Request-Id": current_request()}  # AccessLog, which names all others, lies within
        return error_response(500, message, code="internal_error", headers=headers)


async def describe_failure(request: Request, failure: Exception) -> dict[str, Any]:
    """The error object that `failure` has as a reply, for a stream that has begun: its status is sent already."""
    handlers = request.app.exception_handlers
    kind = next(kind for kind in type(failure).__mro__ if kind in handlers)
    if kind is Exception:
        logger.error("a stream failed", exc_info=failure)
    response = await handlers[kind](request, failure)
    return json.loads(response.body)["error"]


def _invalid_status(request: Request) -> int:
    return 400 if route_path(request.scope).startswith(OPENAI_PATHS) else 422


def _read_validation_error(error: Mapping[str, Any]) -> tuple[str | None, str, str]:
    """pydantic's account of a wrong body -> (field, message naming field, value and limit, code)."""
    param = _path(error["loc"][1:])
    if not param:
        if error["type"] == "missing":
            return None, "the request has no body; it must be a JSON object", "missing_body"
        if error["type"] == "value_error":  # of fields that do not go together
            return None, str(error["ctx"]["error"]), "invalid_value"
        return None, "body must be a JSON object, sent with 'Content-Type: application/json'", "invalid_body"
    if error["type"] == "missing":
        return param, f"{param} is missing", "missing_field"
    if error["type"] == "extra_forbidden":
        return param, f"{param} (value {shown(error['input'])}) is not a field of this endpoint", "unknown_field"
    if error["type"] == "value_error":  # raised by our own validators: they name the field themselves
        return param, str(error["ctx"]["error"]), "invalid_value"
    limit = error["msg"].replace("Input should", "must").replace("String should", "must").replace("List should", "must")
    return param, f"{param} is {shown(error['input'])} but {limit}", "invalid_value"


def _path(location: Sequence[str | int]) -> str:
    """('prompt', 'as-parts', 1, 'as-image', 'image') -> 'prompt[1].image'."""
    names = [f"[{name}]" if isinstance(name, int) else f".{name}" for name in location if name not in UNION_TAGS]
    return "".join(names).removeprefix(".")


class _TooLarge(Exception):
    """A body is over the limit."""


class BodyLimit:
    """Reads a request's body up to the limits before anything parses it: a longer one is 413, a slower one is 408, and
    a long path is 414."""

    def __init__(self, app: ASGIApp, *, max_bytes: int = MAX_BODY_BYTES, body_s: float = BODY_S) -> None:
        self.app, self.max_bytes, self.body_s = app, max_bytes, body_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if (length := len(scope["path"])) > MAX_PATH_CHARACTERS:
            message_text = f"path has {length} characters but must have at most {MAX_PATH_CHARACTERS}"
            return await error_response(414, message_text, code="path_too_long")(scope, receive, send)
        try:
            async with asyncio.timeout(self.body_s):
                body = await self._read(scope, receive)
        except TimeoutError:
            message_text = f"body was not complete after {self.body_s:g} s"
            return await error_response(408, message_text, code="body_too_slow")(scope, receive, send)
        except _TooLarge:
            message_text = f"body is over the limit of {self.max_bytes} bytes"
            return await error_response(413, message_text, code="body_too_large")(scope, receive, send)
        except ClientDisconnect:
            return None
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        return await self.app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises _TooLarge or ClientDisconnect."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and (len(declared) > 12 or int(declared) > self.max_bytes):
            raise _TooLarge
        body, is_complete = bytearray(), False
        while not is_complete:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                raise _TooLarge
            is_complete = not message.get("more_body", False)
        return bytes(body)
