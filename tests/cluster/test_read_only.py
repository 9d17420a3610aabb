"""A server writes to its storage and to /tmp alone, as the pods of cluster/kubernetes let it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from minigpt5.model.base_models import main as prepare_base_models
from tests.helpers.processes import END_TIMEOUT_S, MODEL, ROOT, START_TIMEOUT_S, find_free_port

WRITABLE = Path("/tmp/ray")
"""Where Ray keeps its sessions. A fresh file system is mounted on it, for this process alone."""
CONFINE = f"""
set -e
mount --make-rprivate /
mount -o remount,ro,bind /
mount -t tmpfs tmpfs {WRITABLE}
mkdir -p {WRITABLE}/tmp {WRITABLE}/stories
mount --bind "$1" "$1"
mount -o remount,ro,bind "$1"
if touch "$1/.written" 2>/dev/null; then echo "what prepare made is writable" >&2; exit 9; fi
shift
if touch "$HOME/.written" 2>/dev/null; then echo "the root file system is writable" >&2; exit 9; fi
exec "$@"
"""


def can_confine(data: Path) -> bool:
    WRITABLE.mkdir(exist_ok=True)
    tried = ["unshare", "--mount", "bash", "-c", CONFINE, "confine", str(data), "true"]
    return shutil.which("unshare") is not None and subprocess.run(tried, capture_output=True).returncode == 0


@pytest.fixture
def confined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """A server on a read-only root, its URL and its log. Its base models are what the preparation makes, read-only, and
    its cache begins empty."""
    data = tmp_path / "data"
    data.mkdir()
    if not can_confine(data):
        pytest.skip("mount namespaces need a right that this user does not have")
    monkeypatch.setenv("XDG_CACHE_HOME", str(data / "cache"))
    monkeypatch.delenv("MINIGPT5_MODELS", raising=False)
    assert prepare_base_models(["--link", str(data / "base-models")]) == 0  # as cluster/kubernetes/prepare does
    port, log = find_free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "deployments", "--port", str(port), "--model", str(MODEL)]
    environment = os.environ | {  # as in the image; TMPDIR stands for /tmp
        "TMPDIR": f"{WRITABLE}/tmp",
        "MINIGPT5_MODELS": str(data / "base-models"),
        "XDG_CACHE_HOME": f"{WRITABLE}/tmp/cache",
        "HF_HOME": f"{WRITABLE}/tmp/huggingface",
        "HF_HUB_CACHE": str(data / "huggingface"),
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                "unshare",
                "--mount",
                "bash",
                "-c",
                CONFINE,
                "confine",
                str(data),
                *command,
                "--storage",
                f"{WRITABLE}/stories",
            ],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process, f"http://127.0.0.1:{port}", log
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(END_TIMEOUT_S)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(START_TIMEOUT_S + 200)
def test_a_story_is_made_on_a_read_only_root(confined: tuple[subprocess.Popen[bytes], str, Path]) -> None:
    process, url, log = confined
    deadline = time.monotonic() + START_TIMEOUT_S
    while "ready after" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    body = {"prompt": "A fox who finds a red balloon", "pages": 1, "seed": 7, "wait": True}
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        story = client.post("/v1/stories", json=body).raise_for_status().json()
        assert story["status"] == "done" and story["pages"][0]["image"]
        assert client.get(f"/v1/stories/{story['id']}.pdf").raise_for_status().content.startswith(b"%PDF")
