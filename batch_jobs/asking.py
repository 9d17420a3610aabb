"""A system as a stage of a Ray Data pipeline: rows -> the answers to what a protocol asks of them."""

from __future__ import annotations

import io
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from batch_jobs.failpoints import FailpointHook, no_failpoint
from batch_jobs.monitor import Seat, Watch, check_deaths
from batch_jobs.row_errors import ErrorKind, RowOutcome
from batch_jobs.stages import Row
from minigpt5.errors import InvalidRequest
from minigpt5.evaluation.protocols.protocol import Settings
from minigpt5.evaluation.protocols.table import PROTOCOLS
from minigpt5.evaluation.systems.face import AnswerPart, Question, System
from minigpt5.pictures import open_picture

ROWS_PER_SYSTEM = 8
"""Rows that are in a system at once, each on a thread of its own: their questions share batches."""
QUESTIONS_AT_ONCE = 32
"""Of one row. With ROWS_PER_SYSTEM it stays below the requests that an engine takes."""
PART = pa.struct({"text": pa.string(), "png": pa.binary()})
ANSWER_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "answers": pa.list_(pa.struct({"key": pa.string(), "parts": pa.list_(PART)})),
        "timings": pa.struct({"answer_s": pa.float64()}),
        "error": pa.string(),
        "kind": pa.string(),  # of the error
        "num_pictures": pa.int32(),
        "size_bytes": pa.int64(),  # of the pictures
    }
)


class Ask:
    """Rows -> rows of ANSWER_SCHEMA."""

    def __init__(
        self,
        load_engine: Callable[[], System],
        *,
        protocol: str,
        settings: Settings,
        watch: Watch,
        get_engine_id: Callable[[], str] = lambda: secrets.token_hex(4),
        failpoint: FailpointHook = no_failpoint,
    ) -> None:
        self.protocol, self.settings, self.failpoint = PROTOCOLS[protocol], settings, failpoint
        self.seat = Seat("system", load_engine, watch, engine_id=get_engine_id())

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        for row in rows.to_pylist():
            yield pa.Table.from_pylist([self.ask(row)], schema=ANSWER_SCHEMA)

    def ask(self, row: Row) -> Row:
        """All answers of one row, or the reason why it has none."""
        answers: list[dict[str, Any]] = []
        outcome = RowOutcome(ErrorKind.ANSWERING, deaths=ErrorKind.SYSTEM_DEATHS)
        started = time.monotonic()
        with self.seat.row(row["id"]) as num_deaths, outcome.noted():
            check_deaths(num_deaths)
            if row["problem"]:
                raise InvalidRequest("row", row["problem"])
            answers = self._answers(self.protocol.ask(row, self.settings))
        pictures = [part["png"] for answer in answers for part in answer["parts"] if part["png"]]
        return {
            "id": row["id"],
            "answers": answers,
            "timings": {"answer_s": time.monotonic() - started},
            **outcome.columns,
            "num_pictures": len(pictures),
            "size_bytes": sum(map(len, pictures)),
        }

    def _answers(self, questions: Mapping[str, Question]) -> list[dict[str, Any]]:
        answers = []
        keys = list(questions)
        for start in range(0, len(keys), QUESTIONS_AT_ONCE):
            some = keys[start : start + QUESTIONS_AT_ONCE]
            for key, parts in zip(some, self.seat.engine.answer([questions[key] for key in some]), strict=True):
                answers.append({"key": key, "parts": [to_part(part) for part in parts]})
            self.failpoint("mid-row")
        return answers


def to_part(part: AnswerPart) -> dict[str, Any]:
    """A part of an answer as it is stored."""
    if isinstance(part, str):
        return {"text": part, "png": None}
    file = io.BytesIO()
    part.save(file, "PNG")
    return {"text": None, "png": file.getvalue()}


def answers_of(stored: Row) -> dict[str, tuple[AnswerPart, ...]]:
    """The inverse, of a row of ANSWER_SCHEMA."""
    return {
        answer["key"]: tuple(
            part["text"] if part["png"] is None else open_picture(part["png"]) for part in answer["parts"]
        )
        for answer in stored["answers"]
    }
