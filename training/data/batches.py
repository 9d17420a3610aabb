"""A position -> its row, a pure function of the preset; and rows -> batches, in this process or through Ray Data.

Ray Data only fetches: order and content depend on the seed and the position alone, so that a run may be resumed
anywhere, by any number of workers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from minigpt5.model.prompt import Task, caption_segments, describe_segments, next_page_segments, story_segments
from minigpt5.objective.example import Row
from minigpt5.storybook.captions import Facts, canonical_caption, draw_facts, write_caption
from minigpt5.storybook.scenes import (
    CHARACTERS,
    IMAGE_PX,
    OBJECTS,
    PLACES,
    TIMES,
    Scene,
    draw_scene,
    is_held_out,
    scene_at,
    sprite_boxes,
)
from minigpt5.storybook.stories import story_at
from training.data.stored import StoredRows
from training.presets import Preset
from training.storybook.sprites import SPRITE_WEIGHT, error_weight, sprites_of

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset

Batch = dict[str, object]
"""Columns of rows, and their `row_ids`."""
FACT_VALUES = {"who": CHARACTERS, "what": OBJECTS, "side": ("left", "right"), "place": PLACES, "time": TIMES}
VALIDATION_BATCH = 8
MAX_BLOCKS = 1_000
"""Of a worker's rows. Each is a task of Ray's: the tens of thousands of a run of any number of steps, ended by
`minutes`, would take the cores from the workers."""


class Rows(Protocol):
    """Where a run's rows come from: `row_at` is a function of the position alone."""

    def row_at(self, position: int) -> dict[str, object]:
        """The row that comes at a position, counted over epochs."""


@dataclass(frozen=True)
class StorybookRows:
    """The picture world, endlessly: every position has a row of its own."""

    preset: Preset

    def row_at(self, position: int) -> dict[str, object]:
        return row_at(self.preset, position)


@dataclass(frozen=True)
class RowsOfStage:
    """Stored rows as a stage learns them."""

    stored: StoredRows
    preset: Preset

    def row_at(self, position: int) -> dict[str, object]:
        return self.stored.row_at(position, stage=self.preset.stage, story_share=self.preset.story_share)


def row_at(preset: Preset, row_id: int) -> dict[str, object]:
    """Row number `row_id` of a stage on the picture world."""
    rng = np.random.default_rng([preset.seed, row_id])
    if preset.stage == "vae":
        return _crop(preset.seed, row_id, preset.crop_px, rng)
    if preset.stage == "decoder":
        return _captioned_crop(preset, row_id, rng)
    if preset.stage == "sharpen":
        return _weighted_scene(preset, row_id, rng)
    if preset.stage in ("unet", "distill"):
        return _captioned_scene(preset.seed, row_id, preset.canonical_share, rng)
    if preset.stage == "vision":
        return {"row": _description(preset.seed, row_id, rng)}
    choice = rng.random()
    if preset.stage == "align" or choice < preset.caption_share:
        return {"row": _caption(preset.seed, row_id, rng)}
    if choice < preset.caption_share + preset.story_share:
        return {"row": _story(preset.seed, row_id, rng)}
    return {"row": _page(preset.seed, row_id, rng)}


def _crop(seed: int, row_id: int, crop_px: int, rng: np.random.Generator) -> dict[str, object]:
    """A crop of a scene, four times of five with a sprite in it, and how much an error counts at each pixel."""
    scene = scene_at(row_id, seed=seed)
    y, x = _corner(scene, crop_px, rng)
    window = np.s_[y : y + crop_px, x : x + crop_px]
    return {"pixels": draw_scene(scene)[window], "weight": _weight(scene)[(slice(None), *window)]}


def _weighted_scene(preset: Preset, row_id: int, rng: np.random.Generator) -> dict[str, object]:
    """A scene with a caption that says all of its facts, how much an error counts at each pixel, and its sprites'
    masks (2, Y, X)."""
    scene = scene_at(row_id, seed=preset.seed)
    facts = Facts.of(scene)
    is_canonical = rng.random() < preset.canonical_share
    return {
        "scene": scene,
        "caption": canonical_caption(facts) if is_canonical else write_caption(facts, rng),
        "pixels": draw_scene(scene),
        "weight": _weight(scene),
        "masks": np.stack([sprite.mask() for sprite in sprites_of(scene)]),
    }


def _captioned_crop(preset: Preset, row_id: int, rng: np.random.Generator) -> dict[str, object]:
    """A whole scene with its caption, how much an error counts at each pixel, and the corners of two crops as `_crop`
    chooses them."""
    row = _captioned_scene(preset.seed, row_id, preset.canonical_share, rng)
    scene = scene_at(row_id, seed=preset.seed)
    return {**row, "weight": _weight(scene), "corners": [_corner(scene, preset.crop_px, rng) for _ in range(2)]}


def _corner(scene: Scene, crop_px: int, rng: np.random.Generator) -> tuple[int, int]:
    """Row and column where a crop begins."""
    boxes = list(sprite_boxes(scene).values())
    if rng.random() < 0.8:
        left, top, right, bottom = boxes[rng.integers(2)]
        x = (left + right - crop_px) // 2 + int(rng.integers(-16, 17))
        y = (top + bottom - crop_px) // 2 + int(rng.integers(-16, 17))
    else:
        x, y = (int(v) for v in rng.integers(0, IMAGE_PX - crop_px + 1, 2))
    y, x = (min(max(v, 0), IMAGE_PX - crop_px) for v in (y, x))
    return y, x


def _weight(scene: Scene) -> np.ndarray:
    return error_weight(sprites_of(scene), around=SPRITE_WEIGHT)


def _captioned_scene(seed: int, row_id: int, canonical_share: float, rng: np.random.Generator) -> dict[str, object]:
    scene = scene_at(row_id, seed=seed)
    facts = draw_facts(scene, rng)
    canonical = canonical_caption(facts)
    caption = canonical if rng.random() < canonical_share else write_caption(facts, rng)
    return {"pixels": draw_scene(scene), "caption": caption, "canonical": canonical}


def _description(seed: int, row_id: int, rng: np.random.Generator) -> Row:
    scene = scene_at(row_id, seed=seed)
    facts = Facts.of(scene)
    return Row(
        segments=describe_segments(write_caption(facts, rng)),
        read=[draw_scene(scene)],
        shown=[canonical_caption(facts)],
        drawn=[],
        captions=[],
    )


def _caption(seed: int, row_id: int, rng: np.random.Generator) -> Row:
    scene = scene_at(row_id, seed=seed)
    facts = draw_facts(scene, rng)
    return Row(
        segments=caption_segments(write_caption(facts, rng)),
        read=[],
        drawn=[draw_scene(scene)],
        captions=[canonical_caption(facts)],
        contrasts=[_contrasts(facts, rng)],
        is_caption=True,
    )


def _story(seed: int, row_id: int, rng: np.random.Generator) -> Row:
    story = story_at(row_id, seed=seed)
    return Row(
        segments=story_segments([story.prompt], len(story.pages), [page.text for page in story.pages]),
        read=[],
        drawn=[draw_scene(page.scene) for page in story.pages],
        captions=[canonical_caption(page.facts) for page in story.pages],
        contrasts=[_contrasts(page.facts, rng) for page in story.pages],
    )


def _contrasts(facts: Facts, rng: np.random.Generator) -> list[str]:
    """The canonical caption with one fact after another changed, to no pair that is held out."""
    captions = []
    for name, values in FACT_VALUES.items():
        changed = [replace(facts, **{name: value}) for value in values if value != getattr(facts, name)]
        others = [one for one in changed if not (one.who and one.what and is_held_out(one.who, one.what))]
        captions.append(canonical_caption(others[rng.integers(len(others))]))
    return captions


def _page(seed: int, row_id: int, rng: np.random.Generator) -> Row:
    """One of the published tasks on one of a story's first three pages."""
    story = story_at(row_id, seed=seed)
    index = int(rng.integers(min(3, len(story.pages))))
    page, history = story.pages[index], story.pages[:index]
    tasks: tuple[Task, ...] = ("text", "picture", "both") if index else ("picture",)
    task = tasks[rng.integers(len(tasks))]
    picture, read = draw_scene(page.scene), [draw_scene(past.scene) for past in history]
    segments = next_page_segments([past.text for past in history], page.text, task, variant=int(rng.integers(6)))
    if task == "text":
        return Row(segments=segments, read=[*read, picture], drawn=[], captions=[])
    return Row(
        segments=segments,
        read=read,
        drawn=[picture],
        captions=[canonical_caption(page.facts)],
        contrasts=[_contrasts(page.facts, rng)],
    )


def collate(rows: list[dict[str, object]], positions: list[int]) -> Batch:
    """Arrays of equal shape are stacked, everything else becomes a list. `row_ids` are the rows' own, else their
    positions."""
    batch: Batch = {"row_ids": [row.get("id", position) for row, position in zip(rows, positions, strict=True)]}
    for key, first in rows[0].items():
        values = [row[key] for row in rows]
        batch[key] = np.stack(values) if isinstance(first, np.ndarray) else values  # type: ignore[arg-type]
    return batch


def batch_at(rows: Rows, start: int, count: int) -> Batch:
    positions = list(range(start, start + count))
    return collate([rows.row_at(position) for position in positions], positions)


def validation_batches(rows: Rows, preset: Preset) -> list[Batch]:
    """Of rows that are never trained on: the first ones, always the same."""
    size = min(preset.batch_size, VALIDATION_BATCH)
    return [batch_at(rows, number * size, size) for number in range(preset.validation_batches)]


def rows_per_step(preset: Preset) -> int:
    return preset.batch_size * preset.gradient_accumulation_steps


def local_batches(rows: Rows, preset: Preset) -> Callable[[int], Iterator[Batch]]:
    """Batches from a step on, made by a thread of this process a few ahead. They go on without end."""

    def batches(step: int) -> Iterator[Batch]:
        ahead: queue.Queue[Batch | Exception] = queue.Queue(maxsize=4)

        def produce() -> None:
            try:
                size = preset.batch_size
                for start in range(step * rows_per_step(preset), preset.steps * rows_per_step(preset), size):
                    ahead.put(batch_at(rows, start, size))
            except Exception as failure:
                ahead.put(failure)

        threading.Thread(target=produce, daemon=True).start()
        while True:
            batch = ahead.get()
            if isinstance(batch, Exception):
                raise batch
            yield batch

    return batches


def worker_positions(ids: np.ndarray, preset: Preset, *, first_step: int, rank: int, num_workers: int) -> np.ndarray:
    """A worker's rows from `first_step` on, counted from 0 -> their positions: its share of each batch, so that a batch
    is the same rows for any number of workers, and wherever a run goes on."""
    share = preset.batch_size // num_workers
    batches, places = np.divmod(ids, share)
    return (first_step * preset.gradient_accumulation_steps + batches) * preset.batch_size + rank * share + places


def ray_rows(rows: Rows, preset: Preset, *, first_step: int, rank: int, num_workers: int) -> Dataset:
    """A worker's rows as a Ray Data pipeline, in order, from `first_step` to the end of the preset. It has a pipeline
    of its own: one that all share would give each worker whatever comes first."""
    import ray

    def make(block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        positions = worker_positions(block["id"], preset, first_step=first_step, rank=rank, num_workers=num_workers)
        made = np.empty(len(positions), dtype=object)
        made[:] = [rows.row_at(int(position)) for position in positions]
        return {"id": positions, "row": made}

    ray.data.DataContext.get_current().execution_options.preserve_order = True
    share = preset.batch_size // num_workers
    num_rows = (preset.steps - first_step) * preset.gradient_accumulation_steps * share
    blocks = min(MAX_BLOCKS, max(1, num_rows // (8 * share)))
    return ray.data.range(num_rows, override_num_blocks=blocks).map_batches(make, batch_size=share)


def ray_batches(
    shard: DataIterator, preset: Preset, *, first_step: int, num_workers: int
) -> Callable[[int], Iterator[Batch]]:
    """A worker's batches of `ray_rows`, from a step on."""

    def batches(step: int) -> Iterator[Batch]:
        size = preset.batch_size // num_workers
        for index, block in enumerate(shard.iter_batches(batch_size=size, batch_format="numpy")):
            if (
                index >= (step - first_step) * preset.gradient_accumulation_steps
            ):  # a restarted worker has done the earlier ones
                yield collate(list(block["row"]), block["id"].tolist())

    return batches
