"""Files are put in place whole, or not at all."""

from __future__ import annotations

import http.server
import pickle
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ArrowException, dataset, fs, parquet

from minigpt5 import storage
from minigpt5.errors import StorageError
from minigpt5.storage import is_final, open_place, patient, read_whole, write_whole
from tests.helpers.flaky_files import FlakyFiles
from tests.helpers.processes import find_free_port


class FailingStream:
    """Of an object store: closing one after a failed write may put an empty object in place."""

    is_closed = False

    def write(self, data: bytes) -> None:
        raise OSError("AWS Error ACCESS_DENIED")

    def close(self) -> None:
        self.is_closed = True


class FailingStore:
    type_name = "s3"

    def __init__(self) -> None:
        self.stream = FailingStream()

    def open_output_stream(self, path: str) -> FailingStream:
        return self.stream


def test_a_write_that_fails_leaves_the_earlier_object() -> None:
    store: Any = FailingStore()
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        write_whole(store, "bucket/object", b"new")
    assert not store.stream.is_closed


@pytest.mark.parametrize("uri", ["s3://key:abc/def@bucket/x", "s3://key@bucket/x", "abfs://account:secret@container/x"])
def test_a_uri_with_credentials_is_refused_without_showing_them(uri: str) -> None:
    with pytest.raises(StorageError, match="holds credentials") as refusal:
        open_place(uri)
    assert not {"key", "abc", "secret"} & set(str(refusal.value).replace("/", " ").replace(":", " ").split())


@pytest.mark.parametrize("option", ["client_secret", "sas_token", "account_key", "secret_key"])
def test_a_key_among_the_options_of_a_uri_is_refused_without_showing_it(option: str) -> None:
    with pytest.raises(StorageError, match="holds credentials") as refusal:
        open_place(f"abfss://account@container.example/path?{option}=HIDDEN")
    assert "HIDDEN" not in str(refusal.value)


def test_what_follows_a_number_sign_is_not_lost() -> None:
    with pytest.raises(StorageError, match="write %23"):
        open_place("s3://bucket/runs#1")
    assert open_place("s3://bucket/runs%231?region=eu-west-1")[1] == "bucket/runs#1"


class Versions:
    """A store in which an object is replaced while it is read, by these contents in turn."""

    type_name = "s3"

    def __init__(self, *contents: bytes) -> None:
        self.contents, self.num_opened = contents, 0

    def open_input_file(self, path: str) -> Any:
        version = min(self.num_opened, len(self.contents) - 1)
        self.num_opened += 1
        data = self.contents[version]
        later = self.contents[min(version + 1, len(self.contents) - 1)]
        return SimpleNamespace(
            size=lambda: len(data),
            read_at=lambda size, at: later[at : at + size].ljust(size, b"\0"),  # as pyarrow does
            metadata=lambda: {"ETag": str(version).encode()},
            close=lambda: None,
        )


@pytest.mark.parametrize("contents", [(b"short", b"a longer one"), (b"a longer one", b"short")])
@pytest.mark.parametrize("wait_s", [0, 1])
def test_an_object_that_is_replaced_while_it_is_read_is_read_whole(contents: tuple[bytes, ...], wait_s: int) -> None:
    store: Any = Versions(*contents)
    assert read_whole(patient(store, wait_s=wait_s), "bucket/object") == contents[-1]


def test_a_local_uri_is_a_local_file_system(tmp_path: Path) -> None:
    files, path = open_place(tmp_path.as_uri(), wait_s=0)
    assert isinstance(files, fs.LocalFileSystem) and Path(path) == tmp_path


def test_an_object_that_is_replaced_all_the_time_is_an_error() -> None:
    store: Any = Versions(*(bytes([number]) * number for number in range(1, 200)))
    with pytest.raises(OSError, match="was replaced 20 times while it was read"):
        read_whole(patient(store, wait_s=1), "bucket/object")


def test_a_path_may_hold_an_at_sign() -> None:
    assert open_place("s3://bucket/a@b:c@d?region=eu-west-1")[1] == "bucket/a@b:c@d"


@pytest.fixture
def flaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[fs.FileSystem, FlakyFiles]:
    """A patient file system over a store whose next requests fail."""
    monkeypatch.setattr(storage, "PAUSE_S", 0.01)
    handler = FlakyFiles(tmp_path)
    return patient(fs.PyFileSystem(handler), wait_s=5), handler


def test_every_request_waits_for_a_store_that_fails(flaky: tuple[fs.FileSystem, FlakyFiles], tmp_path: Path) -> None:
    files, store = flaky
    table = pa.table({"id": ["a", "b"]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    requests = {
        "write": lambda: write_whole(files, "a/b", b"data"),
        "read": lambda: read_whole(files, "a/b"),
        "info": lambda: files.get_file_info("a/b").size,
        "list": lambda: [info.base_name for info in files.get_file_info(fs.FileSelector("a"))],
        "parquet": lambda: parquet.read_table("rows.parquet", filesystem=files),
        "data set": lambda: dataset.dataset(["rows.parquet"], filesystem=files).to_table(),
        "make": lambda: files.create_dir("c/d"),
        "delete": lambda: files.delete_file("a/b"),
        "delete all": lambda: files.delete_dir("c"),
    }
    results = {}
    for name, work in requests.items():
        store.failures_left, failed = 2, store.num_failures
        results[name] = work()
        assert store.num_failures == failed + 2, name
    assert results["read"] == b"data" and results["info"] == 4 and results["list"] == ["b"]
    assert results["parquet"] == results["data set"] == table
    assert not (tmp_path / "a/b").exists() and not (tmp_path / "c").exists()


@pytest.mark.parametrize("cuts", [False, True])
def test_a_part_of_a_large_file_is_asked_for_again_alone(
    flaky: tuple[fs.FileSystem, FlakyFiles], monkeypatch: pytest.MonkeyPatch, cuts: bool
) -> None:
    files, store = flaky
    data = bytes(range(256)) * 40
    write_whole(files, "large", data)
    monkeypatch.setattr(storage, "READ_BYTES", 1000)
    store.num_reads, store.failing_read, store.cuts = 0, 4, cuts
    assert read_whole(files, "large") == data
    assert store.num_reads == 12  # eleven parts, one of them twice


def test_waiting_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(storage, "PAUSE_S", 0.01)
    store = FlakyFiles(tmp_path)
    store.failures_left = 10**6
    with pytest.raises(OSError, match="INTERNAL_FAILURE"):
        patient(fs.PyFileSystem(store), wait_s=0.1).get_file_info("a")
    assert store.num_failures > 2
    assert "asked again for up to 0 s" in caplog.text


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "no file"), PermissionError(13, "denied"), pa.ArrowInvalid("bad")]
)
def test_what_no_time_mends_is_said_at_once(flaky: tuple[fs.FileSystem, FlakyFiles], error: Exception) -> None:
    files, store = flaky
    store.failures_left, store.error = 1, error
    with pytest.raises(type(error)):
        files.get_file_info("a")
    assert store.num_failures == 1


def test_a_deletion_whose_answer_is_lost_is_a_deletion(flaky: tuple[fs.FileSystem, FlakyFiles], tmp_path: Path) -> None:
    files, store = flaky
    (tmp_path / "a").write_bytes(b"")
    store.failures_left, store.does_it_first = 1, True
    files.delete_file("a")
    with pytest.raises(FileNotFoundError):
        files.delete_file("a")


def test_a_patient_file_system_goes_to_other_processes(tmp_path: Path) -> None:
    files = patient(fs.PyFileSystem(FlakyFiles(tmp_path)), wait_s=7)
    again = pickle.loads(pickle.dumps(files))
    assert again == files and again.handler.wait_s == 7
    assert patient(files, wait_s=1).handler.files == files.handler.files  # one patience, not two
    assert isinstance(patient(fs.LocalFileSystem(), wait_s=9), fs.LocalFileSystem)


@pytest.fixture
def status_server() -> Iterator[http.server.ThreadingHTTPServer]:
    """Answers every request with its attribute `status`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(self.server.status)  # type: ignore[attr-defined]
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def open_provider(provider: str, port: int) -> fs.FileSystem:
    place = f"127.0.0.1:{port}"
    if provider == "gcs":
        limit = timedelta(seconds=1)
        return fs.GcsFileSystem(anonymous=True, endpoint_override=place, scheme="http", retry_time_limit=limit)
    if provider == "azure":
        places = {"blob_storage_authority": place, "dfs_storage_authority": place}
        schemes = {"blob_storage_scheme": "http", "dfs_storage_scheme": "http"}
        return fs.AzureFileSystem("account", account_key="YWJj", **places, **schemes)
    return fs.S3FileSystem(
        endpoint_override=place,
        scheme="http",
        region="us-east-1",
        access_key="a",
        secret_key="b",
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
    )


@pytest.mark.parametrize("provider", ["s3", "gcs", "azure"])
def test_the_errors_of_every_provider_are_told_apart(
    provider: str, status_server: http.server.ThreadingHTTPServer
) -> None:
    files = open_provider(provider, status_server.server_port)
    # Azure's own client tries a 503 for six seconds.
    passing = [503, 429] if provider != "azure" else [503]
    for status in (400, 401, 403, 404, *passing):
        status_server.status = status  # type: ignore[attr-defined]
        with pytest.raises((OSError, ArrowException)) as caught:
            files.get_file_info(fs.FileSelector("bucket/folder"))
        assert is_final(caught.value) == (status not in passing), (status, caught.value)


def test_the_client_of_gcs_gives_up_before_its_own_15_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "TRY_S", 1)
    place = f"gs://anonymous@bucket/x?scheme=http&endpoint_override=127.0.0.1%3A{find_free_port()}"
    files, path = open_place(place, wait_s=0)
    began = time.monotonic()
    with pytest.raises(OSError, match="UNAVAILABLE"):
        files.get_file_info(path)
    assert time.monotonic() - began < 20
