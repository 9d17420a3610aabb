"""Input files as people send them: what is wrong with a row costs the row, what is wrong with a file ends the job
before it writes anything."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs, parquet

from batch_jobs import illustrate
from batch_jobs.inputs import COLUMNS, BadRow, RawRow, StoryJob, check_rows, digest_of, earlier_plan, read_rows
from batch_jobs.job import Output, read_table
from batch_jobs.outputs import STORY_SCHEMA
from batch_jobs.report import Report
from batch_jobs.state import JobState
from minigpt5.config import storybook
from minigpt5.errors import MiniGPT5Error, StorageError
from tests.helpers.batch_fakes import jobs_in
from tests.helpers.flaky_files import FlakyFiles

CONFIG = storybook()
FOX: dict[str, object] = {"id": "1", "prompt": "a fox"}
OWL: dict[str, object] = {"id": "2", "prompt": "an owl"}
JSONL = json.dumps(FOX) + "\n" + json.dumps(OWL) + "\n"
CSV = "id,prompt\n1,a fox\n2,an owl\n"


def table(uri: Path | str) -> list[RawRow]:
    return read_table(str(uri), known=COLUMNS, needed=("prompt", "pages_text"))


def read(folder: Path, name: str, content: bytes | str) -> list[StoryJob | BadRow]:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(check_rows(table(folder / name), CONFIG))


def error_of(row: StoryJob | BadRow) -> str:
    assert isinstance(row, BadRow), row
    return row.error


# What does not matter


@pytest.mark.parametrize(("name", "text"), [("rows.jsonl", JSONL), ("rows.csv", CSV)])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: text.replace("\n", "\n\n"),
        lambda text: text.rstrip("\n"),
    ],
    ids=["byte-order mark", "CR LF", "CR", "blank lines", "no last line end"],
)
def test_marks_and_line_ends_do_not_matter(tmp_path: Path, name: str, text: str, change: Callable[[str], str]) -> None:
    assert read(tmp_path, name, change(text)) == jobs_in(FOX, OWL)


def test_line_separators_inside_a_prompt_do_not_end_its_row(tmp_path: Path) -> None:
    row = {"id": "1", "prompt": "a fox\u2028an owl\u2029a cat\x85a dog\x0ca cow"}
    assert read(tmp_path, "rows.jsonl", json.dumps(row, ensure_ascii=False)) == jobs_in(row)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl"])
def test_gzip_is_read_whatever_the_name_says(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, name, gzip.compress(JSONL.encode())) == jobs_in(FOX, OWL)


def test_a_gzipped_csv_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert read(tmp_path, "rows.csv.gz", gzip.compress(codecs.BOM_UTF8 + CSV.encode())) == jobs_in(FOX, OWL)


def test_a_folder_of_mixed_formats_is_read_in_order_of_name(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "1.csv").write_text(CSV)
    (folder / "2.jsonl.gz").write_bytes(gzip.compress(b'{"id": "3", "prompt": "a cat"}'))
    parquet.write_table(pa.Table.from_pylist([{"id": "4", "prompt": "a dog"}]), folder / "3.parquet")
    (folder / "_SUCCESS").touch()
    (folder / ".1.csv.crc").write_bytes(b"crc")
    rows = list(check_rows(table(folder), CONFIG))
    assert [(row.row, row.id) for row in rows] == [(1, "1"), (2, "2"), (3, "3"), (4, "4")]
    assert list(read_rows(folder.as_uri())) == table(folder)
    (folder / "notes.docx").touch()
    with pytest.raises(StorageError, match=r"notes\.docx has an unknown format"):
        table(folder)


# What is wrong with a row


def test_a_line_of_another_encoding_costs_its_row(tmp_path: Path) -> None:
    jsonl = JSONL.encode() + '{"prompt": "ein Bär"}\n'.encode("latin-1") + b'{"prompt": "a cat"}'
    fox, owl, bear, cat = read(tmp_path, "rows.jsonl", jsonl)
    assert "row 3 is unreadable (it is not UTF-8" in error_of(bear)
    assert isinstance(fox, StoryJob) and isinstance(cat, StoryJob)
    fox, owl, bear, cat = read(tmp_path, "rows.csv", CSV.encode() + "3,ein Bär\n".encode("latin-1") + b"4,a cat\n")
    assert "row 3 is unreadable (it is not UTF-8" in error_of(bear) and isinstance(cat, StoryJob)


def test_a_line_without_end_costs_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batch_jobs.text_files.MAX_LINE", 1000)
    monkeypatch.setattr("batch_jobs.text_files.BUFFER_BYTES", 64)
    long = json.dumps({"prompt": "x" * 5000})
    fox, bad, owl = read(tmp_path, "rows.jsonl", f"{json.dumps(FOX)}\n{long}\n{json.dumps(OWL)}\n")
    assert "row 2 is unreadable (it is longer than 1000 characters)" in error_of(bad)
    assert [fox, owl] == [jobs_in(FOX)[0], StoryJob(**{**vars(jobs_in(OWL)[0]), "row": 3})]


@pytest.mark.parametrize("cell", ["[" * 100_000, '[{"a": ' * 50_000])
def test_deep_json_in_a_csv_cell_costs_its_row(tmp_path: Path, cell: str) -> None:
    quoted = cell.replace('"', '""')
    bad, fox = read(tmp_path, "rows.csv", f'prompt,pages_text\n,"{quoted}"\na fox,\n')
    assert "must be a list of texts" in error_of(bad) and isinstance(fox, StoryJob)
    bad, fox = read(tmp_path, "rows.csv", f'prompt,images\na cat,"{quoted}"\na fox,\n')
    assert isinstance(bad, StoryJob) and isinstance(fox, StoryJob), "it is taken for the name of a picture"


def test_more_fields_than_the_heading_cost_the_row_and_missing_ones_are_left_out(tmp_path: Path) -> None:
    more, fewer = read(tmp_path, "rows.csv", "id,prompt,pages\n1,a fox,2,3\n2,an owl\n")
    assert "more fields than the heading" in error_of(more)
    assert isinstance(fewer, StoryJob) and fewer.pages == 4


def test_null_prompts_and_null_rows_are_errors(tmp_path: Path) -> None:
    rows = read(tmp_path, "rows.jsonl", '{"prompt": null}\nnull\n{"prompt": NaN, "seed": 1}\n{"prompt": "a fox"}\n')
    assert [isinstance(row, StoryJob) for row in rows] == [False, False, False, True]
    assert "prompt is empty" in error_of(rows[0]) and "holds a NoneType" in error_of(rows[1])
    assert "prompt is empty" in error_of(rows[2])


def test_nan_is_a_value_that_is_left_out_but_text_in_csv(tmp_path: Path) -> None:
    (row,) = jobs_in({"id": math.nan, "prompt": "a fox", "pages": math.nan, "seed": math.nan})
    assert isinstance(row, StoryJob) and (row.pages, row.seed) == (4, jobs_in({"prompt": "a fox"})[0].seed)  # type: ignore[union-attr]
    named, numbered = read(tmp_path, "rows.csv", "prompt,pages\nNaN,1\na fox,NaN\n")
    assert isinstance(named, StoryJob) and named.prompt == "NaN"
    assert "pages is 'NaN' but must be from 1 to 64" in error_of(numbered)


LARGE = 2**53 + 1
"""The first whole number that is no float."""


def test_integers_past_2_53_as_ids_and_seeds_keep_every_digit(tmp_path: Path) -> None:
    jsonl = "\n".join(json.dumps({"id": LARGE + n, "seed": LARGE, "prompt": "a fox"}) for n in (0, 1))
    csv = f"id,seed,prompt\n{LARGE},{LARGE},a fox\n{LARGE + 1},{LARGE},a fox\n"
    parquet.write_table(
        pa.Table.from_pylist([{"id": LARGE + n, "seed": LARGE, "prompt": "a fox"} for n in (0, 1)]),
        tmp_path / "rows.parquet",
    )
    found = [read(tmp_path, "rows.jsonl", jsonl), read(tmp_path, "rows.csv", csv)]
    found.append(list(check_rows(table(tmp_path / "rows.parquet"), CONFIG)))
    for rows in found:
        assert [(row.id, row.seed) for row in rows] == [(str(LARGE), LARGE), (str(LARGE + 1), LARGE)]  # type: ignore[union-attr]


def test_decimal_ids_are_whole_numbers_while_they_have_all_digits() -> None:
    seven, large, half, endless = jobs_in(
        {"id": 7.0, "prompt": "a fox"},
        {"id": float(LARGE + 1), "prompt": "a fox"},
        {"id": 7.5, "prompt": "a fox"},
        {"id": math.inf, "prompt": "a fox"},
    )
    assert isinstance(seven, StoryJob) and seven.id == "7", "as pandas stores whole numbers beside missing ones"
    assert "may have lost digits" in error_of(large)
    assert "id is 7.5 but must be a whole number" in error_of(half)
    assert "id is inf but must be a whole number" in error_of(endless)
    (seed,) = jobs_in({"seed": float(2**60), "prompt": "a fox"})
    assert "seed is 1.152921504606847e+18 but a decimal number of this size may have lost digits" in error_of(seed)


def test_duplicate_ids_across_the_files_of_a_folder_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(JSONL)
    (tmp_path / "b.csv").write_text("id,prompt\n2,a cat\n")
    rows = list(check_rows(table(tmp_path), CONFIG))
    assert "id '2' is already that of row 2" in error_of(rows[2]) and rows[2].id == "2#3"


@pytest.mark.parametrize("place", [0, 1, 3])
def test_the_id_that_a_second_row_gets_is_no_other_rows(place: int) -> None:
    """The row that has the wanted id may come earlier or later."""
    rows: list[dict[str, object]] = [{"id": "fox", "prompt": "a fox"}, {"id": "fox", "prompt": "a second fox"}, OWL]
    number = 2 + (place < 2)  # of the second fox, once the other row is there
    rows.insert(place, {"id": f"fox#{number}", "prompt": "its own"})
    checked = jobs_in(*rows, {"id": f"fox#{number}#", "prompt": "its own, too"})
    assert jobs_in(*rows, {"id": f"fox#{number}#", "prompt": "its own, too"}) == checked, "in every run"
    assert {row.id for row in checked if isinstance(row, StoryJob)} == {"fox", f"fox#{number}", f"fox#{number}#", "2"}
    (bad,) = (row for row in checked if isinstance(row, BadRow))
    assert (bad.id, bad.row) == (f"fox#{number}##", number) and "already that of row" in bad.error


# What tells an input from others


def test_a_folder_with_another_text_of_the_same_length_is_another_input(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"prompt": "A red fox"}\n')
    (folder / "b.jsonl").write_text(JSONL)
    before = digest_of(str(folder))
    assert digest_of(folder.as_uri()) == before
    (folder / "_SUCCESS").touch()
    assert digest_of(str(folder)) == before, "it holds no rows"
    listing = earlier_plan(str(folder))
    (folder / "a.jsonl").write_text('{"prompt": "A sly cat"}\n')
    changed = digest_of(str(folder))
    assert changed != before and earlier_plan(str(folder)) == listing
    (folder / "b.jsonl").rename(folder / "0.jsonl")
    assert digest_of(str(folder)) not in (before, changed), "the rows have another order"


def test_a_folder_is_hashed_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FlakyFiles(tmp_path)
    monkeypatch.setattr("batch_jobs.inputs.open_place", lambda uri: (fs.PyFileSystem(store), uri))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(b"x" * (3 * 2**20 - 1))
    (tmp_path / "in" / "b.jsonl").write_bytes(b"x")
    digest_of("in")
    assert store.requests[-2:] == ["open in/a.jsonl", "open in/b.jsonl"] and store.num_reads >= 3 + 1


def run_over(folder: Path, output: Path, *, earlier: bool = False) -> tuple[Report, list[str]]:
    """A job whose input is a folder, as it would be asked for now or as an earlier version noted it; and its ids."""
    plan = {"job": "illustrate", "input_sha256": digest_of(str(folder))}
    plan |= earlier_plan(str(folder)) if earlier else {}
    place = Output.at(str(output), STORY_SCHEMA, plan, earlier=earlier_plan(str(folder)))
    asked: list[str] = []

    def stop_at(jobs: list[StoryJob], report: Report) -> tuple[()]:
        asked.extend(job.prompt for job in jobs)
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        return illustrate.illustrate(check_rows(table(folder), CONFIG), place, make_pages=stop_at), asked
    return Report(), asked


def test_a_begun_job_refuses_a_folder_with_another_text_of_the_same_length(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"prompt": "A red fox"}\n')
    assert run_over(folder, tmp_path / "out")[1] == run_over(folder, tmp_path / "out")[1] == ["A red fox"]
    (folder / "a.jsonl").write_text('{"prompt": "A sly cat"}\n')
    with pytest.raises(MiniGPT5Error, match="input_sha256 is"):
        run_over(folder, tmp_path / "out")


def test_a_job_over_a_folder_that_an_earlier_version_began_goes_on_and_is_noted_as_now(tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"prompt": "A red fox"}\n')
    run_over(folder, output, earlier=True)
    noted = JobState(str(output)).manifest() or {}
    assert noted["plan"] == {"job": "illustrate", **earlier_plan(str(folder))}
    assert run_over(folder, output)[1] == ["A red fox"]
    noted = JobState(str(output)).manifest() or {}
    assert noted["plan"]["input_sha256"] == digest_of(str(folder))
    (folder / "a.jsonl").write_text('{"prompt": "A sly cat"}\n')
    with pytest.raises(MiniGPT5Error, match="input_sha256 is"):
        run_over(folder, output)


# What is wrong with a file

UNCLOSED = 'id,prompt\n1,a fox\n2,"an owl\n3,a cat\n4,a dog\n'
FAULTS: dict[str, tuple[str, bytes, str]] = {
    "unclosed quote": (
        "rows.csv",
        UNCLOSED.encode(),
        r"rows\.csv is not CSV from line 3 on \(unexpected end of data\)",
    ),
    "text behind a quote": ("rows.csv", b'id,prompt\n1,"a" fox\n2,b\n', r"is not CSV from line 2 on \("),
    "unclosed quote that a later one closes": ("rows.csv", b'id,prompt\n1,"a fox\n2,"an owl"\n', "from line 2 on"),
    "column twice": ("rows.csv", b"prompt,prompt\na,b\n", "has the column 'prompt' twice"),
    "no heading": ("rows.csv", b"1,a fox\n2,an owl\n", r"has the columns '1', 'a fox' and no prompt or pages_text"),
    "semicolons": ("rows.csv", b"id;prompt\n1;a fox\n", r"has the columns 'id;prompt' and no prompt.*commas"),
    "missing column in JSON": ("rows.jsonl", b'{"text": "a fox"}\n', r"has the columns 'text' and no prompt"),
    "empty JSON lines": ("rows.jsonl", b"", "has no rows"),
    "blank JSON lines": ("rows.jsonl", b"\n \n", "has no rows"),
    "empty CSV": ("rows.csv", b"", "has no rows"),
    "heading without rows": ("rows.csv", b"id,prompt\n", "has no rows"),
    "empty parquet": ("rows.parquet", b"", r"rows\.parquet cannot be read"),
    "empty gzip": ("rows.jsonl.gz", gzip.compress(b""), "has no rows"),
    "gzip that ends early": ("rows.jsonl.gz", gzip.compress(JSONL.encode())[:-9], "ends early"),
    "gzipped CSV that ends early": ("rows.csv.gz", gzip.compress(CSV.encode())[:-9], "cannot be read"),
    "damaged gzip": ("rows.jsonl.gz", gzip.compress(JSONL.encode())[:12] + b"\0" * 40, "ends early|cannot be read"),
    "UTF-16": ("rows.jsonl", JSONL.encode("utf-16"), r"rows\.jsonl is in UTF-16: save it in UTF-8"),
    "UTF-16 without a mark": ("rows.jsonl", JSONL.encode("utf-16-le"), "is in UTF-16"),
    "UTF-16 big-endian": ("rows.csv", codecs.BOM_UTF16_BE + CSV.encode("utf-16-be"), "is in UTF-16"),
    "UTF-32": ("rows.csv", CSV.encode("utf-32"), "is in UTF-32"),
    "gzipped UTF-16": ("rows.csv.gz", gzip.compress(CSV.encode("utf-16")), "is in UTF-16"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_with_a_fault_is_named(tmp_path: Path, fault: str) -> None:
    name, content, complaint = FAULTS[fault]
    with pytest.raises(StorageError, match=complaint):
        read(tmp_path, name, content)


def test_an_unclosed_quote_ends_the_job_before_it_writes_and_leaves_the_output_free(tmp_path: Path) -> None:
    def run(text: str) -> Report:
        path = tmp_path / "rows.csv"
        path.write_text(text)
        output = Output.at(str(tmp_path / "out"), STORY_SCHEMA, {"input": text})
        rows = (row for row in check_rows(table(path), CONFIG))
        return illustrate.illustrate(rows, output, make_pages=lambda jobs, report: ())

    with pytest.raises(StorageError, match="line 3"):
        run(UNCLOSED)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["rows.csv"]
    assert run(UNCLOSED.replace('"', "")).rows == 4


def test_the_command_ends_with_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise AssertionError("nothing is started")

    monkeypatch.setattr(illustrate, "check_model", lambda folder: (folder, CONFIG))
    monkeypatch.setattr(illustrate, "connect", stop)
    (tmp_path / "rows.csv").write_text(UNCLOSED)
    assert illustrate.main([str(tmp_path / "rows.csv"), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "line 3" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["rows.csv"]
