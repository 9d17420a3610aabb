"""Why a row has an error: one row fails, and the others go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import StrEnum

from batch_jobs.monitor import DiedTooOften
from minigpt5.errors import InvalidRequest, StorageError
from minigpt5.story.stream import describe


class ErrorKind(StrEnum):
    """Why a row has an error; stored with it."""

    INPUT = "input"
    WRITING = "writing"
    GENERATOR_DEATHS = "generator deaths"
    DRAWING = "drawing"
    DECODER_DEATHS = "decoder deaths"
    DESCRIBING = "describing"
    ANSWERING = "answering"
    SYSTEM_DEATHS = "system deaths"
    EARLIER_JOB = "earlier job"
    STORAGE = "storage"
    """A store failed for longer than it is waited for. Such a row is not put into the output: the next run does it."""

    @property
    def is_of_a_picture(self) -> bool:
        """The text is whole: drawing may mend it."""
        return self in (ErrorKind.DRAWING, ErrorKind.DECODER_DEATHS)


class RowOutcome:
    """How the work on one row ended.

    Example: outcome = RowOutcome(ErrorKind.WRITING, deaths=ErrorKind.GENERATOR_DEATHS); with outcome.noted(): ...
    """

    def __init__(
        self, failed: ErrorKind, *, deaths: ErrorKind, refused: ErrorKind = ErrorKind.INPUT, says_what: bool = True
    ) -> None:
        """Kinds of what may go wrong: DiedTooOften is `deaths`, InvalidRequest `refused`, and all that is unforeseen
        `failed`, whose name its message begins with where `says_what`."""
        self._failed, self._deaths, self._refused, self._says_what = failed, deaths, refused, says_what
        self.error: str | None = None
        self.kind: ErrorKind | None = None

    @property
    def columns(self) -> dict[str, str | None]:
        """As a row has it."""
        return {"error": self.error, "kind": self.kind}

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note what is raised within, and raise it no further."""
        try:
            yield
        except Exception as failure:
            self.note(failure)

    def note(self, failure: Exception) -> None:
        if isinstance(failure, InvalidRequest):
            self.error, self.kind = str(failure), self._refused
        elif isinstance(failure, DiedTooOften):
            self.error, self.kind = str(failure), self._deaths
        elif isinstance(failure, StorageError):
            self.error, self.kind = describe(failure), ErrorKind.STORAGE
        else:
            begin = f"{self._failed} failed: " if self._says_what else ""
            self.error, self.kind = begin + describe(failure), self._failed
