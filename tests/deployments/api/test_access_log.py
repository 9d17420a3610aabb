"""Requests are told apart in the log, which says nothing of what was written."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from deployments.observability.story_context import add_ids_to_log
from tests.helpers.served import Served


def test_a_request_has_an_id_in_its_reply_and_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    served = Served(tmp_path)
    add_ids_to_log()
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        reply = served.post({"prompt": "A secret fox", "pages": 1})
        missing = served.request("GET", "/v1/stories/story_none", headers={"X-Request-Id": "mine-1"})
        forged = served.request("GET", "/healthz", headers={"X-Request-Id": b'a" "b\x07'})
    lines = [vars(record) for record in caplog.records if record.module == "access_log"]
    assert [line["request_id"] for line in lines] == [
        reply.headers["x-request-id"],
        "mine-1",
        forged.headers["x-request-id"],
    ]
    assert missing.headers["x-request-id"] == "mine-1" and forged.headers["x-request-id"].startswith("req_")
    assert [(line["method"], line["path"], line["status"]) for line in lines][:2] == [
        ("POST", "/v1/stories", 201),
        ("GET", "/v1/stories/story_none", 404),
    ]
    assert "secret" not in caplog.text
