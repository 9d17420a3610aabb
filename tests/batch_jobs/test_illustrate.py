"""The bulk job: rows are checked one by one, stages pass pages on, stories are whole, a second run does the rest."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from PIL import Image
from pyarrow import csv, dataset, parquet

from batch_jobs import illustrate
from batch_jobs.illustrate import Engines, make_pages_on_ray
from batch_jobs.inputs import BadRow, RawRow, StoryJob, check_rows, prompt_seed, read_rows
from batch_jobs.outputs import STORY_SCHEMA, StorySink
from batch_jobs.stages import Draw, Row, Write, unpack
from minigpt5.config import default_model_folder, storybook
from minigpt5.errors import StorageError
from minigpt5.flow import page_seed, write_story
from minigpt5.types import DrawSettings, StoryRequest
from tests.batch_jobs.fakes import (
    BREAKS_ON_PAGE_2,
    CANNOT_BE_DRAWN,
    FINGERPRINT,
    MAX_PROMPT,
    FakeDecoder,
    FakeGenerator,
)

CONFIG = storybook()
ROOT = Path(__file__).parent.parent.parent
NO_MODEL = "models/storybook is not there yet: train it with `make storybook-model`"

PROMPTS = [
    {"id": "fox", "prompt": "a fox", "pages": 3, "seed": 7, "steps": 2, "guidance_scale": 2.5},
    {"id": "owl", "prompt": "an owl"},
    {"prompt": "a cat", "pages": 1},
    {"prompt": ""},
    {"prompt": "x" * (MAX_PROMPT + 1)},
    {"prompt": BREAKS_ON_PAGE_2},
    {"prompt": CANNOT_BE_DRAWN},
]


def check(*rows: dict[str, object]) -> list[StoryJob | BadRow]:
    return list(check_rows((RawRow(values=row) for row in rows), draw=CONFIG.draw))


def make_pages_here(jobs: list[StoryJob]) -> Iterator[Row]:
    """The stages in this process, as far out of order as they can come: the last page of all stories first."""
    write, draw = Write(FakeGenerator, CONFIG.sampling), Draw(FakeDecoder, CONFIG.draw.scheduler)
    table = pa.Table.from_pylist([vars(job) for job in jobs])
    written = [row for batch in write(table) for row in batch.to_pylist()]
    drawn = [row for row in written for batch in draw(pa.Table.from_pylist([row])) for row in batch.to_pylist()]
    yield from reversed(drawn)


def refuse(jobs: list[StoryJob]) -> Iterator[Row]:
    raise AssertionError("there is nothing to write")


def read_output(folder: Path) -> dict[str, Row]:
    rows = dataset.dataset(folder).to_table().to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def test_a_row_is_filled_in_from_the_model_folder() -> None:
    (job,) = check({"prompt": "a fox"})
    assert isinstance(job, StoryJob)
    assert (job.pages, job.steps, job.guidance_scale) == (4, CONFIG.draw.steps, CONFIG.draw.guidance_scale)
    assert job.seed == prompt_seed("a fox") and 0 <= job.seed < 2**31


def test_ids_and_seeds_of_the_content_do_not_depend_on_the_order() -> None:
    fox, owl = check({"prompt": "a fox"}, {"prompt": "an owl"})
    owl_first, fox_second = check({"prompt": "an owl"}, {"prompt": "a fox"})
    assert (fox.id, owl.id) == (fox_second.id, owl_first.id)
    (other,) = check({"prompt": "a fox", "seed": 1})
    assert other.id != fox.id


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": ["a fox"]}, r"prompt is \['a fox'\] but must be a text"),
        ({"prompt": "half \ud83e"}, "surrogate"),
        ({"prompt": "a fox", "pages": 0}, "pages is 0 but must be from 1 to 16"),
        ({"prompt": "a fox", "pages": 17}, "pages is 17 but must be from 1 to 16"),
        ({"prompt": "a fox", "pages": 2.5}, "pages is 2.5 but must be a whole number"),
        ({"prompt": "a fox", "pages": True}, "pages is True but must be a number"),
        ({"prompt": "a fox", "pages": "many"}, "pages is 'many' but must be a number"),
        ({"prompt": "a fox", "pages": float("inf")}, "pages is inf but must be from"),
        ({"prompt": "a fox", "seed": -1}, "seed is -1 but must be from 0"),
        ({"prompt": "a fox", "seed": 2**63}, "seed is 9223372036854775808 but must be from 0"),
        ({"prompt": "a fox", "steps": 101}, "steps is 101 but must be from 1 to 100"),
        ({"prompt": "a fox", "guidance_scale": 0.5}, "guidance_scale is 0.5 but must be from 1 to 20"),
        ({"prompt": "a fox", "id": ["x"]}, r"id is \['x'\] but must be"),
        ({"prompt": "a fox", "id": "x" * 513}, "at most 512 letters"),
    ],
)
def test_a_bad_row_says_what_is_wrong(row: dict[str, object], complaint: str) -> None:
    bad, good = check(row, {"prompt": "a fox"})
    assert isinstance(bad, BadRow) and isinstance(good, StoryJob)
    assert re.search(complaint, bad.error)
    assert bad.id and isinstance(bad.prompt.encode(), bytes)


def test_the_largest_values_are_taken_as_they_are() -> None:
    (job,) = check({"prompt": "a fox", "seed": 2**63 - 1, "pages": 16, "id": 0})
    assert isinstance(job, StoryJob)
    assert (job.seed, job.pages, job.id) == (2**63 - 1, 16, "0")


def test_a_second_row_of_an_id_is_reported_and_the_first_is_kept() -> None:
    first, second, third = check({"id": 1, "prompt": "a fox"}, {"id": "1", "prompt": "an owl"}, {"prompt": "a cat"})
    assert isinstance(first, StoryJob) and isinstance(third, StoryJob)
    assert isinstance(second, BadRow)
    assert second.id == "1#2" and "already that of row 1" in second.error
    _, again = check({"prompt": "a cat"}, {"prompt": "a cat"})
    assert isinstance(again, BadRow) and "the same as row 1" in again.error


def test_the_same_rows_come_out_of_every_format(tmp_path: Path) -> None:
    rows = [{"id": "fox", "prompt": 'a "fox",\nred', "seed": 7}, {"id": "owl", "prompt": "an owl", "seed": None}]
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in rows) + "\n")
    table = pa.Table.from_pylist(rows)
    csv.write_csv(table, tmp_path / "rows.csv")
    parquet.write_table(table, tmp_path / "rows.parquet")
    found = [
        list(check_rows(read_rows(str(tmp_path / f"rows.{ending}")), draw=CONFIG.draw))
        for ending in ("jsonl", "csv", "parquet")
    ]
    assert found[0] == found[1] == found[2] == check(*rows)
    (tmp_path / "uri.jsonl").write_text("{}")
    assert len(list(read_rows((tmp_path / "uri.jsonl").as_uri()))) == 1


def test_unreadable_rows_cost_only_themselves(tmp_path: Path) -> None:
    lines = [b'{"prompt": "a fox"}', b'{"prompt": "an ow', b'"just text"', b'{"prompt": "\xff"}', b"[" * 100_000]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    checked = list(check_rows(read_rows(str(tmp_path / "rows.jsonl")), draw=CONFIG.draw))
    assert [type(row) for row in checked] == [StoryJob] + [BadRow] * 4
    assert all("is unreadable" in row.error for row in checked if isinstance(row, BadRow))
    (tmp_path / "rows.csv").write_text("id,prompt\n1,a fox\n2,an owl, and more\n3,a cat\n")
    checked = list(check_rows(read_rows(str(tmp_path / "rows.csv")), draw=CONFIG.draw))
    assert [type(row) for row in checked] == [StoryJob, BadRow, StoryJob]


@pytest.mark.parametrize("name", ["missing.jsonl", "rows.txt", "broken.parquet", "nosuch://bucket/rows.jsonl"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "rows.txt").write_text("a fox")
    (tmp_path / "broken.parquet").write_text("not parquet")
    with pytest.raises(StorageError, match=name.split(":")[0]):
        list(read_rows(name if "://" in name else str(tmp_path / name)))


def test_every_row_becomes_a_row_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    report = illustrate.illustrate(check(*PROMPTS), StorySink(str(tmp_path)), make_pages=make_pages_here)
    assert (report.rows, report.skipped, report.errors, report.pictures) == (7, 0, 4, 3 + 4 + 1 + 1 + 3)
    check_output(tmp_path)
    files = set(tmp_path.iterdir())
    report = illustrate.illustrate(check(*PROMPTS), StorySink(str(tmp_path)), make_pages=refuse)
    assert (report.rows, report.skipped, report.errors) == (7, 7, 0)
    assert set(tmp_path.iterdir()) == files


def check_output(folder: Path) -> None:
    """Of PROMPTS through the fakes."""
    stories = {row["prompt"]: row for row in read_output(folder).values()}
    fox = stories["a fox"]
    assert (fox["id"], fox["seed"], fox["error"]) == ("fox", 7, None) and fox["seconds"] > 0
    assert [page["index"] for page in fox["pages"]] == [1, 2, 3]
    assert [page["text"] for page in fox["pages"]] == [f"Page {n} of a fox, 7." for n in (1, 2, 3)]
    assert [page["seed"] for page in fox["pages"]] == [page_seed(7, n) for n in (1, 2, 3)]
    assert unpack(fox["pages"][1]["vokens"], page=2).fingerprint == FINGERPRINT
    assert stories[""]["error"].startswith("prompt is empty") and stories[""]["pages"] == []
    assert "shorten it" in stories["x" * (MAX_PROMPT + 1)]["error"]
    broken = stories[BREAKS_ON_PAGE_2]
    assert broken["error"] == "writing failed: out of words" and len(broken["pages"]) == 1
    undrawn = stories[CANNOT_BE_DRAWN]
    assert undrawn["error"] == "page 2 has no picture: out of paint" and len(undrawn["pages"]) == 4
    assert [page["error"] for page in undrawn["pages"]] == [None, "out of paint", None, None]
    assert [page["png"] is None for page in undrawn["pages"]] == [False, True, False, False]
    schema = dataset.dataset(folder).schema
    assert schema.remove_metadata() == STORY_SCHEMA


async def in_process(row: dict[str, object]) -> list[tuple[str, bytes | None]]:
    draw = DrawSettings(
        steps=int(str(row["steps"])), guidance_scale=float(str(row["guidance_scale"])), scheduler=CONFIG.draw.scheduler
    )
    request = StoryRequest(
        prompt=(str(row["prompt"]),), pages=int(str(row["pages"])), seed=7, sampling=CONFIG.sampling, draw=draw
    )
    story = await write_story(request, FakeGenerator().generate, FakeDecoder().decode)
    return [(page.text, page.picture.png if page.picture else None) for page in story.pages]


def test_a_story_is_that_of_the_in_process_flow(tmp_path: Path) -> None:
    illustrate.illustrate(check(PROMPTS[0]), StorySink(str(tmp_path)), make_pages=make_pages_here)
    (story,) = read_output(tmp_path).values()
    assert [(page["text"], page["png"]) for page in story["pages"]] == asyncio.run(in_process(PROMPTS[0]))


def test_a_run_that_breaks_keeps_the_stories_that_are_whole(tmp_path: Path) -> None:
    def break_in_the_middle(jobs: list[StoryJob]) -> Iterator[Row]:
        yield from make_pages_here(jobs[:1])
        yield next(make_pages_here(jobs[1:]))
        raise RuntimeError("the cluster is gone")

    rows = check({"id": "fox", "prompt": "a fox"}, {"id": "owl", "prompt": "an owl"})
    with pytest.raises(RuntimeError, match="gone"):
        illustrate.illustrate(rows, StorySink(str(tmp_path)), make_pages=break_in_the_middle)
    assert set(read_output(tmp_path)) == {"fox"}
    report = illustrate.illustrate(rows, StorySink(str(tmp_path)), make_pages=make_pages_here)
    assert (report.skipped, report.stories) == (1, 1)
    assert set(read_output(tmp_path)) == {"fox", "owl"}


def test_too_many_errors_end_the_run(tmp_path: Path) -> None:
    rows = check(*[{"prompt": "", "id": number} for number in range(5)], {"prompt": "a fox"})
    report = illustrate.illustrate(rows, StorySink(str(tmp_path)), make_pages=refuse, max_errors=2)
    assert report.stopped_at == 3
    assert len(read_output(tmp_path)) == 3


def test_an_output_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        StorySink(str(tmp_path / "file"))
    (tmp_path / "part-1.parquet").write_text("not parquet")
    with pytest.raises(StorageError, match="cannot be read"):
        StorySink(str(tmp_path)).written_ids()


def test_errors_are_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = illustrate.main(["rows.jsonl", "--output", str(tmp_path / "out"), "--model", str(tmp_path)])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ") and "no config.json" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.cluster
def test_stages_on_ray_give_the_same_data_set(tmp_path: Path) -> None:
    engines = Engines(load_generator=FakeGenerator, load_decoder=FakeDecoder, num_decoders=2)
    make_pages = partial(make_pages_on_ray, config=CONFIG, engines=engines)
    was_up = ray.is_initialized()
    try:
        report = illustrate.illustrate(check(*PROMPTS), StorySink(str(tmp_path / "ray")), make_pages=make_pages)
    finally:
        if not was_up:
            ray.shutdown()
    assert (report.errors, report.pictures) == (4, 12)
    check_output(tmp_path / "ray")
    illustrate.illustrate(check(*PROMPTS), StorySink(str(tmp_path / "here")), make_pages=make_pages_here)
    found, expected = read_output(tmp_path / "ray"), read_output(tmp_path / "here")
    assert found.keys() == expected.keys()
    assert all(found[id]["pages"] == expected[id]["pages"] for id in found)


HEAD = """
import ray, sys
port = int(sys.argv[1])
ray.init(address="local", num_cpus=4, dashboard_port=port, log_to_driver=False, object_store_memory=2**28)
print("up", flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a cluster of our own that takes jobs. Its port is named, since two clusters that look for a free
    one at the same time may both believe in the same."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert head.stdin and head.stdout
    try:
        assert head.stdout.readline().strip() == "up"
        yield f"http://127.0.0.1:{port}"
    finally:
        head.stdin.close()
        head.wait(timeout=60)


@pytest.mark.cluster
@pytest.mark.skipif(not (default_model_folder() / "config.json").exists(), reason=NO_MODEL)
def test_the_shipped_model_illustrates_a_file_as_a_submitted_job(tmp_path: Path, cluster: str) -> None:
    rows = [{"id": "fox", "prompt": "A fox who finds a balloon", "pages": 2, "seed": 7, "steps": 2}, {"prompt": ""}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["-m", "batch_jobs.illustrate", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out")]
    command += ["--model", str(default_model_folder())]
    submit = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", cluster]
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}  # Ray's own clusters ask for the token that they wrote
    environment.pop("RAY_ADDRESS", None)
    runtime_env = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})
    deadline = time.monotonic() + 60
    while True:
        job = subprocess.run(
            [*submit, "--runtime-env-json", runtime_env, "--", sys.executable, *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        # A cluster takes jobs some seconds after it is up.
        if "No available agent" not in job.stderr or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "2 rows, 0 already there, 1 errors, 2 pictures" in job.stdout
    files = set((tmp_path / "out").iterdir())
    again = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "2 rows, 2 already there, 0 errors" in again.stdout
    assert set((tmp_path / "out").iterdir()) == files

    from minigpt5 import MiniGPT5

    model = MiniGPT5.from_pretrained(default_model_folder())
    draw = DrawSettings(steps=2, guidance_scale=model.config.draw.guidance_scale, scheduler=model.config.draw.scheduler)
    story = model.write("A fox who finds a balloon", pages=2, seed=7, draw=draw)
    found = read_output(tmp_path / "out")["fox"]["pages"]
    assert [page["text"] for page in found] == [page.text for page in story.pages]
    assert largest_difference([page["png"] for page in found], [p.picture.png for p in story.pages if p.picture]) <= 1


def largest_difference(found: list[bytes], expected: list[bytes]) -> int:
    """In levels of a pixel."""
    assert len(found) == len(expected)
    pixels = [[np.array(Image.open(io.BytesIO(png))).astype(int) for png in pngs] for pngs in (found, expected)]
    return max(int(np.abs(one - other).max()) for one, other in zip(*pixels, strict=True))
