"""Programs that measure in turns: each is a process of its own that waits until the bench asks it for a figure.

A question is a line of JSON on the program's standard input, and its answer a line on its standard output. This file
needs the standard library alone: programs of the peers' environment import it too.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Measurements = Mapping[str, Callable[..., Any]]
"""Name of a figure -> what measures it."""


class Program:
    """A running program, from the side of the bench."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start it and wait until it has loaded. Raises RuntimeError where it ends before."""
        self._command = list(command)
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        self._read()

    def measure(self, name: str, **options: object) -> Any:
        """Ask for one figure. Raises RuntimeError where the program ends instead."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, options]) + "\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(60)

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._command)} ended with {self._process.wait()}: see what it printed")
        return json.loads(line)


@contextlib.contextmanager
def running(command: Sequence[str]) -> Iterator[Program]:
    """A program that ends with the block."""
    program = Program(command)
    try:
        yield program
    finally:
        program.end()


@contextlib.contextmanager
def answers() -> Iterator[Callable[[object], None]]:
    """What sends an answer, for a program's side. All else that is printed meanwhile, by libraries and by processes
    that they start, goes to standard error."""
    with os.fdopen(os.dup(1), "w") as file:
        os.dup2(2, 1)

        def send(answer: object) -> None:
            file.write(json.dumps(answer) + "\n")
            file.flush()

        yield send


def answer_questions(load: Callable[[], Measurements]) -> None:
    """Load, say so, and measure what is asked for until standard input ends."""
    with answers() as send:
        measurements = load()
        send("ready")
        for line in sys.stdin:
            name, options = json.loads(line)
            send(measurements[name](**options))
