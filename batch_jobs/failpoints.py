"""Failpoints: named places where a test can kill the process.

Set MINIGPT5_FAILPOINT=NAME:MARKER in the driver's environment; stages receive the failpoint with their arguments. The
first process that reaches NAME creates the file MARKER and kills itself with SIGKILL. Later ones see MARKER and
continue, so it must lie where all processes see it. Without the variable failpoints do nothing. `benchmarks/kills.py`
sets it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

VARIABLE = "MINIGPT5_FAILPOINT"
POINTS = (
    "before-text",  # a generator has taken a story, nothing is written
    "mid-text",  # a generator is inside a page that is not the story's first
    "text-written",  # a page's text and vokens are stored, its row is not sent
    "mid-picture",  # a decoder has done a denoising step
    "picture-written",  # a PNG is stored, its row is not sent
    "part-hidden",  # a data file is written, not yet in place
    "part-written",  # a data file is in place, its stories' state is not yet cleared
    "recovering",  # a run has found the state of an earlier one
)
ASKING_POINTS = ("mid-row",)
"""Of `batch_jobs.evaluate` alone: a system has answered some questions of a row, and none is stored."""
FailpointHook = Callable[[str], None]


def no_failpoint(point: str) -> None:
    """Pass a failpoint of a job that no test kills."""


def from_environment() -> FailpointHook:
    """Read the function that a job calls at each failpoint. Raises ValueError where the variable names none."""
    value = os.environ.get(VARIABLE)
    if not value:
        return no_failpoint
    name, _, marker = value.partition(":")
    known = (*POINTS, *ASKING_POINTS)
    if name not in known or not marker:
        raise ValueError(f"{VARIABLE} is {value!r} but must be NAME:MARKER with NAME one of {', '.join(known)}")
    return Failpoint(name, Path(marker))


class Failpoint:
    """Kills this process at the first time that any process reaches the point."""

    def __init__(self, name: str, marker: Path) -> None:
        self.name, self.marker = name, marker

    def __call__(self, point: str) -> None:
        if point != self.name:
            return
        try:
            self.marker.touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
