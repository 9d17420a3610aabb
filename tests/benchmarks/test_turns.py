"""Programs that measure in turns."""

from __future__ import annotations

import sys

import pytest

from benchmarks.turns import running

PROGRAM = """
from benchmarks.turns import answer_questions

def load():
    print("a library says something")
    return {"double": lambda value: [print("and again"), 2 * value][1], "fail": lambda: 1 / 0}

answer_questions(load)
"""


def test_a_program_answers_and_what_libraries_print_is_no_answer(capfd: pytest.CaptureFixture[str]) -> None:
    with running([sys.executable, "-c", PROGRAM]) as program:
        assert program.measure("double", value=4) == 8
        assert program.measure("double", value=5) == 10
    out, err = capfd.readouterr()
    assert out == "" and "a library says something" in err and "and again" in err


def test_a_program_that_ends_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ended with 1"), running([sys.executable, "-c", PROGRAM]) as program:
        program.measure("fail")
    with pytest.raises(RuntimeError, match="ended with 3"), running([sys.executable, "-c", "raise SystemExit(3)"]):
        pass
