"""An input file -> jobs: rows checked one by one, so that a bad row costs itself and never its neighbours.

JSON lines, CSV and parquet, the first two also gzipped, or a folder of them. A story has a `prompt`, or the
`pages_text` of a finished one (a list; in CSV a JSON list), or both, and if wanted `id`, `pages`, `seed`, `images`
(that the prompt shows), `steps`, `guidance_scale`, `width`, `height`, `style`, `consistency`. A picture to describe has
an `image` and, if wanted, `id` and `question`. A picture is a path, a URI, a data URL, or bytes in parquet.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeGuard, TypeVar, cast, get_args

from pyarrow import ArrowException, fs, parquet

from batch_jobs.text_files import CUT, MAX_LINE, check_utf8, open_text, parse_json, read_lines
from minigpt5 import data_url
from minigpt5.config import ModelConfig
from minigpt5.engine.prompts import check_text
from minigpt5.errors import InvalidRequest, StorageError
from minigpt5.pictures import MAX_BYTES, open_picture
from minigpt5.storage import is_final, open_place
from minigpt5.types import MAX_PAGES, Consistency

COLUMNS = (
    "id",
    "prompt",
    "pages_text",
    "pages",
    "seed",
    "images",
    "steps",
    "guidance_scale",
    "width",
    "height",
    "style",
    "consistency",
)
DESCRIBE_COLUMNS = ("id", "image", "question")
MAX_IMAGES = 8
DEFAULT_PAGES = 4
MAX_SEED = 2**63 - 1
MAX_ID_LENGTH = 512
MAX_EXACT = 2**53
"""Beyond it not every whole number is a float: a tool that stored one as a float may have changed it."""


@dataclass(frozen=True, kw_only=True)
class StoryJob:
    """One story to write, every default filled in.

    Example: StoryJob(row=1, id="fox", prompt="A fox ...", pages=4, seed=7, steps=20, guidance_scale=3.0,
    scheduler="ddim")
    """

    row: int
    """Number of the input row, from 1."""
    id: str
    prompt: str
    pages: int
    seed: int
    steps: int
    guidance_scale: float
    scheduler: str
    width: int = 0
    height: int = 0
    style: str = ""
    consistency: Consistency = "off"
    texts: tuple[str, ...] = ()
    """Texts of a finished story's pages, which stay as they are."""
    images: tuple[str | bytes, ...] = ()
    """What the prompt shows: file contents, or places and data URLs that `load_image` knows."""


@dataclass(frozen=True, kw_only=True)
class ImageJob:
    """One picture to describe."""

    row: int
    id: str
    image: str | bytes
    question: str


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """An input row that cannot become an output of its kind, and why."""

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
    """The rows of a file, or of a folder's files in order of name; a name says the format.

    Raises StorageError where a file itself cannot be read.
    """
    shown = uri
    try:
        filesystem, path = open_place(uri)
        readers = [(name, _reader_of(name)) for name in _files_at(filesystem, path)]
        for name, reader in readers:
            shown = uri if name == path else f"{uri.rstrip('/')}/{name.rpartition('/')[2]}"
            with filesystem.open_input_file(name) as file:
                yield from reader(file, shown)
    except (OSError, ArrowException, ValueError, *CUT) as error:
        raise StorageError(f"{shown} cannot be read ({error}): check its name, format and permissions") from error


def _files_at(filesystem: fs.FileSystem, path: str) -> list[str]:
    """The path itself; of a folder its files without those that tools hide (.crc, _SUCCESS)."""
    if filesystem.get_file_info(path).type != fs.FileType.Directory:
        return [path]
    infos = filesystem.get_file_info(fs.FileSelector(path))
    return sorted(info.path for info in infos if info.is_file and not info.base_name.startswith((".", "_")))


def _reader_of(name: str) -> Callable[[Any, str], Iterator[RawRow]]:
    ending = name.lower().removesuffix(".gz")
    for known, reader in READERS.items():
        if ending.endswith(known):
            return reader
    raise StorageError(
        f"{name} has an unknown format: name a file that ends in {', '.join(READERS)}, or a folder that holds no other"
    )


J = TypeVar("J", StoryJob, ImageJob)


def digest_of(uri: str) -> str:
    """Hash the content of a file, or the names and contents of a folder's files: a job's second run must get the same.
    Pictures that rows only name are not part of it. Raises StorageError."""
    try:
        filesystem, path = open_place(uri)
        if filesystem.get_file_info(path).type != fs.FileType.Directory:
            return _digest_of_file(filesystem, path)
        files = [(name.rpartition("/")[2], _digest_of_file(filesystem, name)) for name in _files_at(filesystem, path)]
    except (OSError, ArrowException) as error:
        raise StorageError(f"{uri} cannot be read ({error}): check its name, format and permissions") from error
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _digest_of_file(filesystem: fs.FileSystem, path: str) -> str:
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path, compression=None) as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def earlier_plan(uri: str) -> dict[str, str]:
    """What earlier versions noted of an input in a job's plan, where that was something else: of a folder they hashed
    names and sizes alone. A job that was begun with it goes on. Raises StorageError."""
    try:
        filesystem, path = open_place(uri)
        if filesystem.get_file_info(path).type != fs.FileType.Directory:
            return {}
        found = filesystem.get_file_info(fs.FileSelector(path))
    except (OSError, ArrowException) as error:
        raise StorageError(f"{uri} cannot be read ({error}): check its name, format and permissions") from error
    listing = repr(sorted((info.base_name, info.size) for info in found))
    return {"input_sha256": hashlib.sha256(listing.encode()).hexdigest()}


def check_rows(raw_rows: Iterable[RawRow], config: ModelConfig) -> Iterator[StoryJob | BadRow]:
    """A job or a bad row for each row, with ids that are unique. `config` fills in what a row leaves out."""
    return _unique(raw_rows, partial(check_row, config=config))


def check_image_rows(raw_rows: Iterable[RawRow], *, question: str) -> Iterator[ImageJob | BadRow]:
    """Check rows as `check_rows` does, for pictures; `question` is the default of rows without one."""
    return _unique(raw_rows, partial(check_image_row, question=question))


def _unique(raw_rows: Iterable[RawRow], check: Callable[..., J | BadRow]) -> Iterator[J | BadRow]:
    """A row without an id gets one from its content. A row whose id an earlier row has becomes a bad row, with an id
    that no row of the input has: the same one in every run."""
    rows = [(raw, check(raw, row=number)) for number, raw in enumerate(raw_rows, start=1)]
    ids = {checked.id for _, checked in rows}
    first_row_of: dict[str, int] = {}
    for number, (raw, checked) in enumerate(rows, start=1):
        first = first_row_of.setdefault(checked.id, number)
        if first != number:
            reason = (
                f"the row is the same as row {first}: give it a seed or an id of its own"
                if _is_left_out(raw.values.get("id"))
                else f"id {checked.id!r} is already that of row {first}: give each row its own"
            )
            shown = getattr(checked, "prompt", "")
            checked = BadRow(row=number, id=_free_id(f"{checked.id}#{number}", ids), prompt=shown, error=reason)
            ids.add(checked.id)
        yield checked


def _free_id(wanted: str, ids: set[str]) -> str:
    while wanted in ids:
        wanted += "#"
    return wanted


def check_row(raw: RawRow, *, row: int, config: ModelConfig) -> StoryJob | BadRow:
    """One row, without a look at the others."""
    values = _values(raw, COLUMNS)
    prompt = values["prompt"] if isinstance(values["prompt"], str) else ""
    row_id = _row_id(raw)
    bad = BadRow(row=row, id=row_id, prompt=prompt.encode(errors="replace").decode(), error="")
    if raw.unreadable:
        return replace(bad, error=f"row {row} is unreadable ({raw.reason})")
    try:
        _check_id(values["id"])
        texts = _texts(values["pages_text"])
        if values["prompt"] is not None and not isinstance(values["prompt"], str):
            raise InvalidRequest("prompt", f"prompt is {values['prompt']!r:.80} but must be a text")
        if texts and not prompt.strip():
            prompt = texts[0]  # the model reads a prompt before any page
            bad = replace(bad, prompt=prompt)
        if not prompt.strip():
            raise InvalidRequest("prompt", "prompt is empty: say what the story is about")
        check_text("prompt", prompt)
        return StoryJob(
            row=row,
            id=row_id,
            prompt=prompt,
            pages=_pages(values["pages"], texts),
            texts=texts,
            images=_images(values["images"]),
            seed=_whole("seed", values["seed"], prompt_seed(prompt), low=0, high=MAX_SEED),
            consistency=_consistency(values["consistency"], config),
            **dataclasses.asdict(config.draw_settings(_draw_settings(values, config))),
        )
    except InvalidRequest as error:
        return replace(bad, error=str(error))


def _draw_settings(values: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Those that a row has."""
    sent: dict[str, Any] = {}
    if values["steps"] is not None:
        sent["steps"] = _whole("steps", values["steps"], 0, low=1, high=100)
    if values["guidance_scale"] is not None:
        sent["guidance_scale"] = _number("guidance_scale", values["guidance_scale"], 0, low=1, high=20)
    low, high = config.side_bounds
    for name in ("width", "height"):
        if values[name] is not None:
            sent[name] = _whole(name, values[name], 0, low=low, high=high)
    if values["style"] is not None:
        if not isinstance(values["style"], str):
            raise InvalidRequest("style", f"style is {values['style']!r:.80} but must be a text")
        sent["style"] = values["style"]
    return sent


def _consistency(value: object, config: ModelConfig) -> Consistency:
    if value not in (None, *get_args(Consistency)):
        raise InvalidRequest("consistency", f'consistency is {value!r:.80} but must be "off" or "story"')
    return config.consistency_of(cast("Consistency | None", value))


def check_image_row(raw: RawRow, *, row: int, question: str) -> ImageJob | BadRow:
    """One picture, without a look at the others or into it."""
    values = _values(raw, DESCRIBE_COLUMNS)
    row_id = _row_id(raw)
    try:
        if raw.unreadable:
            raise InvalidRequest("row", f"row {row} is unreadable ({raw.reason})")
        _check_id(values["id"])
        if not isinstance(values["image"], str | bytes):
            raise InvalidRequest("image", f"image is {values['image']!r:.80} but must be a path, a URI or bytes")
        if not isinstance(values["question"], str | None):
            raise InvalidRequest("question", f"question is {values['question']!r:.80} but must be a text")
        for field in ("image", "question"):
            if isinstance(values[field], str):
                check_text(field, values[field])
    except InvalidRequest as error:
        return BadRow(row=row, id=row_id, prompt="", error=str(error))
    return ImageJob(row=row, id=row_id, image=values["image"], question=values["question"] or question)


def load_image(image: str | bytes) -> bytes:
    """Read a picture's file. Raises InvalidRequest where it cannot be read, BadPicture where it is no picture, and
    StorageError where another run may read it."""
    shown = f"{len(image)} bytes" if isinstance(image, bytes) else f"{image:.80}"
    try:
        if isinstance(image, bytes):
            data = image
        elif data_url.is_data_url(image):
            data = data_url.decode(image)
        else:
            filesystem, path = open_place(image)
            with filesystem.open_input_stream(path, compression=None) as file:
                data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError, ArrowException, StorageError) as error:
        cause = error.__cause__ if isinstance(error, StorageError) else error  # without one the place itself is none
        if cause is None or is_final(cause):
            raise InvalidRequest("image", f"image {shown} cannot be read ({error}): name a picture file") from error
        raise StorageError(f"image {shown} cannot be read now ({error}): try again later") from error
    open_picture(data, name=f"image {shown}")
    return data


def check_seed(seed: int | None) -> None:
    """Raise InvalidRequest where a command's --seed fits no column of its output, or no source of random numbers."""
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise InvalidRequest("seed", f"--seed is {seed} but must be from 0 to {MAX_SEED}")


def prompt_seed(prompt: str) -> int:
    """The seed of a row that names none: the same prompt, the same story, in every run and every row order."""
    return int.from_bytes(_digest(prompt)[:4], "big") >> 1


def _json_lines(file: Any, name: str) -> Iterator[RawRow]:
    for line in read_lines(file, name=name):
        if not line.raw.strip():
            continue
        try:
            values = parse_json(line.text)
            if not isinstance(values, dict):
                raise ValueError(f"it holds a {type(values).__name__}, not an object")
        except ValueError as error:
            yield RawRow(values={}, unreadable=line.raw, reason=str(error))
        else:
            yield RawRow(values=values)


def _csv_rows(file: Any, name: str) -> Iterator[RawRow]:
    """Raises StorageError where quotes do not match: what follows could be in any row."""
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader(open_text(file, name=name, newline=""), strict=True)
    begins_at = 1
    try:
        heading = next(reader, [])
        twice = next((column for column in heading if heading.count(column) > 1), None)
        if twice is not None:
            raise StorageError(f"{name} has the column {twice!r} twice: give each its own name")
        begins_at = reader.line_num + 1
        for fields in reader:
            if fields:
                yield _csv_row(heading, fields)
            begins_at = reader.line_num + 1
    except csv.Error as error:
        raise StorageError(
            f"{name} is not CSV from line {begins_at} on ({error}): close the quote that begins there; a quote inside "
            "a field is written twice"
        ) from error


def _csv_row(heading: list[str], fields: list[str]) -> RawRow:
    try:
        for field in fields:
            check_utf8(field)
        if len(fields) > len(heading):
            raise ValueError("it has more fields than the heading")
    except ValueError as error:
        return RawRow(values={}, unreadable=repr(fields), reason=str(error))
    return RawRow(values=dict(itertools.zip_longest(heading, fields)))


def _parquet_rows(file: Any, name: str) -> Iterator[RawRow]:
    for batch in parquet.ParquetFile(file).iter_batches():
        yield from (RawRow(values=values) for values in batch.to_pylist())


READERS: dict[str, Callable[[Any, str], Iterator[RawRow]]] = {
    ".jsonl": _json_lines,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def _values(raw: RawRow, columns: tuple[str, ...]) -> dict[str, Any]:
    return {column: None if _is_left_out(raw.values.get(column)) else raw.values[column] for column in columns}


def _row_id(raw: RawRow) -> str:
    """The row's own id, else one of its content."""
    content = raw.unreadable or json.dumps(raw.values, sort_keys=True, default=str)
    return _id(raw.values.get("id")) or _digest(content).hex()[:16]


def _check_id(value: object) -> None:
    if value is None or _id(value):
        return
    if _is_whole(value):
        reason = "but a decimal number of this size may have lost digits: store ids as whole numbers or as texts"
    else:
        reason = f"but must be a whole number or a text of at most {MAX_ID_LENGTH} letters"
    raise InvalidRequest("id", f"id is {value!r:.80} {reason}")


def _texts(value: object) -> tuple[str, ...]:
    """Texts of a finished story's pages; CSV brings a JSON list."""
    if value is None:
        return ()
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            raise InvalidRequest("pages_text", f"pages_text is {value!r:.80} but must be a list of texts") from None
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InvalidRequest("pages_text", f"pages_text is {value!r:.80} but must be a list of texts")
    empty = next((number for number, text in enumerate(value, start=1) if not text.strip()), None)
    if empty:
        raise InvalidRequest("pages_text", f"pages_text has no text on page {empty}: each page needs one")
    if not 1 <= len(value) <= MAX_PAGES:
        raise InvalidRequest("pages_text", f"pages_text has {len(value)} pages but must have from 1 to {MAX_PAGES}")
    for text in value:
        check_text("pages_text", text)
    return tuple(value)


def _pages(value: object, texts: tuple[str, ...]) -> int:
    pages = _whole("pages", value, len(texts) or DEFAULT_PAGES, low=1, high=MAX_PAGES)
    if texts and pages != len(texts):
        raise InvalidRequest("pages", f"pages is {pages} but pages_text has {len(texts)}: leave pages out")
    return pages


def _images(value: object) -> tuple[str | bytes, ...]:
    if value is None:
        return ()
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError):
            value = parse_json(value)
    images = [value] if isinstance(value, str | bytes) else value
    if not isinstance(images, list) or not all(isinstance(image, str | bytes) and image for image in images):
        raise InvalidRequest("images", f"images is {value!r:.80} but must be a list of paths, URIs or bytes")
    if len(images) > MAX_IMAGES:
        raise InvalidRequest("images", f"images has {len(images)} but at most {MAX_IMAGES} are read")
    for image in images:
        if isinstance(image, str):
            check_text("images", image)
    return tuple(images)


def _is_left_out(value: object) -> bool:
    """Nothing in JSON, an empty text in CSV, NaN in parquet files that pandas wrote."""
    return value is None or value == "" or value != value


def _id(value: object) -> str:
    """An id as text; empty where there is none that can be used. Tools make 7.0 of 7 where an id is missing."""
    if _is_whole(value) and abs(value) <= MAX_EXACT:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    text = str(value).strip().encode(errors="replace").decode()
    return text if len(text) <= MAX_ID_LENGTH else ""


def _is_whole(value: object) -> TypeGuard[float]:
    return isinstance(value, float) and value.is_integer()


def _whole(field: str, value: object, default: int, *, low: int, high: int) -> int:
    number = _number(field, value, default, low=low, high=high)
    if isinstance(number, float) and abs(number) > MAX_EXACT:
        raise InvalidRequest(
            field, f"{field} is {value!r:.80} but a decimal number of this size may have lost digits: write it whole"
        )
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
