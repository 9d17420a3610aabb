"""The bulk job: rows are checked one by one, stages pass pages on, stories are whole, a second run does the rest."""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from PIL import Image
from pyarrow import csv, dataset, fs, parquet

from batch_jobs import books, failpoints, illustrate
from batch_jobs.illustrate import Engines, make_pages_on_ray
from batch_jobs.inputs import BadRow, StoryJob, check_rows, load_image, prompt_seed, read_rows
from batch_jobs.job import Output, run_command
from batch_jobs.monitor import Monitor, Seat
from batch_jobs.outputs import STORY_SCHEMA
from batch_jobs.pipeline import Limits, Pool, check_failures, check_started
from batch_jobs.report import Report
from batch_jobs.stages import Draw, Row, Write, as_table, unpack
from batch_jobs.state import PageStore, StoredPage, _key
from minigpt5.config import default_model_folder, storybook
from minigpt5.errors import InvalidRequest, MiniGPT5Error, StorageError
from minigpt5.storage import patient
from minigpt5.story.stream import page_seed, write_story
from minigpt5.types import DrawSettings, StoryRequest
from tests.helpers.batch_fakes import (
    BREAKS_ON_PAGE_2,
    CANNOT_BE_DRAWN,
    FINGERPRINT,
    MAX_PROMPT,
    FakeDecoder,
    FakeGenerator,
    jobs_in,
)
from tests.helpers.fakes import make_png
from tests.helpers.flaky_files import FlakyFiles
from tests.helpers.processes import ROOT, Cluster

CONFIG = storybook()
NO_MODEL = "models/storybook is not there yet: train it with `make storybook-model`"

PROMPTS: list[dict[str, object]] = [
    {"id": "fox", "prompt": "a fox", "pages": 3, "seed": 7, "steps": 2, "guidance_scale": 2.5},
    {"id": "owl", "prompt": "an owl"},
    {"prompt": "a cat", "pages": 1},
    {"prompt": ""},
    {"prompt": "x" * (MAX_PROMPT + 1)},
    {"prompt": BREAKS_ON_PAGE_2},
    {"prompt": CANNOT_BE_DRAWN},
]


def new_output(folder: Path, **changes: object) -> Output:
    plan = {"job": "illustrate", "model": "fake", **changes}
    return Output.at(str(folder / "out"), STORY_SCHEMA, plan)


def make_pages_here(jobs: list[StoryJob], report: Report, *, output: Output) -> Iterator[Row | None]:
    """The stages in this process, as far out of order as they can come: the last page of all stories first."""
    common = {"store": output.store, "watch": Monitor()}
    write = Write(FakeGenerator, CONFIG.sampling, **common)  # type: ignore[arg-type]
    draw = Draw(FakeDecoder, **common)  # type: ignore[arg-type]
    written = [row for batch in write(as_table(jobs)) for row in batch.to_pylist()]
    drawn = [row for row in written for batch in draw(pa.Table.from_pylist([row])) for row in batch.to_pylist()]
    yield None
    yield from reversed(drawn)


def illustrate_here(rows: list[StoryJob | BadRow], output: Output, **options: int) -> Report:
    make_pages = partial(make_pages_here, output=output)
    return illustrate.illustrate(rows, output, make_pages=make_pages, **options)  # type: ignore[arg-type]


def refuse(jobs: list[StoryJob], report: Report) -> Iterator[Row | None]:
    raise AssertionError("there is nothing to write")


def read_output(folder: Path) -> dict[str, Row]:
    rows = dataset.dataset(folder / "out").to_table().to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def test_a_row_is_filled_in_from_the_model_folder() -> None:
    (job,) = jobs_in({"prompt": "a fox"})
    assert isinstance(job, StoryJob)
    assert (job.pages, job.steps, job.guidance_scale) == (4, CONFIG.draw.steps, CONFIG.draw.guidance_scale)
    assert job.seed == prompt_seed("a fox") and 0 <= job.seed < 2**31


def test_ids_and_seeds_of_the_content_do_not_depend_on_the_order() -> None:
    fox, owl = jobs_in({"prompt": "a fox"}, {"prompt": "an owl"})
    owl_first, fox_second = jobs_in({"prompt": "an owl"}, {"prompt": "a fox"})
    assert (fox.id, owl.id) == (fox_second.id, owl_first.id)
    (other,) = jobs_in({"prompt": "a fox", "seed": 1})
    assert other.id != fox.id


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": ["a fox"]}, r"prompt is \['a fox'\] but must be a text"),
        ({"prompt": "half \ud83e"}, "surrogate"),
        ({"prompt": "a fox", "images": ["half \ud83e.png"]}, "surrogate"),
        ({"prompt": "a fox", "pages": 0}, "pages is 0 but must be from 1 to 64"),
        ({"prompt": "a fox", "pages": 65}, "pages is 65 but must be from 1 to 64"),
        ({"prompt": "a fox", "pages": 2.5}, "pages is 2.5 but must be a whole number"),
        ({"prompt": "a fox", "pages": True}, "pages is True but must be a number"),
        ({"prompt": "a fox", "pages": "many"}, "pages is 'many' but must be a number"),
        ({"prompt": "a fox", "pages": float("inf")}, "pages is inf but must be from"),
        ({"prompt": "a fox", "seed": -1}, "seed is -1 but must be from 0"),
        ({"prompt": "a fox", "seed": 2**63}, "seed is 9223372036854775808 but must be from 0"),
        ({"prompt": "a fox", "steps": 101}, "steps is 101 but must be from 1 to 100"),
        ({"prompt": "a fox", "guidance_scale": 0.5}, "guidance_scale is 0.5 but must be from 1 to 20"),
        ({"prompt": "a fox", "width": 63}, "width is 63 but must be from 64 to 4096"),
        ({"prompt": "a fox", "height": 4097}, "height is 4097 but must be from 64 to 4096"),
        ({"prompt": "a fox", "id": ["x"]}, r"id is \['x'\] but must be"),
        ({"prompt": "a fox", "id": "x" * 513}, "at most 512 letters"),
    ],
)
def test_a_bad_row_says_what_is_wrong(row: dict[str, object], complaint: str) -> None:
    bad, good = jobs_in(row, {"prompt": "a fox"})
    assert isinstance(bad, BadRow) and isinstance(good, StoryJob)
    assert re.search(complaint, bad.error)
    assert bad.id and isinstance(bad.prompt.encode(), bytes)


def test_the_largest_values_are_taken_as_they_are() -> None:
    (job,) = jobs_in({"prompt": "a fox", "seed": 2**63 - 1, "pages": 16, "id": 0})
    assert isinstance(job, StoryJob)
    assert (job.seed, job.pages, job.id) == (2**63 - 1, 16, "0")


def test_a_second_row_of_an_id_is_reported_and_the_first_is_kept() -> None:
    first, second, third = jobs_in({"id": 1, "prompt": "a fox"}, {"id": "1", "prompt": "an owl"}, {"prompt": "a cat"})
    assert isinstance(first, StoryJob) and isinstance(third, StoryJob)
    assert isinstance(second, BadRow)
    assert second.id == "1#2" and "already that of row 1" in second.error
    _, again = jobs_in({"prompt": "a cat"}, {"prompt": "a cat"})
    assert isinstance(again, BadRow) and "the same as row 1" in again.error


def test_the_same_rows_come_out_of_every_format(tmp_path: Path) -> None:
    rows = [{"id": "fox", "prompt": 'a "fox",\nred', "seed": 7}, {"id": "owl", "prompt": "an owl", "seed": None}]
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in rows) + "\n")
    table = pa.Table.from_pylist(rows)
    csv.write_csv(table, tmp_path / "rows.csv")
    parquet.write_table(table, tmp_path / "rows.parquet")
    found = [
        list(check_rows(read_rows(str(tmp_path / f"rows.{ending}")), CONFIG)) for ending in ("jsonl", "csv", "parquet")
    ]
    assert found[0] == found[1] == found[2] == jobs_in(*rows)
    (tmp_path / "uri.jsonl").write_text("{}")
    assert len(list(read_rows((tmp_path / "uri.jsonl").as_uri()))) == 1


def test_unreadable_rows_cost_only_themselves(tmp_path: Path) -> None:
    lines = [b'{"prompt": "a fox"}', b'{"prompt": "an ow', b'"just text"', b'{"prompt": "\xff"}', b"[" * 100_000]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    checked = list(check_rows(read_rows(str(tmp_path / "rows.jsonl")), CONFIG))
    assert [type(row) for row in checked] == [StoryJob] + [BadRow] * 4
    assert all("is unreadable" in row.error for row in checked if isinstance(row, BadRow))
    (tmp_path / "rows.csv").write_text("id,prompt\n1,a fox\n2,an owl, and more\n3,a cat\n")
    checked = list(check_rows(read_rows(str(tmp_path / "rows.csv")), CONFIG))
    assert [type(row) for row in checked] == [StoryJob, BadRow, StoryJob]


@pytest.mark.parametrize("name", ["missing.jsonl", "rows.txt", "broken.parquet", "nosuch://bucket/rows.jsonl"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "rows.txt").write_text("a fox")
    (tmp_path / "broken.parquet").write_text("not parquet")
    with pytest.raises(StorageError, match=name.split(":")[0]):
        list(read_rows(name if "://" in name else str(tmp_path / name)))


def test_every_row_becomes_a_row_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    report = illustrate_here(jobs_in(*PROMPTS), new_output(tmp_path))
    assert (report.rows, report.skipped, report.errors, report.pictures) == (7, 0, 4, 3 + 4 + 1 + 1 + 3)
    assert report.kinds == {"input": 2, "writing": 1, "drawing": 1}
    check_output(tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.state"}
    assert not list(tmp_path.rglob("*.png")), "what is in the rows is kept nowhere else"
    report = illustrate.illustrate(iter(lambda: 1 / 0, 0), new_output(tmp_path), make_pages=refuse)  # type: ignore
    assert (report.rows, report.skipped, report.errors) == (7, 7, 0)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    rows = jobs_in(PROMPTS[0])
    illustrate_here(rows, new_output(tmp_path))
    with pytest.raises(MiniGPT5Error, match="model is 'other' but was 'fake'"):
        illustrate_here(rows, new_output(tmp_path, model="other"))


def test_an_output_has_one_process_at_a_time(tmp_path: Path) -> None:
    first = new_output(tmp_path)
    first.state.take(first.plan)
    second = new_output(tmp_path)
    with pytest.raises(MiniGPT5Error, match=f"worked on by process {os.getpid()}"):
        illustrate_here(jobs_in(PROMPTS[0]), second)
    owner = tmp_path / "out.state" / "owner.json"
    owner.write_text(owner.read_text().replace(str(os.getpid()), str(2**22 - 7)))  # a process that is not there
    assert illustrate_here(jobs_in(PROMPTS[0]), second).stories == 1
    owner.write_text(json.dumps({"token": "x", "host": socket.gethostname(), "pid": 1, "started": 0, "beat": 1}))
    with pytest.raises(MiniGPT5Error, match="taken over by process 1 on"):
        first.state.check_owner()  # it was only slow: it writes nothing more


def check_output(folder: Path) -> None:
    """Check the output of PROMPTS through the fakes."""
    stories = {row["prompt"]: row for row in read_output(folder).values()}
    fox = stories["a fox"]
    assert (fox["id"], fox["seed"], fox["error"]) == ("fox", 7, None)
    assert fox["timings"]["write_s"] > 0 and fox["timings"]["draw_s"] > 0
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
    schema = dataset.dataset(folder / "out").schema
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
    illustrate_here(jobs_in(PROMPTS[0]), new_output(tmp_path))
    (story,) = read_output(tmp_path).values()
    assert [(page["text"], page["png"]) for page in story["pages"]] == asyncio.run(in_process(PROMPTS[0]))


def test_a_run_that_breaks_keeps_what_it_has_and_the_next_makes_only_the_rest(tmp_path: Path) -> None:
    output = new_output(tmp_path)

    def break_in_the_middle(jobs: list[StoryJob], report: Report) -> Iterator[Row | None]:
        yield from make_pages_here(jobs[:1], report, output=output)
        yield next(row for row in make_pages_here(jobs[1:], report, output=output) if row)
        raise RuntimeError("the cluster is gone")

    rows = jobs_in({"id": "fox", "prompt": "a fox"}, {"id": "owl", "prompt": "an owl"})
    with pytest.raises(RuntimeError, match="gone"):
        illustrate.illustrate(rows, output, make_pages=break_in_the_middle)
    assert set(read_output(tmp_path)) == {"fox"}
    fox = (part := next((tmp_path / "out").glob("part-*"))).read_bytes()
    (picture,) = [path for path in tmp_path.rglob("1.png")]
    picture.write_bytes(make_png())  # what is stored is not made again
    (tmp_path / "out" / ".part-1.parquet").write_text("half a file")
    again = new_output(tmp_path)
    report = illustrate_here(rows, again)
    assert (report.skipped, report.stories) == (1, 1)
    assert part.read_bytes() == fox
    found = read_output(tmp_path)
    assert set(found) == {"fox", "owl"}
    assert found["owl"]["pages"][0]["png"] == make_png()
    assert not (tmp_path / "out" / ".part-1.parquet").exists() and not list(tmp_path.rglob("*.png"))


def test_a_story_that_broke_off_in_its_text_goes_on_from_the_pages_that_are_stored(tmp_path: Path) -> None:
    (job,) = jobs_in(PROMPTS[0])
    assert isinstance(job, StoryJob)
    store = PageStore(str(tmp_path / "whole"))
    whole = list(new_writer(store).write(job))
    for text in ("Page 1 of a fox, 7.", "Another text than before."):
        store = PageStore(str(tmp_path / text[:4]))
        store.save_text(job.id, 1, replace(PageStore(str(tmp_path / "whole")).load_texts(job.id)[0], text=text))
        rows = list(new_writer(store).write(job))
        assert [row["page"] for row in rows] == [row["page"] for row in whole] == [1, 2, 3, 0]
        assert rows[0]["text"] == text and rows[0]["vokens"] == whole[0]["vokens"]
        if text == whole[0]["text"]:
            assert [row["text"] for row in rows[:3]] == [row["text"] for row in whole[:3]]


def new_writer(store: PageStore, watch: Monitor | None = None) -> Write:
    return Write(FakeGenerator, CONFIG.sampling, store=store, watch=watch or Monitor())


def test_a_finished_story_keeps_its_text_and_gets_a_picture_for_each_page(tmp_path: Path) -> None:
    texts = ["  A fox \nfound a balloon. ", "He went home."]
    rows = jobs_in(
        {"id": "tale", "pages_text": texts}, {"id": "csv", "pages_text": json.dumps(texts), "prompt": "a fox"}
    )
    report = illustrate_here(rows, new_output(tmp_path))
    assert (report.errors, report.pictures) == (0, 4)
    for story in read_output(tmp_path).values():
        assert [page["text"] for page in story["pages"]] == texts


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"pages_text": "no list"}, "must be a list of texts"),
        ({"pages_text": [1]}, "must be a list of texts"),
        ({"pages_text": []}, "has 0 pages but"),
        ({"pages_text": ["a", " "]}, "no text on page 2"),
        ({"pages_text": ["a"] * 65}, "has 65 pages but must have from 1 to 64"),
        ({"pages_text": ["a", "b"], "pages": 3}, "pages is 3 but pages_text has 2"),
        ({"prompt": "a", "images": 3}, "images is 3 but must be a list"),
        ({"prompt": "a", "images": ["x.png"] * 9}, "at most 8"),
    ],
)
def test_a_bad_story_or_picture_list_says_what_is_wrong(row: dict[str, object], complaint: str) -> None:
    (bad,) = jobs_in(row)
    assert isinstance(bad, BadRow) and complaint in bad.error


def test_pictures_of_a_prompt_come_from_files_and_data_urls(tmp_path: Path) -> None:
    (tmp_path / "fox.png").write_bytes(make_png())
    url = "data:image/png;base64," + base64.b64encode(make_png()).decode()
    for image in (str(tmp_path / "fox.png"), (tmp_path / "fox.png").as_uri(), url, make_png()):
        assert load_image(image) == make_png()
    for image, complaint in ((str(tmp_path / "no.png"), "no.png"), (b"not a picture", "13 bytes"), ("data:,x", "read")):
        with pytest.raises(InvalidRequest, match=complaint):
            load_image(image)
    for name in ("x" * 300 + ".png", "", "nosuch://a/b.png"):
        with pytest.raises(InvalidRequest, match="cannot be read"):
            load_image(name if "://" in name else str(tmp_path / name))
    rows = jobs_in({"id": "a", "prompt": "a", "images": str(tmp_path / "no.png")}, {"id": "b", "prompt": "b"})
    report = illustrate_here(rows, new_output(tmp_path))
    assert report.kinds == {"input": 1} and report.stories == 1


def test_a_row_that_was_in_flight_at_two_engine_deaths_becomes_an_error(tmp_path: Path) -> None:
    output, monitor = new_output(tmp_path), Monitor()
    for _ in range(2):
        monitor.enter("generator", "fox")  # and never leaves
        monitor.enter("decoder", "owl/2")

    def make_pages(jobs: list[StoryJob], report: Report) -> Iterator[Row]:
        draw = Draw(FakeDecoder, store=output.store, watch=monitor)
        for job in jobs:
            for row in new_writer(output.store, monitor).write(job):
                yield draw.draw(row) if row["page"] else row

    rows = jobs_in({"id": "fox", "prompt": "a fox"}, {"id": "owl", "prompt": "an owl", "pages": 2})
    report = illustrate.illustrate(rows, output, make_pages=make_pages)
    assert report.kinds == {"generator deaths": 1, "decoder deaths": 1}
    found = read_output(tmp_path)
    assert found["fox"]["error"] == "in flight at 2 engine deaths: it is not tried again" and not found["fox"]["pages"]
    assert [page["error"] is None for page in found["owl"]["pages"]] == [True, False]


@pytest.fixture
def flaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FlakyFiles:
    """A store that every place is on, and that is waited for shortly."""
    store = FlakyFiles(tmp_path)
    files = patient(fs.PyFileSystem(store), wait_s=0.1)
    monkeypatch.setattr("minigpt5.storage.PAUSE_S", 0.01)
    for module in ("inputs", "state"):
        monkeypatch.setattr(f"batch_jobs.{module}.open_place", lambda uri: (files, uri.removeprefix(f"{tmp_path}/")))
    return store


STAGES_OF_A_ROW = {
    "its texts are read": ("fox", "open out.state/pages/{key}/"),
    "its text is stored": ("fox", "write out.state/pages/{key}/2.json"),
    "its picture is looked for": ("fox", r"info \['out.state/pages/{key}/1.png"),
    "its picture is stored": ("fox", "write out.state/pages/{key}/2.png"),
    "a picture of its prompt is read": ("fox", "open fox.png"),
}


@pytest.mark.parametrize("case", STAGES_OF_A_ROW)
def test_a_row_that_meets_a_failing_store_is_left_to_the_next_run(
    tmp_path: Path, flaky: FlakyFiles, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fox.png").write_bytes(make_png())
    rows = jobs_in(
        {"id": "fox", "prompt": "a fox", "pages": 2, "images": "fox.png"}, {"id": "owl", "prompt": "an owl", "pages": 2}
    )
    name, broken = STAGES_OF_A_ROW[case]
    flaky.broken = broken.format(key=_key(name))
    report = illustrate_here(rows, new_output(tmp_path))
    assert flaky.num_failures > 2, "it was asked again"
    assert (report.done, report.left, report.errors) == (1, 1, 0) and "INTERNAL_FAILURE" in report.left_because
    assert set(read_output(tmp_path)) == {"owl"}
    assert run_command(lambda options, failpoint: report, argparse.Namespace(output="out")) == 1
    assert "1 rows are left, because a store failed" in capsys.readouterr().err
    flaky.broken = ""
    again = illustrate_here(rows, new_output(tmp_path))
    assert (again.skipped, again.done, again.left, again.errors) == (1, 1, 0, 0)
    found = read_output(tmp_path)["fox"]
    assert found["error"] is None and [page["png"] is not None for page in found["pages"]] == [True, True]
    assert illustrate_here(rows, new_output(tmp_path)).skipped == 2


def test_rows_that_are_left_count_for_the_limit_of_errors(tmp_path: Path, flaky: FlakyFiles) -> None:
    flaky.broken = "open out.state/pages/[0-9a-f]+/1.json"
    rows = jobs_in(*({"id": str(number), "prompt": "a fox", "pages": 1} for number in range(4)))
    report = illustrate_here(rows, new_output(tmp_path), max_errors=1)
    assert (report.stopped_at, report.done) == (2, 0)


def test_engines_that_die_too_often_or_cannot_start_end_the_run() -> None:
    monitor = Monitor()
    for _ in range(3):
        monitor.starting("decoder", "one")
    monitor.starting("decoder", "another")
    assert (monitor.figures().pools["decoder"].engines, monitor.figures().pools["decoder"].deaths) == (2, 2)
    check_failures(monitor.figures(), Limits(max_deaths=2))
    with pytest.raises(MiniGPT5Error, match="died 2 times, more than --max-restarts 1"):
        check_failures(monitor.figures(), Limits(max_deaths=1))
    with pytest.raises(MiniGPT5Error, match="no generator and no decoder was ready after 11 s"):
        check_started(monitor.figures(), Limits(start_timeout_s=10), pools=("generator", "decoder"), waited_s=11)
    with pytest.raises(ZeroDivisionError):
        Seat("decoder", lambda: 1 / 0, monitor, engine_id="one")
    error = "the decoder cannot start: ZeroDivisionError: division by zero: check --model and the memory"
    with pytest.raises(MiniGPT5Error, match=error):
        check_failures(monitor.figures(), Limits())


def test_pictures_as_files_are_named_by_their_rows(tmp_path: Path) -> None:
    output = Output.at(str(tmp_path / "out"), STORY_SCHEMA, {}, keeps_pictures=True)
    illustrate_here(jobs_in(PROMPTS[0]), output)
    (story,) = read_output(tmp_path).values()
    assert [page["png"] for page in story["pages"]] == [None] * 3
    pictures = [Path(page["uri"]).read_bytes() for page in story["pages"]]
    assert [png for _, png in asyncio.run(in_process(PROMPTS[0]))] == pictures
    assert not list((tmp_path / "out").rglob("*.png")), "readers of the data set would take them for parquet"


def begin_again(folder: Path, *, removed: tuple[str, ...]) -> Output:
    """A job over the prompt of another one, whose row has the same id, after `removed` was removed of that one."""
    output = Output.at(str(folder / "out"), STORY_SCHEMA, {}, keeps_pictures=True)
    illustrate_here(jobs_in({"id": "fox", "prompt": "a fox", "pages": 1}), output)
    books.write_books(output.sink, model="fake")
    for name in removed:
        shutil.rmtree(folder / name)
    return Output.at(str(folder / "out"), STORY_SCHEMA, {}, keeps_pictures=True)


@pytest.mark.parametrize("left", ["out", "out.pictures", "out.books"])
def test_a_new_job_refuses_what_another_one_left_and_keeps_it(tmp_path: Path, left: str) -> None:
    removed = tuple({"out", "out.state", "out.pictures", "out.books"} - {left})
    output = begin_again(tmp_path, removed=removed)
    files = {path: path.read_bytes() for path in (tmp_path / left).rglob("*") if path.is_file()}
    rows = jobs_in({"id": "fox", "prompt": "a whale", "pages": 1})
    for _ in range(2):
        with pytest.raises(MiniGPT5Error, match=rf"/{left}: files of an earlier job .* name another output"):
            illustrate.illustrate(rows, output, make_pages=refuse)
    assert {path: path.read_bytes() for path in (tmp_path / left).rglob("*") if path.is_file()} == files
    assert not (tmp_path / "out.state").exists(), "it is as free as before"


def test_a_job_draws_its_own_pictures_where_all_of_another_one_was_removed(tmp_path: Path) -> None:
    output = begin_again(tmp_path, removed=("out", "out.state", "out.pictures", "out.books"))
    (tmp_path / "out.pictures").mkdir()
    (tmp_path / "out.pictures" / ".DS_Store").touch()
    row: dict[str, object] = {
        "id": "fox",
        "prompt": "a whale",
        "pages": 1,
        "seed": 7,
        "steps": 2,
        "guidance_scale": 2.5,
    }
    assert illustrate_here(jobs_in(row), output).pictures == 1
    (page,) = read_output(tmp_path)["fox"]["pages"]
    assert [(page["text"], Path(page["uri"]).read_bytes())] == asyncio.run(in_process(row))
    illustrate_here(jobs_in(row), output)  # finished: what it made is its own


def test_pages_without_a_manifest_are_another_jobs(tmp_path: Path) -> None:
    output = new_output(tmp_path)
    output.store.save_text("fox", 1, StoredPage(text="Another story.", vokens=b""))
    with pytest.raises(MiniGPT5Error, match="/out.state/pages: files of an earlier job"):
        illustrate_here(jobs_in(PROMPTS[0]), output)


def test_a_second_row_of_an_id_costs_no_other_row_after_a_kill(tmp_path: Path) -> None:
    rows = jobs_in(
        {"id": "fox#3", "prompt": "a fox", "pages": 1},
        {"id": "fox", "prompt": "an owl", "pages": 1},
        {"id": "fox", "prompt": "a cat", "pages": 1},
    )

    def break_off(jobs: list[StoryJob], report: Report) -> Iterator[Row | None]:
        yield None
        raise RuntimeError("the cluster is gone")

    with pytest.raises(RuntimeError):
        illustrate.illustrate(rows, new_output(tmp_path), make_pages=break_off)
    assert len(read_output(tmp_path)) == 1, "the bad row is in place"
    report = illustrate_here(rows, new_output(tmp_path))
    assert (report.skipped, report.stories, report.errors) == (1, 2, 0)
    found = read_output(tmp_path)
    assert (found["fox#3"]["prompt"], found["fox"]["prompt"]) == ("a fox", "an owl") and len(found) == 3
    assert found["fox#3"]["error"] is found["fox"]["error"] is None


def test_books_show_every_story_and_the_index_names_them_all(tmp_path: Path) -> None:
    output = new_output(tmp_path)
    illustrate_here(jobs_in(*PROMPTS), output)
    index = Path(books.write_books(output.sink, model="fake"))
    links = re.findall(r'href="(\w+\.html)"', index.read_text())
    assert (
        len(links) == 5 and index.read_text().count('<li dir="auto">') == 7 and "prompt is empty" in index.read_text()
    )
    assert all("<img" in (index.parent / link).read_text() for link in links)
    books_there = [zipfile.ZipFile((index.parent / link).with_suffix(".epub")) for link in links]
    assert all("EPUB/picture-1.png" in book.namelist() for book in books_there)


@pytest.mark.parametrize("broken", ["out.books", "out.books/index.html", "out"])
def test_books_that_cannot_be_written_are_one_line(
    tmp_path: Path, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = new_output(tmp_path)
    illustrate_here(jobs_in(PROMPTS[0]), output)

    def run(options: argparse.Namespace, failpoint: failpoints.FailpointHook) -> Report:
        books.write_books(output.sink, model="fake")
        raise AssertionError("the books are written")

    if broken == "out":  # what shall be read
        (part,) = (tmp_path / "out").glob("part-*")
        part.write_bytes(b"cut")
    elif broken == "out.books":
        (tmp_path / broken).touch()
    else:
        (tmp_path / broken).mkdir(parents=True)
    assert run_command(run, argparse.Namespace()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: folder {tmp_path}/out.books cannot be written (")


@pytest.mark.parametrize(
    ("left", "error"),
    [
        (None, "its picture file is gone"),
        (b"", "its picture file is gone"),
        (b"\x89PNG", "its picture file is damaged"),
    ],
)
def test_a_book_says_what_became_of_a_kept_picture(tmp_path: Path, left: bytes | None, error: str) -> None:
    output = Output.at(str(tmp_path / "out"), STORY_SCHEMA, {}, keeps_pictures=True)
    illustrate_here(jobs_in(PROMPTS[0]), output)
    (row,) = read_output(tmp_path).values()
    kept = Path(row["pages"][1]["uri"])
    kept.unlink() if left is None else kept.write_bytes(left)
    pages = books.to_story(row, output.sink, model="fake").pages
    assert [page.picture is not None for page in pages] == [True, False, True]
    assert [page.error for page in pages] == [None, error, None]
    index = Path(books.write_books(output.sink, model="fake"))
    (book,) = {*index.parent.glob("*.html")} - {index}
    assert f"This page has no picture: <bdi>{error}</bdi>" in book.read_text()


def test_every_point_at_which_a_job_can_be_killed_is_reached(tmp_path: Path) -> None:
    reached: set[str] = set()
    for _ in range(2):
        output = new_output(tmp_path)
        output.failpoint = output.sink._failpoint = reached.add
        options = {"store": output.store, "watch": Monitor(), "failpoint": reached.add}

        def make_pages(jobs: list[StoryJob], report: Report, options: dict[str, object] = options) -> Iterator[Row]:
            write = Write(FakeGenerator, CONFIG.sampling, **options)  # type: ignore[arg-type]
            for row in write.write(jobs[0]):
                yield Draw(FakeDecoder, **options).draw(row) if row["page"] else row  # type: ignore[arg-type]
            raise RuntimeError("the cluster is gone")

        with pytest.raises(RuntimeError):
            illustrate.illustrate(jobs_in(PROMPTS[0], PROMPTS[1]), output, make_pages=make_pages)
    assert reached == set(failpoints.POINTS)


def test_a_point_kills_once_and_an_unknown_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from batch_jobs import failpoints; failpoints.from_environment()('mid-text'); print('lives')"
    environment = {**os.environ, failpoints.VARIABLE: f"mid-text:{tmp_path / 'marker'}", "PYTHONPATH": str(ROOT)}
    runs = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True) for _ in range(2)
    ]
    assert (runs[0].returncode, runs[0].stdout) == (-9, "")
    assert (runs[1].returncode, runs[1].stdout) == (0, "lives\n")
    monkeypatch.setenv(failpoints.VARIABLE, "nowhere:x")
    with pytest.raises(ValueError, match="nowhere:x"):
        failpoints.from_environment()


def test_too_many_errors_end_the_run(tmp_path: Path) -> None:
    rows = jobs_in(*[{"prompt": "", "id": number} for number in range(5)], {"prompt": "a fox"})
    report = illustrate.illustrate(rows, new_output(tmp_path), make_pages=refuse, max_errors=2)
    assert report.stopped_at == 3
    assert len(read_output(tmp_path)) == 3
    assert illustrate_here(rows, new_output(tmp_path)).skipped == 3


def test_an_output_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        Output.at(str(tmp_path / "file"), STORY_SCHEMA, {})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "part-1.parquet").write_text("not parquet")
    with pytest.raises(StorageError, match="cannot be read"):
        illustrate_here(jobs_in(PROMPTS[0]), new_output(tmp_path))


def test_the_report_says_what_was_made_and_what_is_left() -> None:
    report = Report(rows=10, skipped=2, seconds=20.0)
    for _ in range(4):
        report.add({"error": None, "pages": [{"has_picture": True}]})
    assert report.progress() == "6 of 10 rows, 0 errors, 4 pictures, 0:20, about 0:20 left"
    monitor = Monitor()
    monitor.starting("decoder", "one")
    monitor.enter("decoder", "fox/1")
    monitor.leave("decoder", "fox/1", "life", 3.0, 2.0)
    report.figures = monitor.figures()
    report.figures.pools["decoder"].first_s, report.figures.pools["decoder"].last_s = 10.0, 14.0
    assert "decoder: 1 engines, 75% busy, 0 deaths, 0.500 core-seconds a page" in str(report)


def test_errors_are_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = illustrate.main(["rows.jsonl", "--output", str(tmp_path / "out"), "--model", str(tmp_path)])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ") and "no config.json" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.cluster
@pytest.mark.slow
def test_stages_on_ray_give_the_same_data_set(tmp_path: Path) -> None:
    output = new_output(tmp_path / "ray")
    engines = Engines(generator=Pool(load=FakeGenerator), decoder=Pool(load=FakeDecoder, min_engines=2, max_engines=2))
    make_pages = partial(make_pages_on_ray, config=CONFIG, engines=engines, output=output)
    was_up = ray.is_initialized()
    try:
        report = illustrate.illustrate(jobs_in(*PROMPTS), output, make_pages=make_pages)
    finally:
        if not was_up:
            ray.shutdown()
    assert (report.errors, report.pictures) == (4, 12)
    check_output(tmp_path / "ray")
    assert report.figures.pools["decoder"].rows == 13 and 0 < report.figures.pools["decoder"].utilisation() <= 1
    illustrate_here(jobs_in(*PROMPTS), new_output(tmp_path / "here"))
    found, expected = read_output(tmp_path / "ray"), read_output(tmp_path / "here")
    assert found.keys() == expected.keys()
    assert all(found[id]["pages"] == expected[id]["pages"] for id in found)


@pytest.mark.cluster
@pytest.mark.timeout(400)
@pytest.mark.skipif(not (default_model_folder() / "config.json").exists(), reason=NO_MODEL)
def test_the_shipped_model_illustrates_a_file_as_a_submitted_job(tmp_path: Path, cluster: Cluster) -> None:
    rows = [{"id": "fox", "prompt": "A fox who finds a balloon", "pages": 2, "seed": 7, "steps": 2}, {"prompt": ""}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["-m", "batch_jobs.illustrate", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out")]
    command += ["--model", str(default_model_folder())]
    job = cluster.submit(*command)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "2 rows, 0 already there, 1 errors (1 input), 2 pictures" in job.stdout
    files = set((tmp_path / "out").iterdir())
    again = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=cluster.environment, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "2 rows, 2 already there, 0 errors" in again.stdout
    assert set((tmp_path / "out").iterdir()) == files

    from minigpt5 import MiniGPT5

    model = MiniGPT5.from_pretrained(default_model_folder())
    draw = model.config.draw_settings({"steps": 2})
    story = model.write("A fox who finds a balloon", pages=2, seed=7, draw=draw)
    found = read_output(tmp_path)["fox"]["pages"]
    assert [page["text"] for page in found] == [page.text for page in story.pages]
    assert largest_difference([page["png"] for page in found], [p.picture.png for p in story.pages if p.picture]) <= 1


def largest_difference(found: list[bytes], expected: list[bytes]) -> int:
    """In levels of a pixel."""
    assert len(found) == len(expected)
    pixels = [[np.array(Image.open(io.BytesIO(png))).astype(int) for png in pngs] for pngs in (found, expected)]
    return max(int(np.abs(one - other).max()) for one, other in zip(*pixels, strict=True))
