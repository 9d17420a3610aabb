"""The package as others get it: versions, commands, the wheel, and the files beside them."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import minigpt5

ROOT = Path(__file__).parent.parent
PACKAGES = ("minigpt5", "deployments", "training", "batch_jobs")
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT: dict[str, Any] = PYPROJECT["project"]
EXTRAS_OF_CI = ("serve", "train", "batch", "evaluation", "dev")
"""CI has no browser."""
OF_A_CUDA_BUILD = ("nvidia-", "cuda-", "triton")
"""What torch wants besides where its build is one for GPUs."""
COMMANDS: dict[str, str] = PROJECT["scripts"]


def read_constraints(text: str) -> dict[str, Version]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pins = [line.split("==") for line in lines]
    return {canonicalize_name(name): Version(version) for name, version in pins}


CONSTRAINTS = read_constraints((ROOT / "constraints.txt").read_text())


def named_requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS_OF_CI for line in extras[extra])]
    return [Requirement(line) for line in lines]


def outside(requirement: Requirement, constraints: dict[str, Version]) -> bool:
    version = constraints.get(canonicalize_name(requirement.name))
    return version is None or version not in requirement.specifier


@pytest.mark.parametrize("requirement", named_requirements(), ids=str)
def test_version_of_ci_lies_within_the_range(requirement: Requirement) -> None:
    assert not outside(requirement, CONSTRAINTS)


def test_a_version_outside_its_range_is_seen() -> None:
    assert outside(Requirement("ray[serve]>=3"), {"ray": Version("2.60.0")})
    assert outside(Requirement("ray[serve]>=2"), {})
    assert not outside(Requirement("ray[serve]>=2"), {"ray": Version("2.60.0")})


def test_every_range_has_both_ends() -> None:
    """Else an installation in some years gets what nobody has tried."""
    for requirement in named_requirements():
        operators = {one.operator for one in requirement.specifier}
        has_end = operators >= {">=", "<"} or operators == {"=="} or requirement.name in ("packaging", "setuptools")
        assert has_end, requirement


def test_constraints_name_no_host_and_no_build() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line), line
    assert not [name for name in CONSTRAINTS if name.startswith(OF_A_CUDA_BUILD)]


def closure(requirements: list[Requirement]) -> Iterator[str]:
    """Canonical names of all installed distributions that the requirements need, at any depth."""
    seen: set[tuple[str, str]] = set()
    waiting = [(one, extra) for one in requirements for extra in ("", *one.extras)]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in seen or name.startswith(OF_A_CUDA_BUILD):
            continue
        seen.add((name, extra))
        for line in importlib.metadata.requires(name) or ():
            inner = Requirement(line)
            if inner.marker is None or inner.marker.evaluate({"extra": extra}):
                waiting += [(inner, one) for one in ("", *inner.extras)]
        yield name


def test_constraints_cover_all_that_is_installed_for_ci() -> None:
    needed = set(closure(named_requirements()))
    assert {"torch", "ray", "starlette", "h11"} <= needed
    assert needed <= CONSTRAINTS.keys(), sorted(needed - CONSTRAINTS.keys())


def test_version_is_the_same_everywhere() -> None:
    versions = re.findall(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert versions[0] == PROJECT["version"] == minigpt5.__version__ == citation["version"]
    assert versions == sorted(versions, key=Version, reverse=True)


def test_citation_has_what_the_format_requires() -> None:
    """And the paper, with its three authors."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "type", "license"} <= citation.keys()
    paper = citation["references"][0]
    assert [author["family-names"] for author in paper["authors"]] == ["Zheng", "He", "Wang"]
    assert {"type": "other", "value": "arXiv:2310.02239"}.items() <= paper["identifiers"][0].items()


def test_hooks_before_a_commit_run_installed_tools() -> None:
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["id"]: hook for repository in repositories for hook in repository["hooks"]}
    own = {
        hook["id"]: hook for repository in repositories if repository["repo"] == "local" for hook in repository["hooks"]
    }
    assert own.keys() >= {"ruff", "ruff-format", "mypy"}
    for hook in own.values():
        assert hook["language"] == "system"
        words = hook["entry"].split()
        assert words[:2] == [".venv/bin/python", "-m"] and importlib.util.find_spec(words[2])
    assert hooks["check-added-large-files"]["args"] == ["--maxkb=500"]
    assert "detect-private-key" in hooks


@pytest.mark.parametrize("target", COMMANDS.values(), ids=COMMANDS)
def test_command_has_a_function(target: str) -> None:
    """Read, not imported: some import torch."""
    module, _, function = target.partition(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


RUN = """
import importlib, sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if any(f"{name}.".startswith(f"{one}.") for one in refused):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

refused, target, sys.argv[1:] = sys.argv[1].split(","), sys.argv[2], sys.argv[3:]
sys.meta_path.insert(0, Refusing())
module, _, function = target.partition(":")
sys.exit(getattr(importlib.import_module(module), function)())
"""


def run_command(name: str, *arguments: str, without: str = "-", **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of the package in a process that cannot import the modules of `without`."""
    command = [sys.executable, "-c", RUN, without, COMMANDS[name], *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize(
    ("command", "module", "message"),
    [
        ("minigpt5-serve", "ray", "minigpt5-serve needs Ray Serve: pip install 'minigpt5[serve]'"),
        ("minigpt5-serve", "fastapi", "minigpt5-serve needs fastapi: pip install 'minigpt5[serve]'"),
        ("minigpt5-serve", "uvicorn", "minigpt5-serve needs uvicorn: pip install 'minigpt5[serve]'"),
        ("minigpt5-client", "httpx", "minigpt5-client needs httpx: pip install 'minigpt5[serve]'"),
        ("minigpt5-train", "ray", "minigpt5-train needs Ray Train: pip install 'minigpt5[train]'"),
        ("minigpt5-train", "deepspeed", "minigpt5-train needs deepspeed: pip install 'minigpt5[train]'"),
        ("minigpt5-illustrate", "ray", "minigpt5-illustrate needs Ray Data: pip install 'minigpt5[batch]'"),
    ],
)
def test_missing_extra_is_named_in_one_line(command: str, module: str, message: str) -> None:
    done = run_command(command, without=module)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{message}\n")


def test_module_of_no_extra_is_a_traceback() -> None:
    """It is a fault of ours, and its place matters."""
    done = run_command("minigpt5-client", without="deployments.client")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_story_needs_no_extra() -> None:
    done = run_command("minigpt5", "--help", without="ray,fastapi,pydantic,httpx,deepspeed,torch")
    assert done.returncode == 0 and done.stdout.startswith("usage: ")


@pytest.mark.parametrize(("command", "arguments"), [("minigpt5", ("A fox",)), ("minigpt5-serve", ("--port", "18431"))])
def test_missing_model_is_said_in_one_line(command: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run_command(command, *arguments, MINIGPT5_MODEL=str(tmp_path / "none"))
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: there is no model in \S+/none: clone the repository.* --model FOLDER.*\n", done.stderr)


def test_default_model_is_that_of_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from minigpt5.config import default_model_folder

    monkeypatch.delenv("MINIGPT5_MODEL", raising=False)
    assert default_model_folder() == ROOT / "models" / "storybook"
    monkeypatch.setenv("MINIGPT5_MODEL", str(tmp_path))
    assert default_model_folder() == tmp_path


@pytest.mark.parametrize(
    ("origin", "is_found"),
    [
        ({"url": "file:///home/a%20b/minigpt5", "dir_info": {"editable": True}}, True),
        ({"url": "file:///home/a%20b/minigpt5", "dir_info": {}}, False),
        ({"url": "https://example.org/minigpt5.whl", "archive_info": {}}, False),
        (None, False),
    ],
    ids=["editable", "from a folder", "from a wheel", "from an index"],
)
def test_default_model_of_a_copy_without_models_is_that_of_the_installed_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, origin: object, is_found: bool
) -> None:
    from minigpt5 import config

    class Installed:
        def read_text(self, name: str) -> str | None:
            return json.dumps(origin) if origin and name == "direct_url.json" else None

    monkeypatch.delenv("MINIGPT5_MODEL", raising=False)
    monkeypatch.setattr(config, "__file__", str(tmp_path / "minigpt5" / "config.py"))
    monkeypatch.setattr(config.metadata, "distribution", lambda name: Installed())
    checkout = Path("/home/a b/minigpt5") if is_found else tmp_path
    assert config.default_model_folder() == checkout / "models" / "storybook"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that nothing is left in the repository."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests", "benchmarks", "models"):
        (source / name).mkdir()
        (source / name / "__init__.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_has_every_module_and_data_file(wheel: zipfile.ZipFile) -> None:
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {*(f"{package}/py.typed" for package in PACKAGES), "deployments/studio/index.html"} <= sources
    assert "minigpt5/storybook/sprites.png" in sources
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == sources


def test_wheel_describes_itself(wheel: zipfile.ZipFile) -> None:
    info = f"minigpt5-{PROJECT['version']}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata and "Provides-Extra: serve" in metadata
    assert {f"{info}/licenses/{name}" for name in ("LICENSE", "NOTICE")} <= set(wheel.namelist())
    entry_points = wheel.read(f"{info}/entry_points.txt").decode()
    assert all(f"{name} = {target}" in entry_points for name, target in COMMANDS.items())
