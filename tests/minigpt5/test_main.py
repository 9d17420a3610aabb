"""`python -m minigpt5`: what a person reads before a story, and instead of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minigpt5.__main__ import main
from minigpt5.codec import to_json
from minigpt5.config import storybook


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder without weights."""
    monkeypatch.delenv("MINIGPT5_PROMPT", raising=False)
    values = to_json(storybook()) | {"name": "bears", "about": "Draws bears.\nNo foxes.", "examples": ["A bear's den"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


@pytest.mark.parametrize("arguments", [[], [""], [" \n"]])
def test_without_a_prompt_it_says_what_the_model_is_for(
    folder: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--model", str(folder)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "bears: Draws bears.\nNo foxes.\nTry one of these:\n  python -m minigpt5 'A bear'\"'\"'s den'\n"
        "error: prompt is empty: say what the story is about\n"
    )


def test_a_folder_that_says_nothing_of_itself_is_told_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = json.loads((folder / "config.json").read_text()) | {"about": "", "examples": []}
    (folder / "config.json").write_text(json.dumps(values))
    assert main(["--model", str(folder)]) == 2
    assert capsys.readouterr().err.startswith("bears: its folder does not say what it is for\nerror: ")


def test_a_giraffe_is_told_what_the_model_knows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a giraffe lost its way home", "--model", str(folder), "--out", str(folder / "story.html")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "Draws bears." and second.startswith("error: the weights in")


def test_a_prompt_that_is_not_utf_8_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caf\udce9", "--model", str(folder)]) == 2
    assert capsys.readouterr().err.startswith("error: prompt 'caf\\udce9' holds half of a surrogate pair or a byte")


@pytest.mark.parametrize(
    "out", ["", ".", "books", "story.docx", "books.html", "nowhere/story.html", "x" * 251 + ".html"]
)
def test_a_book_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    monkeypatch.chdir(folder)
    for name in ("books", "books.html"):
        (folder / name).mkdir()
    assert main(["A bear", "--model", str(folder), "--out", out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "must end in one of" in line or "cannot be written" in line


def test_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err
