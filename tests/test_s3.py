"""Stories, jobs, training and models over s3://, on an S3 server of its own, healthy and failing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from pyarrow import fs, parquet

from batch_jobs.prepare import Part, write_part
from deployments.__main__ import StartError, check_storage
from minigpt5 import MiniGPT5
from minigpt5.errors import StorageError, StoryNotFound
from minigpt5.model.folder_config import check_folder
from minigpt5.model.locate import locate
from minigpt5.storage import READ_BYTES, open_place, read_whole, write_whole
from minigpt5.story.store import StoryStore
from minigpt5.types import DrawSettings, Picture
from tests.helpers.processes import MODEL, ROOT, find_free_port, start_server, wait_until_ready
from tests.helpers.s3 import FAULTS, Faults, failing_s3, running_s3, variables
from training.checkpoint import newest_step
from training.run_folder import RunFolder
from training.train import main as train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_s3(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture
def s3(url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in variables(url).items():
        monkeypatch.setenv(name, value)
    return url


def picture(page: int) -> Picture:
    png = b"\x89PNG" + bytes(range(256)) * 40
    return Picture(page=page, png=png, width=8, height=8, seed=1, denoise_steps=1, is_resampled=False)


def test_a_store_keeps_lists_and_deletes(s3: str) -> None:
    store = StoryStore("s3://bucket/store")
    for story_id in ("story_1", "story_2"):
        store.save_picture(story_id, picture(1))
    assert store.load_picture("story_1", 1) == picture(1).png
    assert store.list_ids() == ["story_2", "story_1"]
    assert store.sizes()["story_1"] == len(picture(1).png)
    store.delete("story_1")
    assert store.list_ids() == ["story_2"]
    with pytest.raises(StoryNotFound):
        store.load_picture("story_1", 1)
    owned = store.owned(3)
    owned.mark("story_2", is_running=True)
    assert store.running() == ["story_2"]
    owned.mark("story_2", is_running=False)
    assert store.running() == []


def test_a_small_file_is_one_request(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = Faults()
    with failing_s3(s3, faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        files, path = open_place("s3://bucket/one")
        before = sum(faults.counts.values())
        write_whole(files, f"{path}/file", b"x" * 1000)
        assert sum(faults.counts.values()) == before + 1
        assert read_whole(files, f"{path}/file") == b"x" * 1000
        assert sum(faults.counts.values()) == before + 3  # its size and itself


def test_a_large_file_is_read_in_few_requests(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files, path = open_place("s3://bucket/large")
    data = os.urandom(READ_BYTES + 1000)
    write_whole(files, path, data)
    with failing_s3(s3, faults := Faults()) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        files, path = open_place("s3://bucket/large")
        before = sum(faults.counts.values())
        assert read_whole(files, path) == data
        assert sum(faults.counts.values()) == before + 4  # its size, two parts, and whether it is still the same


def test_a_large_file_whose_beginning_fails_leaves_the_earlier_one(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with failing_s3(s3, faults := Faults(kinds=("slow down",))) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        files, path = open_place("s3://bucket/begun", wait_s=0)
        write_whole(files, path, b"earlier")
        faults.rate = 1.0
        with pytest.raises(OSError, match="SLOW_DOWN"):
            write_whole(files, path, bytes(20 * 2**20))
        faults.rate = 0.0
        assert read_whole(files, path) == b"earlier"
        write_whole(files, path, bytes(20 * 2**20))
        assert read_whole(files, path) == bytes(20 * 2**20)


def test_a_file_is_read_whole_while_it_is_replaced(s3: str) -> None:
    files, path = open_place("s3://bucket/replaced")
    contents = [f"{number:03}".encode() * (5 if number % 2 else 70) for number in range(100)]
    write_whole(files, path, contents[0])
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [write_whole(files, path, data) for data in contents])
        num_read = 0
        while not writing.done():
            assert read_whole(files, path) in contents
            num_read += 1
    assert num_read > 20


def test_a_failing_server_loses_nothing(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = Faults(rate=0.3)
    with failing_s3(s3, faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        files, path = open_place("s3://bucket/failing")
        for number in range(40):
            data = os.urandom(3000)
            write_whole(files, f"{path}/{number}", data)
            assert read_whole(files, f"{path}/{number}") == data
    assert set(faults.counts) == {"", *FAULTS}


def test_a_dead_server_is_an_error_in_bounded_time(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StoryStore("s3://bucket/dead")
    with failing_s3(s3, faults := Faults()) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        store = StoryStore("s3://bucket/dead")
        store.save_picture("story_1", picture(1))
        faults.rate, faults.kinds = 1.0, ("slow down",)
        started = time.monotonic()
        with pytest.raises(StorageError, match="does not answer") as caught:
            store.load_picture("story_1", 1)
        assert time.monotonic() - started < 60
        assert "bucket" not in str(caught.value)
        faults.rate = 0.0
        assert store.load_picture("story_1", 1) == picture(1).png


def test_a_missing_bucket_is_said_at_the_start(s3: str) -> None:
    with pytest.raises(StartError, match="s3://nonesuch/stories .*create the bucket"):
        check_storage("s3://nonesuch/stories")


def test_bad_credentials_are_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # This server takes one request unseen, the making of the bucket, and asks for credentials from then on.
    with running_s3(tmp_path, {"INITIAL_NO_AUTH_ACTION_COUNT": "1"}) as url:
        for name, value in variables(url, key="AKIAUNKNOWN").items():
            monkeypatch.setenv(name, value)
        with pytest.raises(StartError, match="s3://bucket/stories .*AWS_ACCESS_KEY_ID"):
            check_storage("s3://bucket/stories")


def test_the_policy_of_the_docs_suffices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [policy] = re.findall(r'^{"Version": "2012-10-17".*$', (ROOT / "docs/operations.md").read_text(), re.M)
    # Names of requests, which this server asks for in a policy. At Amazon the actions of the policy cover them.
    policy = policy.replace('"s3:ListBucket"', '"s3:ListBucket", "s3:HeadBucket", "s3:DeleteObjects"')
    less = policy.replace('"s3:PutObject", ', "")
    # The making of the bucket, and three requests for each of two users.
    with running_s3(tmp_path, {"INITIAL_NO_AUTH_ACTION_COUNT": "7"}) as url:
        keys = {name: _make_user(url, name, text) for name, text in (("able", policy), ("unable", less))}
        for name, is_able in (("able", True), ("unable", False)):
            for variable, value in (variables(url) | keys[name]).items():
                monkeypatch.setenv(variable, value)
            if is_able:
                store = StoryStore(f"s3://bucket/{name}")
                store.save_picture("story_1", picture(1))
                assert store.load_picture("story_1", 1) == picture(1).png and store.list_ids() == ["story_1"]
                store.delete("story_1")
            else:
                with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID"):
                    StoryStore(f"s3://bucket/{name}")


def _make_user(url: str, name: str, policy: str) -> dict[str, str]:
    """The credentials of a new user with this policy."""

    def ask(**fields: str) -> str:
        scope = {"Authorization": "AWS4-HMAC-SHA256 Credential=any/20260101/us-east-1/iam/aws4_request"}
        reply = httpx.post(url, headers=scope, data={"Version": "2010-05-08", **fields}, trust_env=False)
        assert reply.status_code == 200, reply.text
        return reply.text

    ask(Action="CreateUser", UserName=name)
    ask(Action="PutUserPolicy", UserName=name, PolicyName="own", PolicyDocument=policy)
    made = ask(Action="CreateAccessKey", UserName=name)
    key, secret = (re.findall(f"<{tag}>(.*?)</{tag}>", made)[0] for tag in ("AccessKeyId", "SecretAccessKey"))
    return {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}


@pytest.mark.cluster
def test_a_story_survives_a_killed_server(url: str, tmp_path: Path) -> None:
    faults = Faults(rate=0.05)
    place = "s3://bucket/served"
    with failing_s3(url, faults) as proxy:
        environment, port = variables(proxy), find_free_port()
        base = f"http://127.0.0.1:{port}"
        body = {"prompt": "A fox who finds a red balloon", "pages": 3, "seed": 7, "steps": 4}
        with httpx.Client(base_url=base, timeout=120, trust_env=False) as client:
            for number in range(2):
                log = tmp_path / f"log-{number}"
                with log.open("wb") as output:
                    process = start_server(port, place, output, environment=environment)
                try:
                    wait_until_ready(process, log)
                    if number == 0:
                        with client.stream("POST", "/v1/stories", json={**body, "stream": True}) as response:
                            lines = response.iter_lines()
                            next(line for line in lines if line == "event: image")
                    else:
                        story = _wait_for_end(client)
                        assert [page["index"] for page in story["pages"]] == [1, 2, 3]
                        for page in story["pages"]:
                            assert client.get(page["image"]["url"]).content.startswith(b"\x89PNG")
                        assert client.delete(f"/v1/stories/{story['id']}").status_code == 204
                        assert client.get("/v1/stories").json()["data"] == []
                finally:
                    _end(process, signal.SIGKILL if number == 0 else signal.SIGTERM)
                    _wait_until_free(port)
    assert faults.counts[""] > 20 and len(faults.counts) > 2


def _wait_for_end(client: httpx.Client) -> dict:
    deadline = time.monotonic() + 90
    while True:
        [listed] = client.get("/v1/stories").json()["data"]
        story = client.get(f"/v1/stories/{listed['id']}").json()
        if story["status"] != "drawing":
            assert story["status"] == "done", story
            return story
        assert time.monotonic() < deadline, story
        time.sleep(0.5)


def _end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(process.pid, how)
    process.wait(60)


def _wait_until_free(port: int) -> None:
    """Processes of a killed server live until they notice that it is gone."""
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as asking:
            if asking.connect_ex(("127.0.0.1", port)):
                return
        assert time.monotonic() < deadline, f"port {port} stays taken"
        time.sleep(0.2)


def run(environment: dict[str, str], *command: str, is_killed_at: str = "") -> str:
    """Run one of our modules to its end, or to a failpoint that kills it; its output."""
    process = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert process.returncode == (-signal.SIGKILL if is_killed_at else 0), process.stdout + process.stderr
    return process.stdout + process.stderr


@pytest.mark.cluster
def test_a_job_from_s3_to_s3_resumes(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "".join(json.dumps({"id": str(n), "prompt": f"A fox {n}", "pages": 1, "steps": 2}) + "\n" for n in range(4))
    for name, value in variables(url).items():
        monkeypatch.setenv(name, value)
    files, path = open_place("s3://bucket/job")
    write_whole(files, f"{path}/rows.jsonl", rows.encode())
    command = ("batch_jobs.illustrate", "s3://bucket/job/rows.jsonl", "--output", "s3://bucket/job/stories")
    command += ("--flush-seconds", "1")
    with failing_s3(url, Faults(rate=0.05)) as proxy:
        environment = variables(proxy)
        point = f"part-written:{tmp_path / 'marker'}"
        run({**environment, "MINIGPT5_FAILPOINT": point}, *command, is_killed_at=point)
        begun = _rows(files, f"{path}/stories")
        assert len(begun) > 0
        run(environment, *command)
    found = _rows(files, f"{path}/stories")
    assert sorted(row["id"] for row in found) == ["0", "1", "2", "3"]
    assert all(row["error"] is None and row["pages"][0]["png"].startswith(b"\x89PNG") for row in found)


def _rows(files: fs.FileSystem, folder: str) -> list[dict]:
    infos = files.get_file_info(fs.FileSelector(folder))
    paths = [info.path for info in infos if info.is_file and info.base_name.endswith(".parquet")]
    return [row for path in paths for row in parquet.read_table(path, filesystem=files).to_pylist()]


@pytest.fixture(scope="module")
def encoded(url: str) -> str:
    """Rows that are prepared here and encoded by a job, over a server that fails now and then."""
    with pytest.MonkeyPatch.context() as patch, failing_s3(url, Faults(rate=0.05)) as proxy:
        for name, value in variables(proxy).items():
            patch.setenv(name, value)
        part = Part(number=0, file="", start=0, count=40)
        write_part(part, layout="storybook:caption", uri="", output="s3://bucket/rows", seed=3)
        command = (
            "batch_jobs.precompute",
            "s3://bucket/rows",
            "--model",
            str(MODEL),
            "--output",
            "s3://bucket/encoded",
        )
        run(dict(os.environ), *command)
    return "s3://bucket/encoded"


@pytest.mark.cluster
def test_training_and_its_model_over_s3(encoded: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = "s3://bucket/align"
    command = ["align", "--preset", "storybook", "--data", encoded, "--start", str(MODEL), "--out", out]
    command += ["--workers", "0", "batch_size=2", "num_threads=1", "warmup_steps=1", "log_every=1", "replay.steps=1"]
    command += ["draws_samples=false", "checkpoint_every_s=0"]
    with failing_s3(s3, faults := Faults(rate=0.1)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        assert train([*command, "steps=2"]) == 0
        assert newest_step(RunFolder(out)) == 2
        assert train([*command, "steps=3"]) == 0
        lines = [json.loads(line) for line in RunFolder(out).read_log("log.jsonl").splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3], lines
        with monkeypatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path))
            with ThreadPoolExecutor() as threads:
                found, again = threads.map(locate, [f"{out}/model"] * 2)
            assert found == again and check_folder(found).fingerprint in found.name
            assert found.is_relative_to(tmp_path) and not list(tmp_path.rglob("*.partial"))
    assert set(faults.counts) == {"", *FAULTS}
    story = MiniGPT5.from_pretrained(found).write("A fox", pages=1, seed=1, draw=DrawSettings(steps=1))
    assert story.pages[0].text and story.pages[0].picture
