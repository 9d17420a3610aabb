"""What the files of cluster/kubernetes build: objects by kind, and the pods that they ask for."""

from __future__ import annotations

import contextlib
import functools
import io
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray._private import ray_constants

from minigpt5.model.sizes import print_tables
from tests.helpers.manifests import Manifest, build

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "cluster"
KUBERNETES = FOLDER / "kubernetes"
FILES = [path for path in sorted(FOLDER.rglob("*")) if path.is_file()]
BUILDS = {
    path.parent.relative_to(KUBERNETES).as_posix(): build(path.parent)
    for path in sorted(KUBERNETES.rglob("kustomization.yaml"))
}
SERVICES = [name for name in BUILDS if name.startswith("overlays/")]
JOBS = [name for name in BUILDS if name.startswith("jobs/") and name != "jobs/base"]
APPLIED = [*SERVICES, *JOBS, "prepare", "raycluster"]
"""What is applied after `common` and asks for pods."""
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
IMAGES = {f"minigpt5:{VERSION}-cpu", f"minigpt5:{VERSION}-gpu", "redis:7.2"}
GB, GIB = 1e9, 2**30
PORTS = {
    "gcs": ray_constants.DEFAULT_PORT,
    "dashboard": ray_constants.DEFAULT_DASHBOARD_PORT,
    "metrics": 8080,  # KubeRay starts Ray with --metrics-export-port=8080
    "serve": 8000,
    "redis": 6379,
}
GPU = "nvidia.com/gpu"
each_build = pytest.mark.parametrize("name", BUILDS)
each_applied = pytest.mark.parametrize("name", APPLIED)
each_service = pytest.mark.parametrize("name", SERVICES)


@dataclass(frozen=True, kw_only=True)
class PodTemplate:
    """A pod that a build asks for, with the labels that KubeRay adds."""

    name: str
    labels: dict[str, str]
    spec: dict[str, Any]
    ray_labels: dict[str, str]
    """Of the Ray node in it."""
    max_replicas: int = 1

    @property
    def container(self) -> dict[str, Any]:
        (container,) = self.spec["containers"]
        assert isinstance(container, dict)
        return container

    @property
    def limits(self) -> dict[str, float]:
        """CPUs, GPUs and bytes."""
        limits = self.container["resources"]["limits"]
        return {"cpu": float(limits["cpu"]), "memory": to_bytes(limits["memory"]), GPU: limits.get(GPU, 0)}


def to_bytes(quantity: str) -> float:
    assert quantity.endswith("Gi")
    return float(quantity.removesuffix("Gi")) * GIB


def of_kind(name: str, *kinds: str) -> list[Manifest]:
    return [manifest for manifest in BUILDS[name] if manifest["kind"] in kinds]


def ray_cluster(name: str) -> dict[str, Any] | None:
    fields = {"RayService": "rayClusterConfig", "RayJob": "rayClusterSpec", "RayCluster": None}
    for manifest in of_kind(name, *fields):
        field = fields[manifest["kind"]]
        cluster: dict[str, Any] = manifest["spec"][field] if field else manifest["spec"]
        return cluster
    return None


def pods(name: str) -> Iterator[PodTemplate]:
    for manifest in of_kind(name, "Pod"):
        yield PodTemplate(name="pod", labels=manifest["metadata"]["labels"], spec=manifest["spec"], ray_labels={})
    for manifest in of_kind(name, "StatefulSet"):
        template = manifest["spec"]["template"]
        yield PodTemplate(name="redis", labels=template["metadata"]["labels"], spec=template["spec"], ray_labels={})
    cluster = ray_cluster(name)
    if cluster:
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            template, labels = group["template"], group.get("labels", {})
            kind = "worker" if "groupName" in group else "head"
            yield PodTemplate(
                name=group.get("groupName", "head"),
                labels={**template["metadata"]["labels"], **labels, "ray.io/node-type": kind},
                spec=template["spec"],
                ray_labels=labels,
                max_replicas=group.get("maxReplicas", 1),
            )


def job_commands() -> dict[str, list[str]]:
    """By job, the words after `python -m` of its entry point."""
    entrypoints = {name: shlex.split(of_kind(name, "RayJob")[0]["spec"]["entrypoint"]) for name in JOBS}
    assert all(words[:2] == ["python", "-m"] for words in entrypoints.values())
    return {name: words[2:] for name, words in entrypoints.items()}


@functools.cache
def published_tables() -> str:
    """What `python -m minigpt5.published sizes` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        print_tables()
    return said.getvalue()
