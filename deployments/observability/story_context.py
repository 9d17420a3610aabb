"""For which story and which request the code works: log lines of all deployments carry both ids.

Serve passes a request's id and its session with each call of a deployment, and its JSON log writes what a record
carries. A story's id is its session. Serve's context has no public setter, so that only this file touches it.
"""

from __future__ import annotations

import contextvars
import dataclasses
import logging
import secrets

import opentelemetry.context
from ray.serve import context as serve_context


def new_request_id() -> str:
    return f"req_{secrets.token_hex(8)}"


def current_story() -> str:
    """The story that the code works for; "" where it is none."""
    return serve_context._get_serve_request_context().session_id


def current_request() -> str:
    """The id of the HTTP request that the code works for, or that began its story; "" outside of requests."""
    return serve_context._get_serve_request_context().request_id


def enter_request(request_id: str) -> None:
    """Work for this request from now on. A session that its client has named is dropped: sessions are stories here."""
    _change(request_id=request_id, session_id="")


def enter_story(story_id: str) -> None:
    """Work for this story from now on."""
    _change(session_id=story_id)


def story_context(story_id: str) -> contextvars.Context:
    """A context for a task of a story that outlives its request: both ids, and the request's span as parent.

    Nothing else, since Serve cancels what a request's context has started when its client is gone.
    """
    request_id, span = current_request() or new_request_id(), opentelemetry.context.get_current()
    context = contextvars.Context()
    context.run(_change, request_id=request_id, session_id=story_id)
    context.run(opentelemetry.context.attach, span)
    return context


class _Ids(logging.Filter):
    """Adds the ids to each record; lets all pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        for name, value in (("story_id", current_story()), ("request_id", current_request())):
            if value:
                setattr(record, name, value)
        return True


_IDS = _Ids()


def add_ids_to_log() -> None:
    """Have this process's records of Serve's logger, which is ours too, carry the ids."""
    logging.getLogger("ray.serve").addFilter(_IDS)  # a second time does nothing


def _change(**values: str) -> None:
    current = serve_context._get_serve_request_context()
    serve_context._serve_request_context.set(dataclasses.replace(current, **values))
