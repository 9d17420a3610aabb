"""Pictures become captions, stored vokens become new pictures; what holds for stories holds for these jobs, too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from pyarrow import dataset, parquet

from batch_jobs import describe, illustrate, prepare, redraw
from batch_jobs.describe import QUESTION
from batch_jobs.inputs import MAX_SEED, BadRow, ImageJob, RawRow, check_image_rows, check_seed
from batch_jobs.job import Output, work
from batch_jobs.monitor import Monitor
from batch_jobs.outputs import DESCRIPTION_SCHEMA, STORY_SCHEMA, Gathered
from batch_jobs.pipeline import Limits, Pool
from batch_jobs.report import Report
from batch_jobs.stages import CLOSING_PAGE, Row, Tell, as_table
from minigpt5.config import storybook
from minigpt5.errors import MiniGPT5Error, StorageError
from minigpt5.pipeline import DESCRIBE
from minigpt5.story.stream import page_seed
from minigpt5.types import DrawSettings
from tests.batch_jobs.test_illustrate import PROMPTS, illustrate_here, new_output, read_output
from tests.helpers.batch_fakes import FINGERPRINT, FakeDecoder, FakeGenerator, jobs_in
from tests.helpers.fakes import make_png

CONFIG = storybook()
SETTINGS = DrawSettings(steps=3, guidance_scale=2.0, scheduler=CONFIG.draw.scheduler)


def check_images(*rows: dict[str, object]) -> list[ImageJob | BadRow]:
    return list(check_image_rows((RawRow(values=row) for row in rows), question=QUESTION))


def image_rows(folder: Path) -> list[ImageJob | BadRow]:
    (folder / "fox.png").write_bytes(make_png())
    return check_images(
        {"id": "file", "image": str(folder / "fox.png")},
        {"id": "bytes", "image": make_png(), "question": "Who is this?"},
        {"id": "missing", "image": str(folder / "owl.png")},
        {"id": "none"},
    )


@pytest.mark.parametrize("field", ["image", "question"])
def test_a_row_that_is_no_text_is_a_bad_row(field: str) -> None:
    (row,) = check_images({"id": "fox", "image": "fox.png", field: "half \ud83e"})
    assert isinstance(row, BadRow) and row.error.startswith(f"{field} 'half \\ud83e' holds half of a surrogate pair")


def test_the_question_is_the_one_of_training() -> None:
    assert QUESTION == DESCRIBE


def check_captions(folder: Path) -> None:
    rows = {row["id"]: row for row in dataset.dataset(folder / "out").to_table().to_pylist()}
    assert rows["file"]["caption"] == f"Page 1 of {QUESTION}, 0." and rows["file"]["image"].endswith("fox.png")
    assert rows["bytes"]["caption"] == "Page 1 of Who is this?, 0." and rows["bytes"]["image"] is None
    assert "owl.png cannot be read" in rows["missing"]["error"] and rows["missing"]["caption"] is None
    assert rows["none"]["error"].startswith("image is None but must be")
    assert rows["file"]["timings"]["describe_s"] > 0


def test_pictures_become_captions_and_bad_ones_errors(tmp_path: Path) -> None:
    tell = Tell(FakeGenerator, CONFIG.sampling, watch=Monitor())

    def make(rows: list[ImageJob | BadRow], report: Report) -> Iterator[Row]:
        for row in rows:
            if isinstance(row, BadRow):
                yield {"id": row.id, "error": row.error, "kind": "input", "timings": {"describe_s": 0.0}}
            else:
                (told,) = [told for table in tell(as_table([row])) for told in table.to_pylist()]
                yield {**told, "timings": {"describe_s": told["seconds"]}}

    output = Output.at(str(tmp_path / "out"), DESCRIPTION_SCHEMA, {"job": "describe"})
    report = work(image_rows(tmp_path), output, make)
    assert (report.rows, report.stories, report.kinds) == (4, 2, {"input": 2})
    check_captions(tmp_path)


def test_stored_vokens_keep_their_text_and_take_the_new_settings(tmp_path: Path) -> None:
    illustrate_here(jobs_in(*PROMPTS), new_output(tmp_path))
    stories = {row["id"]: row for row in read_output(tmp_path).values()}
    ids = frozenset(stories)
    fetch = redraw.Fetch(uri=str(tmp_path / "out"), ids=ids, settings=SETTINGS, seed=None)
    files = pa.table({"path": redraw.parts(str(tmp_path / "out"))})
    pages = [row for table in fetch.tables(files) for row in table.to_pylist()]
    fox = [page for page in pages if page["id"] == "fox"]
    assert [page["page"] for page in fox] == [1, 2, 3, 0]
    assert [page["text"] for page in fox[:3]] == [page["text"] for page in stories["fox"]["pages"]]
    assert [page["seed"] for page in fox[:3]] == [page_seed(7, number) for number in (1, 2, 3)]
    assert (fox[0]["steps"], fox[0]["guidance_scale"]) == (3, 2.0)
    errors = {page["id"]: page["error"] for page in pages if not page["page"]}
    assert sum(error is not None for error in errors.values()) == 3, "that of a picture is not the story's for ever"
    other = redraw.Fetch(uri=str(tmp_path / "out"), ids=frozenset(["fox"]), settings=SETTINGS, seed=9)
    (first, *_) = [row for table in other.tables(files) for row in table.to_pylist()]
    assert first["seed"] == page_seed(9, 1)


def test_an_error_of_a_picture_is_told_by_its_kind_not_by_its_words(tmp_path: Path) -> None:
    """A text may fail with the words that a picture's error has."""
    page = {"index": 1, "text": "One.", "vokens": b"", "seed": 1, "error": None}
    says_picture = {"id": "a", "pages": [page], "error": "writing failed: page 1 has no picture: ink"}
    fetch = redraw.Fetch(uri="", ids=frozenset("a"), settings=SETTINGS, seed=None)
    kept = list(fetch.pages({**says_picture, "kind": "writing"}))[-1]
    assert kept["error"] == says_picture["error"] and kept["kind"] == "earlier job"
    for kind in ("drawing", "decoder deaths"):
        assert list(fetch.pages({**says_picture, "kind": kind}))[-1]["error"] is None


def test_a_data_set_without_kinds_of_errors_is_drawn_again_too(tmp_path: Path) -> None:
    illustrate_here(jobs_in(*PROMPTS), new_output(tmp_path))
    (path,) = (tmp_path / "out").glob("part-*")
    parquet.write_table(parquet.read_table(path).drop_columns("kind"), path)
    ids = frozenset(read_output(tmp_path))
    fetch = redraw.Fetch(uri=str(tmp_path / "out"), ids=ids, settings=SETTINGS, seed=None)
    files = pa.table({"path": redraw.parts(str(tmp_path / "out"))})
    closing = [row for table in fetch.tables(files) for row in table.to_pylist() if not row["page"]]
    assert sum(row["error"] is not None for row in closing) == 3


def test_stories_of_another_model_and_of_no_job_are_refused(tmp_path: Path) -> None:
    illustrate_here(jobs_in(PROMPTS[0]), new_output(tmp_path))
    (story,) = redraw.read_stories(str(tmp_path / "out"), fingerprint=FINGERPRINT)
    assert (story.id, story.seed) == ("fox", 7)
    # "fak" stands in the header too, but is not the fingerprint there
    for other in ("other", FINGERPRINT[:-1]):
        with pytest.raises(MiniGPT5Error, match="another model's"):
            list(redraw.read_stories(str(tmp_path / "out"), fingerprint=other))
    with pytest.raises(StorageError, match="holds no stories"):
        redraw.parts(str(tmp_path))


def replace_in(path: Path, change: Callable[[list[Row]], list[Row]]) -> None:
    """Write a file of a data set again with other rows."""
    table = parquet.read_table(path)
    parquet.write_table(pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema), path)


def with_pages(name: str, value: object) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [{**row, "pages": [{**page, name: value} for page in row["pages"]]} for row in rows]


@pytest.mark.parametrize(
    ("name", "one", "other"), [("text", "A red fox", "A sly cat"), ("vokens", b"1234", b"4321"), ("seed", 1, 2)]
)
def test_stories_with_another_value_of_the_same_size_are_another_input(
    tmp_path: Path, name: str, one: object, other: object
) -> None:
    illustrate_here(jobs_in(PROMPTS[0]), new_output(tmp_path))
    (path,), uri = (tmp_path / "out").glob("part-*"), str(tmp_path / "out")
    replace_in(path, with_pages(name, one))
    before = redraw.digest_of_stories(uri)
    assert redraw.digest_of_stories((tmp_path / "out").as_uri()) == before
    replace_in(path, with_pages(name, other))
    assert redraw.digest_of_stories(uri) != before
    replace_in(path, with_pages(name, one))
    replace_in(path, with_pages("png", b"a picture, which is not read"))
    assert redraw.digest_of_stories(uri) == before


def test_a_data_set_with_two_rows_of_an_id_is_refused(tmp_path: Path) -> None:
    illustrate_here(jobs_in(PROMPTS[0]), new_output(tmp_path))
    (path,) = (tmp_path / "out").glob("part-*")
    replace_in(path, lambda rows: rows * 2)
    with pytest.raises(StorageError, match="two rows with the id 'fox'"):
        list(redraw.read_stories(str(tmp_path / "out"), fingerprint=FINGERPRINT))


def test_the_commands_refuse_what_they_cannot_do_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "x.png"}))
    for main, source in ((describe.main, tmp_path / "rows.jsonl"), (redraw.main, tmp_path)):
        code = main([str(source), "--output", str(tmp_path / "out"), "--model", str(tmp_path)])
        error = capsys.readouterr().err
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert (
        describe.main([str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out"), "--question", "o\udcf9 ?"]) == 2
    )
    assert capsys.readouterr().err.startswith("error: --question 'o\\udcf9 ?' holds")
    with pytest.raises(SystemExit):
        illustrate.make_parser().parse_args(["x.jsonl", "--output", "y", "--decoders", "3:1"])
    assert illustrate.make_parser().parse_args(["x", "--output", "y", "--decoders", "1:3"]).decoders == (1, 3)


@pytest.mark.parametrize("seed", [-1, 2**63])
@pytest.mark.parametrize(("main", "source"), [(redraw.main, "stories"), (prepare.main, "storybook:story")])
def test_a_seed_that_cannot_be_stored_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], source: str, seed: int
) -> None:
    assert main([source, "--output", str(tmp_path / "out"), "--seed", str(seed)]) == 2
    assert capsys.readouterr().err == f"error: --seed is {seed} but must be from 0 to {2**63 - 1}\n"
    assert not list(tmp_path.iterdir())


def test_the_greatest_seed_can_be_stored(tmp_path: Path) -> None:
    check_seed(MAX_SEED)
    check_seed(None)
    output = new_output(tmp_path)
    gathered = Gathered("fox", "a fox", MAX_SEED)
    gathered.add({"page": CLOSING_PAGE, "num_pages": 0, "seconds": 0.0, "error": None})
    output.sink.add(gathered.story())
    output.sink.flush()
    assert read_output(tmp_path)["fox"]["seed"] == MAX_SEED


@pytest.mark.parametrize("job", [illustrate, describe, redraw])
def test_the_commands_refuse_a_folder_that_was_changed_since_they_began(
    tmp_path: Path, job: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: Any) -> None:
        raise MiniGPT5Error("no cluster")

    monkeypatch.setattr(job, "check_model", lambda folder: (folder, CONFIG))
    monkeypatch.setattr(job, "connect", connect)
    (tmp_path / "in").mkdir()
    said = []
    for prompt in ("A red fox", "A red fox", "A sly cat"):
        if job is redraw:
            row: Row = {"id": "fox", "prompt": prompt, "seed": 1, "pages": []}
            parquet.write_table(pa.Table.from_pylist([row], schema=STORY_SCHEMA), tmp_path / "in" / "part-1.parquet")
        else:
            (tmp_path / "in" / "a.jsonl").write_text(json.dumps({"prompt": prompt, "image": f"{prompt}.png"}))
        assert job.main([str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 2
        said.append(capsys.readouterr().err.splitlines()[-1])
    assert said[:2] == ["error: no cluster"] * 2 and "other settings (input_sha256 is" in said[2]


@pytest.mark.cluster
@pytest.mark.slow
def test_both_jobs_run_on_ray(tmp_path: Path) -> None:
    illustrate_here(jobs_in(*PROMPTS), new_output(tmp_path / "stories"))
    uri, was_up = str(tmp_path / "stories" / "out"), ray.is_initialized()
    drawn = Output.at(str(tmp_path / "drawn" / "out"), STORY_SCHEMA, {"job": "redraw"})
    told = Output.at(str(tmp_path / "out"), DESCRIPTION_SCHEMA, {"job": "describe"})
    make_pictures = partial(
        redraw.redraw,
        uri=uri,
        settings=SETTINGS,
        seed=5,
        consistency="off",
        pool=Pool(load=FakeDecoder),
        limits=Limits(),
        output=drawn,
    )
    make_captions = partial(describe.describe, config=CONFIG, pool=Pool(load=FakeGenerator), limits=Limits())
    try:
        report = work(redraw.read_stories(uri, fingerprint=FINGERPRINT), drawn, make_pictures)
        work(image_rows(tmp_path), told, make_captions)
    finally:
        if not was_up:
            ray.shutdown()
    assert (report.rows, report.pictures) == (7, 12)
    before, after = read_output(tmp_path / "stories"), read_output(tmp_path / "drawn")
    for id, story in after.items():
        assert [page["text"] for page in story["pages"]] == [page["text"] for page in before[id]["pages"]]
    assert after["fox"]["seed"] == 5 and after["fox"]["pages"][0]["png"] != before["fox"]["pages"][0]["png"]
    check_captions(tmp_path)
