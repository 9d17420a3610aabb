"""Every command of the README is one that exists, and its file tree is the tree."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from deployments.api.images import CreateImages
from deployments.schemas import CreateStory

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.S)
COMMANDS = "\n".join(body for language, body in BLOCKS if not language).replace("\\\n", " ")
INLINE = re.findall(r"`([^`\n]+)`", README)


def lines(start: str) -> list[str]:
    found = [line.strip() for line in COMMANDS.splitlines()] + [code.strip() for code in INLINE]
    return [line for line in found if line.startswith(start)]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = {line.split()[1] for line in lines("make ")}
    assert {"serve", "test", "story"} <= named <= targets


def test_python_modules_exist() -> None:
    modules = set(re.findall(r"python -m ([\w.]+)", README))
    assert {"batch_jobs.illustrate", "training.train"} <= modules
    for module in modules:
        assert importlib.util.find_spec(module), f"the README names {module}, which does not exist"


def test_training_settings_exist() -> None:
    from training.presets import STORYBOOK, override

    for line in lines(".venv/bin/python -m training.train"):
        words = shlex.split(line)
        stage = words[words.index("training.train") + 1]
        override(STORYBOOK[stage], [word for word in words if re.fullmatch(r"\w+=\S+", word)])


@pytest.mark.parametrize("line", [line for line in lines("curl ") if "-d" in line])
def test_curl_bodies_are_valid(line: str) -> None:
    words = shlex.split(line)
    body = json.loads(words[words.index("-d") + 1])
    schema = CreateStory if any("/v1/stories" in word for word in words) else CreateImages
    schema.model_validate(body)


def test_python_example_compiles() -> None:
    for language, body in BLOCKS:
        if language == "python":
            compile(body, "README.md", "exec")


def test_named_paths_exist() -> None:
    for path in re.findall(r"(?<![\w/])(?:cluster|deployments|training|models|tests|benchmarks|docs)/[\w./-]+", README):
        assert (ROOT / path.rstrip(".")).exists(), f"the README names {path}, which does not exist"


def test_the_tree_lists_every_package() -> None:
    """The folders of each package, and the modules right in `minigpt5`."""
    tree = next(body for _, body in BLOCKS if body.startswith("minigpt5/ "))
    listed: set[str] = set()
    folder = ""
    for line in tree.splitlines():
        names = re.match(r"(?: {2})?((?:[\w/]+(?:\.py)? )+) ", line)
        assert names, line
        if not line.startswith(" "):
            folder = names[1].split("/")[0]
        listed |= {f"{folder}/{name}" if line.startswith(" ") else name for name in names[1].split()}
    for name in listed:
        assert (ROOT / name).exists(), f"the README names {name}, which does not exist"
    packages = {path.parent for top in ("minigpt5", "deployments", "training") for path in (ROOT / top).glob("*/*.py")}
    modules = set((ROOT / "minigpt5").glob("*.py")) - {ROOT / "minigpt5" / "__init__.py"}
    there = {f"{path.relative_to(ROOT).as_posix()}/" for path in packages}
    there |= {path.relative_to(ROOT).as_posix() for path in modules}
    assert there <= listed, there - listed
