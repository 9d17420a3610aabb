"""`make sbom` lists what is installed."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_the_bill_of_materials_has_every_installed_package_with_its_version() -> None:
    # -o: what is installed is taken as it is
    subprocess.run(["make", "-o", ".venv/.installed", "sbom"], cwd=ROOT, check=True, capture_output=True)
    bill = json.loads((ROOT / "build" / "sbom.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "minigpt5"
    listed = {(normal(each["name"]), each["version"]) for each in bill["components"]}
    # of the environment alone: Ray brings copies of a few packages, which it puts on the path of its processes
    environment = importlib.metadata.distributions(path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    installed = {(normal(each.name), each.version) for each in environment}
    assert {each for each in installed if each[0] != "minigpt5"} <= listed
    assert ("ray", importlib.metadata.version("ray")) in listed
    assert sum(bool(each.get("licenses")) for each in bill["components"]) > len(listed) / 2


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
