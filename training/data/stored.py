"""Stored rows -> training examples, in an order that is a pure function of the seed.

Every row comes once an epoch: see row_index.py.
"""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs, parquet

from minigpt5 import storage
from minigpt5.config import ModelConfig
from minigpt5.errors import StorageError, TrainingError
from minigpt5.model.image_transforms import fit_drawn, fit_read
from minigpt5.model.prompt import Template
from minigpt5.model.published_template import PUBLISHED
from minigpt5.objective.encoders import ALL_FIELDS, DRAWS_CAPTIONS, fields_read
from minigpt5.objective.example import Example
from minigpt5.published.data import (
    COMMAND_EVERY,
    COMMANDS,
    MAX_TURN_TOKENS,
    Sample,
    Turn,
    cc3m_samples,
    ending_sample,
    mmdialog_samples,
    sample_segments,
    vist_samples,
)
from minigpt5.types import WHOLE_PAGES
from training.data.long_rows import FindWindows, cut_texts, largest, pages_before, pages_of_a_task, whole_or_part
from training.data.row_index import WINDOW_GROUPS, RowIndex, RowOrder, index_rows, is_validation

NEEDS_PICTURES = ("vision", *DRAWS_CAPTIONS)
"""Stages that learn from pictures and their captions alone."""
KEPT_GROUPS = 2 * WINDOW_GROUPS


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
        template: Template = PUBLISHED,
        tokenise: Callable[[Example], Example] | None = None,
        find_windows: FindWindows | None = None,
    ) -> None:
        """`story_share`: of whole stories among the examples of rows whose prompt is known. `tokenise`: fills an
        example's tokens; None leaves that to the objective. `find_windows`: cuts stories that are too long to be read
        at once; None leaves them whole. Raises TrainingError where there are no rows of the schema."""
        self.stage, self.story_share, self.template = stage, story_share, template
        self.tokenise, self.find_windows = tokenise, find_windows
        self.uri, self.seed, self.is_validation = uri, seed, False
        self.read_px = None if config.vision.family == "none" else config.vision.image_px
        self.draw_px = config.image_px
        self.context_tokens = config.context_tokens
        self._has_cut = False
        self.fields_read = fields_read(stage, reads_pictures=self.read_px is not None)
        """Which of what precompute.py stores of a picture the stage reads."""
        self._files, folder = open_place(uri)
        infos = self._files.get_file_info(fs.FileSelector(f"{folder}/rows", allow_not_found=True))
        paths = sorted(info.path for info in infos if info.path.endswith(".parquet"))
        if not paths:
            raise TrainingError(f"no rows under {uri}/rows: make them with python -m batch_jobs.prepare")
        training, self._held_out_index = index_rows(self._files, paths)
        self._use(training)

    def held_out(self) -> StoredExamples:
        """The examples of the rows that are never trained on. Raises TrainingError where there are none."""
        other = copy.copy(self)
        other.is_validation = True
        other._use(self._held_out_index)
        return other

    def _use(self, index: RowIndex) -> None:
        if not len(index):
            kind = "validation" if self.is_validation else "training"
            raise TrainingError(f"{self.uri} has no rows for {kind}: prepare more")
        self._index = index
        self._order = RowOrder(index.sizes, self.seed)
        self._cache: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._index)

    def stored(self, position: int) -> dict[str, Any]:
        """The row at a position, counted over epochs, as it is stored, without what the stage does not read."""
        place = self._order.place_at(position)
        if place.group not in self._cache:
            self._cache[place.group] = self._read_group(place.group)
            while len(self._cache) > KEPT_GROUPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(place.group)
        return self._cache[place.group][place.number]

    def _read_group(self, group: int) -> list[dict[str, Any]]:
        """The rows of a group that are used."""
        path, number = self._index.group_at(group)
        unread = tuple(f".{name}" for name in ALL_FIELDS if name not in self.fields_read)
        with self._files.open_input_file(path) as file:
            reader = parquet.ParquetFile(file)
            leaves = [reader.schema.column(leaf).path for leaf in range(len(reader.schema))]
            rows = reader.read_row_group(number, columns=[leaf for leaf in leaves if not leaf.endswith(unread)])
        return rows.filter(pa.array(is_validation(rows["id"]) == self.is_validation)).to_pylist()

    def example_at(self, position: int) -> tuple[str, Example]:
        """The id of the stored row at a position, and one of the examples that the row gives. Rows that give none are
        passed over. Raises TrainingError where no row gives one."""
        found = None
        for found in self._usable(position):
            if example := self._to_example(found, position):
                return found["id"], example
        if found is None:
            raise TrainingError(
                f"no row of {self.uri} has a picture, which {self.stage} learns from: prepare rows with some"
            )
        raise TrainingError(
            f"no row of {self.uri} fits the {self.context_tokens} tokens that the model reads, however its texts are "
            "cut: its pictures alone take more"
        )

    def _usable(self, position: int) -> Iterator[dict[str, Any]]:
        """The rows from a position on, each once, for a stage of pictures those that have one."""
        for later in range(len(self)):
            stored = self.stored(position + later)
            if self.stage not in NEEDS_PICTURES or any(map(_is_picture, stored["segments"])):
                yield stored

    def _to_example(self, stored: dict[str, Any], position: int) -> Example | None:
        """One of a row's examples, of what the model reads at once; None where nothing of it fits."""
        example = self._make(stored, position)
        if self._is_read_whole(example):
            return example
        bare = _without_pictures(stored)

        def fits(max_history: int, max_text: int | None = None) -> bool:
            row = bare if max_text is None else cut_texts(bare, max_text)
            return self._is_read_whole(self._make(row, position, max_history))

        max_history = largest(fits, 0, WHOLE_PAGES)
        if max_history is not None:
            return self._make(stored, position, max_history)
        texts = [one[name] or "" for one in stored["segments"] for name in ("text", "caption")]
        max_text = largest(lambda most: fits(0, most), 1, max(map(len, [stored["prompt"] or "", *texts])))
        if not self._has_cut:
            self._has_cut = True
            done = "left out" if max_text is None else "cut"
            print(
                f"row {stored['id']} of {self.uri} is longer than the {self.context_tokens} tokens that the model "
                f"reads: it is {done}, and other such rows without a word",
                flush=True,
            )
        return None if max_text is None else self._make(cut_texts(stored, max_text), position, 0)

    def _make(self, stored: dict[str, Any], position: int, max_history: int | None = None) -> Example:
        """See `to_example`."""
        example = to_example(
            stored,
            np.random.default_rng([self.seed, position]),
            stage=self.stage,
            story_share=self.story_share,
            read_px=self.read_px,
            draw_px=self.draw_px,
            template=self.template,
            find_windows=self.find_windows,
            max_history=max_history,
        )
        return self.tokenise(example) if self.tokenise else example

    def _is_read_whole(self, example: Example) -> bool:
        """Whether the language model reads all of it, as far as that is known here. "distill" has no language model."""
        return self.stage == "distill" or not example.tokens or len(example.tokens.ids) <= self.context_tokens

    def __getstate__(self) -> dict[str, Any]:
        """Sent to another process without what is cached."""
        return {key: value for key, value in vars(self).items() if key not in ("_files", "_order", "_cache")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _files=open_place(state["uri"])[0])
        self._use(self._index)


def open_place(uri: str) -> tuple[fs.FileSystem, str]:
    """A path or a URI as a file system and the path there. Raises TrainingError."""
    try:
        return storage.open_place(uri)
    except StorageError as error:
        raise TrainingError(str(error)) from error


def to_example(
    stored: dict[str, Any],
    rng: np.random.Generator,
    *,
    stage: str,
    story_share: float,
    read_px: int | None,
    draw_px: int,
    template: Template = PUBLISHED,
    find_windows: FindWindows | None = None,
    max_history: int | None = None,
) -> Example:
    """One of a stored row's examples, chosen by chance; the published code makes examples of all of them.

    "vision", "align" and "distill" learn captions: of a story or a dialogue, that of one of its pictures. "learn"
    learns all of the published tasks, and with `story_share` a whole story where its prompt is known. `read_px` is None
    for a model that reads no pictures: of a story it learns the whole, of a dialogue what needs no picture read.
    `max_history`: earlier pages that a published task of a story has, of its window; None: as many as are read whole.
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
        most = MAX_TURN_TOKENS if stored["source"] == "mmdialog" else None
        samples = [one for one in mmdialog_samples(_turns(segments), max_turn_tokens=most) if read_px or not one.read]
        if not samples:
            return _aligned(stored, rng, draw_px, template)
        return _example(samples[rng.integers(len(samples))], segments, read_px, draw_px, template)
    steps, ending = _steps(segments)
    prompt, texts = stored["prompt"] or steps[0][0], [words for words, _ in steps]
    knows_prompt = stored["kind"] == "story" and stored["prompt"] and rng.random() < story_share
    if knows_prompt or (stored["kind"] == "story" and not read_px):
        part = whole_or_part([prompt], texts, rng, template=template, find_windows=find_windows, ending=ending)
        steps = [steps[page - 1] for page in part.pages]
        return Example(
            segments=part.segments,
            prompt=prompt,
            read=[],
            drawn=[_drawn(segments[int(at)], draw_px) for _, at in steps],
            captions=[segments[int(at)]["caption"] or words for words, at in steps],
        )
    pages = pages_of_a_task([prompt], texts, rng, find_windows=find_windows)
    samples = _tasks([steps[page - 1] for page in pages], ending if pages[-1] == len(steps) else "", rng)
    sample = samples[rng.integers(len(samples))]
    if max_history is not None:
        number = len(sample.read) - (sample.task == "text")
        before = pages_before(number, pages, [prompt], texts, find_windows=find_windows, most=max_history)
        shorter = _tasks([steps[page - 1] for page in [*before, *pages[number : number + 1]]], ending, rng)
        # A page without earlier ones has the picture's task alone.
        sample = next((one for one in reversed(shorter) if one.task == sample.task), shorter[0])
    return _example(sample, segments, read_px, draw_px, template)


def _tasks(steps: list[tuple[str, str]], ending: str, rng: np.random.Generator) -> list[Sample]:
    """The published samples of a story, and that of the text after its last picture, where there is one."""
    samples = list(vist_samples(steps, variant=lambda count: int(rng.integers(count))))
    return [*samples, ending_sample(steps, ending)] if ending else samples


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


def _steps(segments: list[dict[str, Any]]) -> tuple[list[tuple[str, str]], str]:
    """(text, place of the picture) of each page, and what is told after the last picture. A page without a picture is
    told with the next one."""
    steps: list[tuple[str, str]] = []
    words: list[str] = []
    for at, segment in enumerate(segments):
        if _is_picture(segment):
            steps.append((" ".join(words), str(at)))
            words = []
        else:
            words.append(segment["text"])
    return steps, " ".join(words)


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


def _without_pictures(stored: dict[str, Any]) -> dict[str, Any]:
    """The row with empty arrays for pictures, where texts alone are measured."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.zeros(0), allow_pickle=False)
    empty = dict.fromkeys(ALL_FIELDS, file.getvalue())
    segments = [{**one, **empty} if _is_picture(one) else one for one in stored["segments"]]
    return {**stored, "segments": segments}


def load_array(data: bytes) -> np.ndarray:
    """Load an array in NumPy's own format, without objects, as precompute.py stores it."""
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
