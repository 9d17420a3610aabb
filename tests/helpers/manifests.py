"""Kubernetes' manifests without Kubernetes: what `kubectl kustomize` makes of a folder, and the schemas of the objects.

`python -m tests.helpers.manifests WHEEL` writes tests/data/kubernetes/kubernetes-1.37.json.gz from a wheel of
kubernetes-validate.
"""

from __future__ import annotations

import copy
import functools
import gzip
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

Manifest = dict[str, Any]
DATA = Path(__file__).parent.parent / "data" / "kubernetes"
KUBERNETES = DATA / "kubernetes-1.37.json.gz"
OPERATORS = (DATA / "kuberay-1.7.yaml", DATA / "prometheus-operator-0.82.yaml")
DEFINITIONS = "kubernetes_validate/kubernetes-json-schema/v1.37.0-local-strict/_definitions.json"
KINDS = {
    ("v1", "PersistentVolumeClaim"): "io.k8s.api.core.v1.PersistentVolumeClaim",
    ("v1", "Pod"): "io.k8s.api.core.v1.Pod",
    ("v1", "Service"): "io.k8s.api.core.v1.Service",
    ("apps/v1", "StatefulSet"): "io.k8s.api.apps.v1.StatefulSet",
    ("monitoring.coreos.com/v1", "PodMonitor"): "monitoring.coreos.com.v1.PodMonitor",
    ("monitoring.coreos.com/v1", "PrometheusRule"): "monitoring.coreos.com.v1.PrometheusRule",
    ("networking.k8s.io/v1", "NetworkPolicy"): "io.k8s.api.networking.v1.NetworkPolicy",
    ("policy/v1", "PodDisruptionBudget"): "io.k8s.api.policy.v1.PodDisruptionBudget",
    ("ray.io/v1", "RayCluster"): "ray.io.v1.RayCluster",
    ("ray.io/v1", "RayJob"): "ray.io.v1.RayJob",
    ("ray.io/v1", "RayService"): "ray.io.v1.RayService",
}


# Kustomize


def build(folder: Path) -> list[Manifest]:
    """The objects of a kustomization: its resources, then its patches. Raises where it uses any other field."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = set(kustomization) - {"apiVersion", "kind", "resources", "patches"}
    if unknown:
        raise ValueError(f"{folder} uses {sorted(unknown)}, which this build does not know")
    manifests: list[Manifest] = []
    for name in kustomization["resources"]:
        path = folder / name
        manifests += build(path.resolve()) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for patch in kustomization.get("patches", ()):
        operations = yaml.safe_load(patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text())
        target = patch["target"]
        chosen = [each for each in manifests if _is_target(each, **target)]
        if not chosen:
            raise ValueError(f"{folder} patches {target}, which there is not")
        for manifest in chosen:
            for operation in operations:
                apply(manifest, **operation)
    return manifests


def _is_target(manifest: Manifest, *, kind: str, name: str | None = None) -> bool:
    return manifest["kind"] == kind and name in (None, manifest["metadata"]["name"])


def apply(manifest: Manifest, *, op: str, path: str, value: Any = None, **source: str) -> None:
    """One operation of a JSON patch (RFC 6902). Raises KeyError or IndexError where `path` leads nowhere."""
    parents, last = _find(manifest, path)
    if op == "copy":
        holder, key = _find(manifest, source["from"])
        value, op = holder[key], "add"
    value = copy.deepcopy(value)
    if op == "replace":
        parents[last]  # noqa: B018  # it must be there
        parents[last] = value
    elif op == "add" and isinstance(parents, list):
        parents.insert(last, value)
    elif op == "add":
        parents[last] = value
    else:
        raise ValueError(f"{op} is no operation that this build knows")


def _find(manifest: Manifest, path: str) -> tuple[Any, Any]:
    """The container that a JSON pointer leads to, and the key in it."""
    place: Any = manifest
    *keys, last = (part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:])
    for key in keys:
        place = place[int(key) if isinstance(place, list) else key]
    return place, int(last) if isinstance(place, list) else last


# Schemas


def errors_of(manifest: Manifest) -> list[str]:
    """What an API server would refuse, as far as types, names of fields and enumerations go."""
    kind = (manifest["apiVersion"], manifest["kind"])
    if kind not in KINDS:
        return [f"{kind} is no kind that this project uses"]
    return [f"{error.json_path}: {error.message}" for error in validator(KINDS[kind]).iter_errors(manifest)]


@functools.cache
def validator(name: str) -> Draft202012Validator:
    definitions = json.loads(gzip.decompress(KUBERNETES.read_bytes())) | _closed(of_operators())
    return Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": definitions})


def of_operators() -> dict[str, Any]:
    """Schemas of the objects that are not Kubernetes' own."""
    return {name: schema for path in OPERATORS for name, schema in yaml.safe_load(path.read_text()).items()}


def _closed(schema: Any) -> Any:
    """Every object with named properties refuses others."""
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    return closed | {"additionalProperties": False} if "properties" in closed else closed


def reduce(definitions: dict[str, Any]) -> dict[str, Any]:
    """The definitions that the kinds in use need, without descriptions."""
    kept: dict[str, Any] = {}
    others = of_operators()
    todo = [name for name in (*KINDS.values(), *_named(others)) if name not in others]
    while todo:
        name = todo.pop()
        if name not in kept:
            kept[name] = _bare(definitions[name])
            todo += _named(kept[name])
    return kept


def _named(schema: Any) -> Iterator[str]:
    """The definitions that a schema refers to."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            yield from [value.rsplit("/", 1)[-1]] if key == "$ref" else _named(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _named(value)


def _bare(schema: Any) -> Any:
    """Without descriptions and extensions; a property may be called `description`."""
    if isinstance(schema, list):
        return [_bare(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _bare(value)
        for key, value in schema.items()
        if not (key == "description" and isinstance(value, str)) and not key.startswith("x-")
    }


def main() -> None:
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        definitions = json.loads(wheel.read(DEFINITIONS))["$defs"]
    text = json.dumps(reduce(definitions), sort_keys=True, separators=(",", ":"))
    KUBERNETES.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
