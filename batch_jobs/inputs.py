"""An input file -> jobs: rows checked one by one, so that a bad row costs itself and never its neighbours.

JSON lines, CSV and parquet with the columns `prompt` and, if wanted, `id`, `pages`, `seed`, `steps`, `guidance_scale`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pyarrow import ArrowException, fs, parquet

from minigpt5.errors import InvalidRequest, StorageError
from minigpt5.types import MAX_PAGES, DrawSettings

COLUMNS = ("id", "prompt", "pages", "seed", "steps", "guidance_scale")
DEFAULT_PAGES = 4
MAX_SEED = 2**63 - 1
MAX_ID_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class StoryJob:
    """One story to write, every default filled in.

    Example: StoryJob(row=1, id="fox", prompt="A fox ...", pages=4, seed=7, steps=20, guidance_scale=3.0)
    """

    row: int
    """Of the input, from 1."""
    id: str
    prompt: str
    pages: int
    seed: int
    steps: int
    guidance_scale: float


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """An input row that cannot become a story, and why."""

    row: int
    id: str
    prompt: str
    error: str


@dataclass(frozen=True, kw_only=True)
class RawRow:
    """An input row as it stands in the file. An unreadable one has its text and the reason."""

    values: dict[str, object]
    unreadable: str = ""
    reason: str = ""


def read_rows(uri: str) -> Iterator[RawRow]:
    """The rows of a file; its name says the format. Raises StorageError where the file itself cannot be read."""
    readers = {".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}
    reader = next((reader for ending, reader in readers.items() if uri.lower().endswith(ending)), None)
    if reader is None:
        raise StorageError(f"{uri} has an unknown format: name a file that ends in {', '.join(readers)}")
    try:
        filesystem, path = open_uri(uri)
        with filesystem.open_input_file(path) as file:
            yield from reader(file)
    except (OSError, ArrowException, csv.Error) as error:
        raise StorageError(f"{uri} cannot be read ({error}): check its name, format and permissions") from error


def check_rows(raw_rows: Iterable[RawRow], *, draw: DrawSettings) -> Iterator[StoryJob | BadRow]:
    """A job or a bad row for each row, with ids that are unique. `draw` fills in what a row leaves out.

    A row without an id gets one from its content; a row whose id an earlier row has becomes a bad row.
    """
    first_row_of: dict[str, int] = {}
    for number, raw in enumerate(raw_rows, start=1):
        checked = check_row(raw, row=number, draw=draw)
        first = first_row_of.setdefault(checked.id, number)
        if first != number:
            reason = (
                f"the row is the same as row {first}: give it a seed or an id of its own"
                if _is_left_out(raw.values.get("id"))
                else f"id {checked.id!r} is already that of row {first}: give each row its own"
            )
            checked = BadRow(row=number, id=f"{checked.id}#{number}", prompt=checked.prompt, error=reason)
            first_row_of.setdefault(checked.id, number)
        yield checked


def check_row(raw: RawRow, *, row: int, draw: DrawSettings) -> StoryJob | BadRow:
    """One row, without a look at the others."""
    content = raw.unreadable or json.dumps(raw.values, sort_keys=True, default=str)
    values = {column: None if _is_left_out(raw.values.get(column)) else raw.values[column] for column in COLUMNS}
    prompt = values["prompt"] if isinstance(values["prompt"], str) else ""
    row_id = _id(values["id"]) or _digest(content).hex()[:16]
    bad = BadRow(row=row, id=row_id, prompt=prompt.encode(errors="replace").decode(), error="")
    if raw.unreadable:
        return replace(bad, error=f"row {row} is unreadable ({raw.reason})")
    try:
        if values["id"] is not None and not _id(values["id"]):
            raise InvalidRequest(
                "id",
                f"id is {values['id']!r:.80} but must be a whole number or a text of at most {MAX_ID_LENGTH} letters",
            )
        if values["prompt"] is not None and not isinstance(values["prompt"], str):
            raise InvalidRequest("prompt", f"prompt is {values['prompt']!r:.80} but must be a text")
        if not prompt.strip():
            raise InvalidRequest("prompt", "prompt is empty: say what the story is about")
        if prompt != bad.prompt:
            raise InvalidRequest("prompt", "prompt holds half of a surrogate pair: write it as UTF-8")
        return StoryJob(
            row=row,
            id=row_id,
            prompt=prompt,
            pages=_whole("pages", values["pages"], DEFAULT_PAGES, low=1, high=MAX_PAGES),
            seed=_whole("seed", values["seed"], prompt_seed(prompt), low=0, high=MAX_SEED),
            steps=_whole("steps", values["steps"], draw.steps, low=1, high=100),
            guidance_scale=_number("guidance_scale", values["guidance_scale"], draw.guidance_scale, low=1, high=20),
        )
    except InvalidRequest as error:
        return replace(bad, error=str(error))


def prompt_seed(prompt: str) -> int:
    """The seed of a row that names none: the same prompt, the same story, in every run and every row order."""
    return int.from_bytes(_digest(prompt)[:4], "big") >> 1


def open_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """A local path or any URI that pyarrow knows -> its file system and the path there."""
    if "://" in uri:
        try:
            filesystem, path = fs.FileSystem.from_uri(uri)
        except (OSError, ArrowException) as error:
            raise StorageError(f"{uri} is no place that can be used ({error}): name a folder or a URI") from error
        return filesystem, path
    return fs.LocalFileSystem(), str(Path(uri).expanduser().resolve())


def _json_lines(file: io.BufferedIOBase) -> Iterator[RawRow]:
    for line in io.BufferedReader(file):
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8-sig"))
            if not isinstance(values, dict):
                raise ValueError(f"it holds a {type(values).__name__}, not an object")
        except (ValueError, RecursionError) as error:
            yield RawRow(values={}, unreadable=line.decode(errors="replace"), reason=str(error))
        else:
            yield RawRow(values=values)


def _csv_rows(file: io.BufferedIOBase) -> Iterator[RawRow]:
    csv.field_size_limit(2**31 - 1)  # a very long prompt is refused by its row, not by the reader
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")  # type: ignore[type-var]
    for values in csv.DictReader(text):
        extra = values.pop(None, None)
        if extra:
            yield RawRow(values={}, unreadable=repr([values, extra]), reason="it has more fields than the heading")
        else:
            yield RawRow(values=dict(values))


def _parquet_rows(file: io.BufferedIOBase) -> Iterator[RawRow]:
    for batch in parquet.ParquetFile(file).iter_batches():
        yield from (RawRow(values=values) for values in batch.to_pylist())


def _is_left_out(value: object) -> bool:
    """Nothing in JSON, an empty text in CSV, NaN in parquet files that pandas wrote."""
    return value is None or value == "" or value != value


def _id(value: object) -> str:
    """An id as text; empty where there is none that can be used."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    text = str(value).strip().encode(errors="replace").decode()
    return text if len(text) <= MAX_ID_LENGTH else ""


def _whole(field: str, value: object, default: int, *, low: int, high: int) -> int:
    number = _number(field, value, default, low=low, high=high)
    if number != int(number):
        raise InvalidRequest(field, f"{field} is {value!r} but must be a whole number from {low} to {high}")
    return int(number)


def _number(field: str, value: object, default: float, *, low: int, high: int) -> float:
    """A number in its range; CSV brings it as text."""
    if value is None:
        return default
    try:
        if isinstance(value, bool):
            raise ValueError
        digits = str(value).strip()
        number: float = int(digits) if digits.isdigit() else float(digits)
    except ValueError:
        raise InvalidRequest(field, f"{field} is {value!r:.80} but must be a number from {low} to {high}") from None
    if not low <= number <= high:
        raise InvalidRequest(field, f"{field} is {value!r:.80} but must be from {low} to {high}")
    return number


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()
