"""Stored rows -> training examples, in an order that is a pure function of the seed.

Every row comes once an epoch. Files are read by row groups: an epoch's order shuffles the groups, and then the rows
within windows of some groups, so that a reader needs few groups at a time.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from typing import Any

import numpy as np
from pyarrow import fs, parquet

from minigpt5 import storage
from minigpt5.config import ModelConfig
from minigpt5.errors import StorageError, TrainingError
from minigpt5.model.image_transforms import fit_drawn, fit_read
from minigpt5.model.prompt import Template
from minigpt5.model.published_template import PUBLISHED
from minigpt5.objective.example import Example
from minigpt5.objective.stored_example import ROW_SCHEMA
from minigpt5.published.data import (
    COMMAND_EVERY,
    COMMANDS,
    Sample,
    Turn,
    cc3m_samples,
    mmdialog_samples,
    sample_segments,
    vist_samples,
)

NEEDS_PICTURES = ("vision", "align", "distill")
"""Stages that learn from pictures and their captions alone."""
DRAWS_CAPTIONS = ("align", "distill")
"""Those whose pictures are drawn."""
WINDOW_GROUPS = 8
KEPT_GROUPS = 2 * WINDOW_GROUPS
VALIDATION_SHARE = 50
"""One row of so many is never trained on: those whose id's hash says so."""


class StoredExamples:
    """The examples of a data set that batch_jobs/prepare.py wrote, or precompute.py.

    Example: StoredExamples("/data/vist", config, seed=1, stage="learn", story_share=0.5).example_at(17)
    """

    def __init__(
        self,
        uri: str,
        config: ModelConfig,
        *,
        seed: int,
        stage: str,
        story_share: float = 0.0,
        is_validation: bool = False,
        template: Template = PUBLISHED,
    ) -> None:
        """`story_share`: of whole stories among the examples of rows whose prompt is known. Raises TrainingError where
        there are no rows of the schema."""
        self.stage, self.story_share, self.template = stage, story_share, template
        self.uri, self.seed, self.is_validation = uri, seed, is_validation
        self.read_px = None if config.vision.family == "none" else config.vision.image_px
        self.draw_px = config.image_px
        self._files, folder = open_place(uri)
        infos = self._files.get_file_info(fs.FileSelector(f"{folder}/rows", allow_not_found=True))
        self._paths = sorted(info.path for info in infos if info.path.endswith(".parquet"))
        if not self._paths:
            raise TrainingError(f"no rows under {uri}/rows: make them with python -m batch_jobs.prepare")
        self._groups: list[tuple[str, int]] = []
        """File and row group."""
        places: list[tuple[int, int]] = []
        """Group and place in the group, for each row."""
        for path in self._paths:
            places += self._index(path)
        self._places = np.array(places, np.int64).reshape(-1, 2)
        self._cache: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        self._orders: dict[int, np.ndarray] = {}
        """The order of the present epoch."""
        if not len(self._places):
            raise TrainingError(f"{uri} has no rows for {'validation' if is_validation else 'training'}: prepare more")

    def __len__(self) -> int:
        return len(self._places)

    def index_at(self, position: int) -> int:
        """Which row comes at `position`, counted over epochs."""
        epoch, place = divmod(position, len(self))
        if epoch not in self._orders:
            self._orders = {epoch: _order(self._places[:, 0], self.seed, epoch)}
        return int(self._orders[epoch][place])

    def stored(self, index: int) -> dict[str, Any]:
        """A row as it is stored."""
        group, place = (int(value) for value in self._places[index])
        if group not in self._cache:
            path, number = self._groups[group]
            self._cache[group] = self._read_group(path, number)
            while len(self._cache) > KEPT_GROUPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group][place]

    def _read_group(self, path: str, number: int) -> list[dict[str, Any]]:
        with self._files.open_input_file(path) as file:
            rows: list[dict[str, Any]] = parquet.ParquetFile(file).read_row_group(number).to_pylist()
            return rows

    def example_at(self, position: int) -> tuple[str, Example]:
        """The id of the stored row at a position, and one of the examples that the row gives."""
        stored = self._fitting(position)
        rng = np.random.default_rng([self.seed, position])
        example = to_example(
            stored,
            rng,
            stage=self.stage,
            story_share=self.story_share,
            read_px=self.read_px,
            draw_px=self.draw_px,
            template=self.template,
        )
        return stored["id"], example

    def _fitting(self, position: int) -> dict[str, Any]:
        """The row at a position, or the next one with a picture for a stage that learns from nothing else. Raises
        TrainingError where no row has one."""
        for later in range(len(self)):
            stored = self.stored(self.index_at(position + later))
            if self.stage not in NEEDS_PICTURES or any(map(_is_picture, stored["segments"])):
                return stored
        raise TrainingError(
            f"no row of {self.uri} has a picture, which {self.stage} learns from: prepare rows with some"
        )

    def _index(self, path: str) -> list[tuple[int, int]]:
        with self._files.open_input_file(path) as file:
            reader = parquet.ParquetFile(file)
            if not set(ROW_SCHEMA.names) <= set(reader.schema_arrow.names):
                raise TrainingError(f"{path} has no training rows: make them with python -m batch_jobs.prepare")
            found = []
            for number in range(reader.num_row_groups):
                ids = reader.read_row_group(number, columns=["id"])["id"].to_pylist()
                self._groups.append((path, number))
                kept = [place for place, name in enumerate(ids) if _is_validation(name) == self.is_validation]
                found += [(len(self._groups) - 1, place) for place in kept]
            return found

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process without what is cached."""
        return _unpickle, (
            {key: value for key, value in vars(self).items() if key not in ("_files", "_cache", "_orders")},
        )


def _unpickle(state: dict[str, Any]) -> StoredExamples:
    examples = StoredExamples.__new__(StoredExamples)
    vars(examples).update(state, _files=open_place(state["uri"])[0], _cache=OrderedDict(), _orders={})
    return examples


def open_place(uri: str) -> tuple[fs.FileSystem, str]:
    """A path or a URI as a file system and the path there. Raises TrainingError."""
    try:
        return storage.open_place(uri)
    except StorageError as error:
        raise TrainingError(str(error)) from error


def _is_validation(row_id: str) -> bool:
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:4], "big") % VALIDATION_SHARE == 0


def _order(group_of: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the rows, whose groups are given."""
    rng = np.random.default_rng([seed, epoch])
    rank = rng.permutation(group_of.max() + 1)
    by_group = np.argsort(rank[group_of], kind="stable")
    windows = rank[group_of][by_group] // WINDOW_GROUPS
    ends = np.flatnonzero(np.diff(windows)) + 1
    return np.concatenate([rng.permutation(part) for part in np.split(by_group, ends)])


def to_example(
    stored: dict[str, Any],
    rng: np.random.Generator,
    *,
    stage: str,
    story_share: float,
    read_px: int | None,
    draw_px: int,
    template: Template = PUBLISHED,
) -> Example:
    """One of a stored row's examples, chosen by chance; the published code makes examples of all of them.

    "vision", "align" and "distill" learn captions: of a story or a dialogue, that of one of its pictures. "learn"
    learns all of the published tasks, and with `story_share` a whole story where its prompt is known. `read_px` is None
    for a model that reads no pictures: of a story it learns the whole, of a dialogue what needs no picture read.
    """
    segments = stored["segments"]
    if stage == "vision":
        words, at = _caption(stored, rng)
        assert read_px is not None
        read = [_read(segments[at], read_px)]
        return Example(segments=template.describe(words), read=read, shown=[words], drawn=[], captions=[])
    if stage in DRAWS_CAPTIONS:
        return _aligned(stored, rng, draw_px, template)
    if stored["kind"] == "dialogue":
        samples = [one for one in mmdialog_samples(_turns(segments)) if read_px or not one.read]
        if not samples:
            return _aligned(stored, rng, draw_px, template)
        return _example(samples[rng.integers(len(samples))], segments, read_px, draw_px, template)
    steps = _steps(segments)
    knows_prompt = stored["kind"] == "story" and stored["prompt"] and rng.random() < story_share
    if knows_prompt or (stored["kind"] == "story" and not read_px):
        prompt = stored["prompt"] or steps[0][0]
        return Example(
            segments=template.story([prompt], len(steps), [words for words, _ in steps]),
            prompt=prompt,
            read=[],
            drawn=[_drawn(segments[int(at)], draw_px) for _, at in steps],
            captions=[segments[int(at)]["caption"] or words for words, at in steps],
        )
    samples = list(vist_samples(steps, variant=lambda count: int(rng.integers(count))))
    return _example(samples[rng.integers(len(samples))], segments, read_px, draw_px, template)


def _caption(stored: dict[str, Any], rng: np.random.Generator) -> tuple[str, int]:
    """What one of a row's pictures shows, and the picture's place among the segments."""
    segments = stored["segments"]
    captions = [(_said_before(segments, at), at) for at, one in enumerate(segments) if _is_picture(one)]
    words, at = captions[rng.integers(len(captions))]
    if stored["kind"] != "caption" and segments[at]["caption"]:
        words = segments[at]["caption"]
    return words, at


def _aligned(stored: dict[str, Any], rng: np.random.Generator, draw_px: int, template: Template) -> Example:
    """A caption with its picture, or the published command to draw it."""
    segments = stored["segments"]
    words, at = _caption(stored, rng)
    if rng.integers(COMMAND_EVERY + 1) == 0:
        index = int(rng.integers(len(COMMANDS))) * COMMAND_EVERY
        sample = list(cc3m_samples([("", "")] * index + [(words, str(at))]))[-1]
        return _example(sample, segments, None, draw_px, template)
    return Example(
        segments=template.caption(words),
        read=[],
        drawn=[_drawn(segments[at], draw_px)],
        captions=[segments[at]["caption"] or words],
        is_caption=True,
    )


def _example(
    sample: Sample, segments: list[dict[str, Any]], read_px: int | None, draw_px: int, template: Template
) -> Example:
    """A published sample, whose pictures are named by their places among `segments`."""
    drawn = [segments[int(sample.drawn)]] if sample.drawn is not None else []
    return Example(
        segments=sample_segments(sample, template),
        read=[_read(segments[int(at)], read_px) for at in sample.read] if read_px else [],
        drawn=[_drawn(one, draw_px) for one in drawn],
        captions=[one["caption"] or sample.caption or _said_before(segments, int(str(sample.drawn))) for one in drawn],
    )


def _is_picture(segment: dict[str, Any]) -> bool:
    return segment["text"] is None


def _said_before(segments: list[dict[str, Any]], at: int) -> str:
    return next(one["text"] for one in reversed(segments[:at]) if not _is_picture(one))


def _steps(segments: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(text, place of the picture) of each page; a page without a picture is told with the next one."""
    steps: list[tuple[str, str]] = []
    words: list[str] = []
    for at, segment in enumerate(segments):
        if _is_picture(segment):
            steps.append((" ".join(words), str(at)))
            words = []
        else:
            words.append(segment["text"])
    return steps


def _turns(segments: list[dict[str, Any]]) -> list[Turn]:
    turns: list[Turn] = []
    for at, segment in enumerate(segments):
        if _is_picture(segment):
            turns[-1] = Turn(text=turns[-1].text, picture=str(at))
        else:
            turns.append(Turn(text=segment["text"]))
    return turns


def _read(segment: dict[str, Any], px: int) -> np.ndarray:
    """Fit a picture for the language model, or take its stored features."""
    if segment["features"] is not None:
        return load_array(segment["features"])
    return fit_read(segment["picture"], px)


def _drawn(segment: dict[str, Any], px: int) -> np.ndarray:
    """Fit a picture for the VAE, or take its stored moments."""
    if segment["moments"] is not None:
        return load_array(segment["moments"])
    return fit_drawn(segment["picture"], px)


def load_array(data: bytes) -> np.ndarray:
    """Load an array in NumPy's own format, without objects, as precompute.py stores it."""
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
