"""Texts with marks where pictures stand."""

from __future__ import annotations

from minigpt5.evaluation.systems.marks import END_MARK, MARK, describe, read_described, read_marked


def test_descriptions_are_read_back() -> None:
    text = f" It was dark.{describe('a fox, at night')} It slept.{describe('a fox')}"
    assert read_described(text) == [("It was dark.", "a fox, at night"), ("It slept.", "a fox")]


def test_a_text_after_the_last_picture_has_none() -> None:
    assert read_described(f"One.{describe('a fox')} Two.") == [("One.", "a fox"), ("Two.", None)]
    assert read_described("No picture") == [("No picture", None)]
    assert read_described("") == [("", None)]


def test_a_description_may_lack_its_end() -> None:
    """Where the text was cut off."""
    assert read_described(f"One.{MARK}a fo") == [("One.", "a fo")]
    assert END_MARK not in read_described(f"One.{MARK}a fox{END_MARK}{MARK}an ow")[1][1]  # type: ignore[operator]


def test_marks_alone() -> None:
    assert read_marked(f" One.{MARK} Two.{MARK}") == [("One.", True), ("Two.", True)]
    assert read_marked(f" One.{MARK} Two.") == [("One.", True), ("Two.", False)]
    assert read_marked("") == [("", False)]
