"""`serve deploy` of another model under running stories, on a Ray cluster of real processes, and the way back."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from deployments.sse import read_events
from minigpt5.config import default_model_folder
from minigpt5.model.folder import MAPPER
from minigpt5.model.folder_config import load_config, write_config
from tests.helpers.processes import ROOT, Cluster, find_free_port

COMMAND = "serve deploy cluster/serve-storybook.yaml"
"""In docs/operations.md; run here with a copy of the file that has other folders and a free port."""
OLD = default_model_folder()
NUM_STORIES, NUM_PAGES = 4, 16
START_S, STORY_S = 240.0, 400.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not (OLD / "config.json").is_file(), reason=f"no model is shipped in {OLD}"),
]


class Deployed:
    """The application of the Serve config, on the tests' cluster."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.port = cluster, folder, find_free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def deploy(self, model: Path) -> None:
        """COMMAND, for this model. Returns when Serve has taken the config."""
        file = ROOT / COMMAND.split()[-1]
        config = yaml.safe_load(file.read_text())
        config["http_options"]["port"] = self.port
        [application] = config["applications"]
        # Engines that load a model beside others are slow, and admission would refuse long stories by that speed.
        application["args"] |= {"model": str(model), "storage": str(self.folder / "storage"), "max_wait_s": 1200}
        application["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
        copy = self.folder / file.name
        copy.write_text(yaml.safe_dump(config))
        self.run(*COMMAND.split()[:-1], str(copy))

    def run(self, *command: str) -> None:
        environment = {**self.cluster.environment, "RAY_DASHBOARD_ADDRESS": self.cluster.address}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def wait_for(self, fingerprint: str) -> None:
        """Until the server is ready, with this model alone."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                models = httpx.get(f"{self.url}/v1/models", timeout=60, trust_env=False)
                ready = httpx.get(f"{self.url}/readyz", timeout=60, trust_env=False)
                if models.is_success and ready.is_success and fingerprint in models.text:
                    return
            except httpx.TransportError:  # no proxy listens yet
                pass
            assert time.monotonic() < deadline
            time.sleep(0.5)


class Reader:
    """Streams a story as a browser does: a stream that is cut resumes after its last event."""

    def __init__(self, url: str, seed: int, first: threading.Barrier) -> None:
        self.url, self.first, self.num_cuts, self.num_refused = url, first, 0, 0
        self.body = {"prompt": f"A fox and {seed} balloons", "seed": seed, "pages": NUM_PAGES, "stream": True}
        self.texts: dict[int, str] = {}
        self.restarts: list[int] = []
        self.story: dict[str, Any] = {}
        self._story_id = self._after = ""
        self._is_waited_for = True

    def run(self) -> Reader:
        deadline = time.monotonic() + STORY_S
        with httpx.Client(base_url=self.url, timeout=60, trust_env=False) as client:
            while not self.story:
                assert time.monotonic() < deadline, f"{self._story_id} has not ended: {self._after}"
                request = client.build_request("POST", "/v1/stories", json=self.body)
                if self._story_id:
                    headers = {"Last-Event-ID": self._after}
                    request = client.build_request("GET", f"/v1/stories/{self._story_id}/events", headers=headers)
                try:
                    reply = client.send(request, stream=True)
                    if reply.status_code == 503 and not self._story_id:  # admission, by the speed of engines that start
                        self.num_refused += 1
                        reply.close()
                        assert "Retry-After" in reply.headers
                        time.sleep(2)
                        continue
                    assert reply.status_code == 200, reply.read()
                    self._read(reply)
                except httpx.TransportError:
                    assert self._story_id, "a story was dropped"
                if not self.story:
                    self.num_cuts += 1
                    time.sleep(0.3)
        return self

    def _read(self, reply: httpx.Response) -> None:
        for event in read_events(reply.iter_bytes()):
            data, self._after = json.loads(event.data), event.id
            page = data.get("page", 0)
            match event.name:
                case "story":
                    self._story_id = data["id"]
                case "text":
                    self.texts[page] = self.texts.get(page, "") + data["delta"]
                case "restart":
                    self.texts[page] = ""
                    self.restarts.append(page)
                case "page" if self._is_waited_for:
                    self._is_waited_for = False
                    self.first.wait(STORY_S)
                case "done":
                    self.story = data
                case "error":
                    raise AssertionError(data)


@pytest.fixture
def deployed(cluster: Cluster, tmp_path: Path) -> Iterator[Deployed]:
    found = Deployed(cluster, tmp_path)
    yield found
    found.run("serve", "shutdown", "-y")


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """The shipped model with another mapper: it writes the same, and draws something else."""
    folder = tmp_path / "new"
    shutil.copytree(OLD, folder)
    (folder / MAPPER).unlink()
    save_file({name: 1.1 * array for name, array in load_file(OLD / MAPPER).items()}, folder / MAPPER)
    write_config(folder, load_config(folder))
    return folder


def change_under_stories(deployed: Deployed, seed: int, model: Path) -> list[Reader]:
    """Deploy a model once each of the stories has a page. Meanwhile short stories come, and each is made, or refused
    with a time to come again."""
    first = threading.Barrier(NUM_STORIES + 1)
    readers = [Reader(deployed.url, seed + number, first) for number in range(NUM_STORIES)]
    replies: list[httpx.Response] = []
    is_over = threading.Event()

    def ask() -> None:
        body = {"prompt": "An owl", "pages": 1, "seed": seed}
        while not is_over.wait(2.0):
            replies.append(httpx.post(f"{deployed.url}/v1/stories", json=body, timeout=STORY_S, trust_env=False))

    with ThreadPoolExecutor(NUM_STORIES + 1) as pool:
        stories = [pool.submit(reader.run) for reader in readers]
        first.wait(STORY_S)
        asking = pool.submit(ask)
        deployed.deploy(model)
        deployed.wait_for(load_config(model).fingerprint)
        for story in stories:
            story.result()
        is_over.set()
        asking.result()
    refused = [reply for reply in replies if reply.status_code == 503]
    assert all("Retry-After" in reply.headers for reply in refused)
    made = [reply for reply in replies if reply not in refused]
    assert made and {reply.status_code for reply in made} == {201}
    assert all("image" in page for reply in made for page in reply.json()["pages"])
    print(f"{len(made)} short stories meanwhile", *{reply.text for reply in refused}, flush=True)
    return readers


def validate_stories(deployed: Deployed, readers: list[Reader], before: str, after: str) -> None:
    """Every story is whole, and its pages say which model made them."""
    both = 0
    for reader in readers:
        pages = reader.story["pages"]
        assert [page["index"] for page in pages] == list(range(1, NUM_PAGES + 1))
        assert {page["index"]: reader.texts[page["index"]].strip() for page in pages} == {
            page["index"]: page["text"] for page in pages
        }
        writers = [page["fingerprint"] for page in pages]
        drawers = [page["image"]["fingerprint"] for page in pages]
        assert set(writers) | set(drawers) <= {before, after}
        assert writers == sorted(writers, key=[before, after].index)
        assert writers[0] == drawers[0] == before
        both += drawers[-1] == after
        counts = Counter(zip(writers, drawers, strict=True))
        kinds = {(before, before): "old", (before, after): "old text, new picture", (after, after): "new"}
        told = ", ".join(f"{kinds.get(kind, kind)}: {number}" for kind, number in counts.items())
        print(f"{reader.story['id']}: {told}; cuts {reader.num_cuts}, restarts {reader.restarts}, ", end="")
        print(f"refused at first {reader.num_refused} times", flush=True)
    assert both, "the stories ended before the model was replaced"


def test_a_model_goes_live_under_running_stories_and_back(deployed: Deployed, new: Path) -> None:
    assert COMMAND in (ROOT / "docs" / "operations.md").read_text().splitlines()
    fingerprints = load_config(OLD).fingerprint, load_config(new).fingerprint
    deployed.deploy(OLD)
    deployed.wait_for(fingerprints[0])
    validate_stories(deployed, change_under_stories(deployed, 100, new), *fingerprints)
    validate_stories(deployed, change_under_stories(deployed, 200, OLD), *reversed(fingerprints))
