"""The image of cluster/Dockerfile, as far as it can be checked without building it."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from deployments.proxy import CALLBACK, CALLBACK_VARIABLE

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
PREPARATION = ROOT / "cluster" / "kubernetes" / "prepare" / "pod.yaml"
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in re.sub(r"\\\n", " ", DOCKERFILE.read_text()).splitlines()
    if line and not line.startswith("#")
]
IMPORTS = """
import deployments.application, training.train, batch_jobs.illustrate, benchmarks.quality, minigpt5.base_models
import ray, torch
print(ray.__version__, torch.__version__.partition("+")[0])
"""
"""What the deployments, the jobs and the preparation import."""
READ = """
import sys
from pathlib import Path
import deployments.application, training.train, batch_jobs.illustrate, benchmarks.quality, minigpt5.base_models
from minigpt5.storybook.scorer import load_scorer
load_scorer()
here = Path.cwd()
assert Path(sys.modules["minigpt5"].__file__).is_relative_to(here)
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] in ("deployments", "training", "batch_jobs", "benchmarks", "minigpt5"):
        for key, value in vars(module).items():
            if isinstance(value, Path) and value.is_relative_to(here) and not value.exists():
                print(name, key, value)
"""
"""Prints the paths of the project that are not there."""


def rest_of(name: str) -> list[str]:
    return [rest for instruction, rest in INSTRUCTIONS if instruction == name]


(WORKDIR,) = rest_of("WORKDIR")
ENVIRONMENT = dict(word.split("=", 1) for words in rest_of("ENV") for word in shlex.split(words))
ARGUMENTS = dict(argument.split("=", 1) for argument in rest_of("ARG"))


def copied() -> list[str]:
    """Files and folders of the project in the image."""
    return [name for words in rest_of("COPY") for name in words.split()[1:-1]]


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.M)
    assert found
    return found[1]


def test_the_base_is_rays_own_image_of_the_version_in_constraints() -> None:
    (base,) = rest_of("FROM")
    assert base == "rayproject/ray:${RAY_VERSION}-${PYTHON}-${DEVICE}"
    assert ARGUMENTS["RAY_VERSION"] == pinned("ray")
    python = re.fullmatch(r"py(3)(\d+)", ARGUMENTS["PYTHON"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert python and f"{python[1]}.{python[2]}" in SpecifierSet(project["requires-python"])
    assert ARGUMENTS["DEVICE"] == "cpu"
    devices = set(re.findall(r"--build-arg DEVICE=(\w+)", DOCKERFILE.read_text()))
    assert devices == {"cpu", "gpu"}  # the suffixes of Ray's tags
    tags = set(re.findall(r"-t (\S+)", DOCKERFILE.read_text()))
    assert tags == {f"minigpt5:{project['version']}-{device}" for device in devices}


def test_what_is_copied_exists_and_is_sent_to_the_builder() -> None:
    rules = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    sent = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert "*" in rules and sent == set(copied())
    assert all((ROOT / name).exists() for name in copied())
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {pattern.rstrip("*") for pattern in packages} <= set(copied())


def test_no_weights_are_inside() -> None:
    assert [name for name in copied() if name.startswith("models")] == ["models/scorer"]
    assert not [command for command in rest_of("RUN") if "requirements-weights" in command or "base_models" in command]
    tracked = subprocess.run(["git", "ls-files", *copied()], cwd=ROOT, capture_output=True, text=True, check=True)
    large = [name for name in tracked.stdout.splitlines() if (ROOT / name).stat().st_size > 2**20]
    assert [name for name in large if fnmatch.fnmatch(name, "*.safetensors")] == ["models/scorer/scorer.safetensors"]


def test_what_the_jobs_read_beside_their_code_is_inside(tmp_path: Path) -> None:
    """The copied files alone: the scorer loads, and every path in a constant of an imported module exists."""
    for name in copied():
        subprocess.run(["cp", "-r", "--parents", name, str(tmp_path)], cwd=ROOT, check=True)
    done = subprocess.run([sys.executable, "-c", READ], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stdout


def test_the_proxies_of_every_node_end_headers_that_do_not_end() -> None:
    assert ENVIRONMENT[CALLBACK_VARIABLE] == CALLBACK


def test_it_runs_as_a_user_without_rights() -> None:
    assert INSTRUCTIONS[-1] == ["USER", "1000"] and "root" not in " ".join(rest_of("RUN"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_its_commands_install_in_a_fresh_environment(tmp_path: Path) -> None:
    """COPY and RUN in their order, with a folder in the place of WORKDIR and an environment in that of the base. Then
    the preparation of the claim, with a folder in the place of /data."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    folder, data = tmp_path / "minigpt5", tmp_path / "data"
    folder.mkdir()
    variables = {"PATH": f"{tmp_path / 'env' / 'bin'}:/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path)}

    def moved(text: str) -> str:
        return text.replace(WORKDIR, str(folder)).replace("/data/", f"{data}/")

    def run(command: str, environment: dict[str, str]) -> str:
        done = subprocess.run(
            ["bash", "-ec", command], cwd=folder, env=variables | environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    for instruction, rest in INSTRUCTIONS:
        if instruction == "COPY":
            owner, *names, target = rest.split()
            assert owner == "--chown=1000:100" and (target == "./" or names == [target])
            subprocess.run(["cp", "-r", "--parents", *names, str(folder)], cwd=ROOT, check=True)
        elif instruction == "RUN":
            run(moved(rest), {})
    environment = {name: moved(value) for name, value in ENVIRONMENT.items()}
    (container,) = yaml.safe_load(PREPARATION.read_text())["spec"]["containers"]
    (script,) = container["args"]
    assert "sleep infinity" in script
    changed = {each["name"]: moved(each["value"]) for each in container["env"]}
    data.mkdir()
    run(moved(script.replace("sleep infinity", "")), environment | changed)
    assert (data / ".prepared").is_file()
    assert run(f"python -c '{IMPORTS}'", environment).split() == [pinned("ray"), pinned("torch")]
