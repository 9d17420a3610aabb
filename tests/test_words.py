"""Words that the documentation and the code do not use: see docs/contributing.md."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXCLUDED = re.compile(r"\b(anew|lest|whoever|(?:go|goes|gone)\s+on\s+with|is\s+to\s+be)\b", flags=re.I)
OWN = Path("tests") / "test_words.py"


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository; without git, those that lie outside of hidden and built folders."""
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [path for name in listed.stdout.split("\0") if name and (path := Path(name)) and (ROOT / path).is_file()]
    found = (path.relative_to(ROOT) for pattern in patterns for path in ROOT.rglob(pattern))
    return [path for path in found if not any(part.startswith(".") or part in ("build", "runs") for part in path.parts)]


def prose_of(source: str) -> Iterator[tuple[int, str]]:
    """Docstrings, strings that stand under a field, and comments, with their lines.

    Other strings are free: a model or a user reads them.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
    comments: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, words = token.start[0], token.string.lstrip("#").strip()
            if comments and comments[-1][0] + comments[-1][1].count("\n") + 1 == line:  # a sentence over two lines
                comments[-1] = (comments[-1][0], f"{comments[-1][1]}\n{words}")
            else:
                comments.append((line, words))
    yield from comments


def found_in_python(source: str) -> list[tuple[int, str]]:
    return [(line, match[0]) for line, text in prose_of(source) for match in EXCLUDED.finditer(text)]


def found_in_markdown(text: str) -> list[str]:
    return [match[0] for match in EXCLUDED.finditer(text)]


@pytest.mark.parametrize("page", tracked("*.md"), ids=str)
def test_markdown_has_no_excluded_word(page: Path) -> None:
    assert not found_in_markdown((ROOT / page).read_text())


def test_docstrings_and_comments_have_no_excluded_word() -> None:
    files = tracked("*.py")
    assert len(files) > 150
    found = {
        file.as_posix(): words
        for file in files
        if file != OWN and (words := found_in_python((ROOT / file).read_text()))
    }
    assert not found, "\n".join(f"{file}:{line}: {word}" for file, words in found.items() for line, word in words)


@pytest.mark.parametrize(
    "source",
    [
        '"""Draw it anew."""',
        "x = 1  # lest it ends",
        'x = 1\n"""Whoever reads it."""',
        'def f():\n    """Go on\n    with it."""',
        "# this is\n# to be done",
    ],
)
def test_an_excluded_word_is_seen(source: str) -> None:
    assert found_in_python(source)


def test_words_in_markdown_are_seen() -> None:
    assert found_in_markdown("The story is gone on with.") and not found_in_markdown("the wildest renewal")


def test_strings_of_a_model_are_free() -> None:
    assert not found_in_python('SENTENCE = "She went to the meadow, lest it rain anew."')
