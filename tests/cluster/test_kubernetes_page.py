"""The commands of docs/kubernetes.md beside the files."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

from tests.helpers.cluster_files import APPLIED, BUILDS, FOLDER, IMAGES, JOBS, SERVICES
from tests.test_docs import TEXTS, blocks


def test_the_pages_command_writes_a_registry_into_every_image(tmp_path: Path) -> None:
    (command,) = re.findall("^sed .*$", TEXTS["docs/kubernetes.md"], flags=re.M)
    shutil.copytree(FOLDER, tmp_path / "cluster")
    subprocess.run(["bash", "-ec", f"REGISTRY=registry.internal/team; {command}"], cwd=tmp_path, check=True)

    def images(folder: Path) -> list[str]:
        text = "".join(
            path.read_text() for path in [*sorted(folder.glob("kubernetes/**/*.yaml")), folder / "ray-up.yaml"]
        )
        return re.findall(r"[\w./]*minigpt5:[\w.-]+", text)

    assert images(FOLDER) and set(images(FOLDER)) == IMAGES - {"redis:7.2"}
    assert images(tmp_path / "cluster") == [f"registry.internal/team/{image}" for image in images(FOLDER)]


def secrets_of(name: str) -> set[str]:
    """Secrets that the build's objects name."""
    pattern = r"'secretName': '([\w-]+)'|'secretKeyRef': {[^}]*'name': '([\w-]+)'|'secretRef': {[^}]*'name': '([\w-]+)'"
    return {secret for found in re.findall(pattern, str(BUILDS[name])) for secret in found if secret}


def test_the_commands_of_the_page_fit_the_files() -> None:
    lines = "\n".join(blocks("docs/kubernetes.md", "", "sh", "bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line.split(" #")[0]) for line in lines if line.startswith(("kubectl ", "docker "))]
    applied = {line[line.index("-k") + 1] for line in words if "-k" in line}
    assert {Path(path).relative_to("cluster/kubernetes").as_posix() for path in applied} <= {
        "common",
        "egress",
        *APPLIED,
    }
    created = {line[4] for line in words if line[:4] == ["kubectl", "create", "secret", "generic"]}
    needed = set().union(*(secrets_of(name) for name in APPLIED))
    assert created == needed == {"minigpt5-keys", "minigpt5-ray-token", "minigpt5-redis", "minigpt5-s3"}
    text = TEXTS["docs/kubernetes.md"]
    for key in ("keys.json", "auth_token", "password"):
        assert f"{key}=" in text or f"--from-file={key}" in text or f"/{key}" in text
    built = [line for line in words if line[:2] == ["docker", "build"]]
    tagged = [line[2:] for line in words if line[:2] == ["docker", "tag"]]
    pushed = {line[2] for line in words if line[:2] == ["docker", "push"]}
    assert {image for image, _ in tagged} == IMAGES - {"redis:7.2"}
    assert all(name == f"$REGISTRY/{image}" for image, name in tagged) and pushed == {name for _, name in tagged}
    assert built and all(line[line.index("-f") + 1] == "cluster/Dockerfile" for line in built)
    assert {line[line.index("-t") + 1] for line in built} == IMAGES - {"redis:7.2"}
    for folder in [*SERVICES, *JOBS]:
        assert f"cluster/kubernetes/{folder}" in text or folder.removeprefix("overlays/").removeprefix("jobs/") in text
