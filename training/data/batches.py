"""Examples -> batches, in this process or through Ray Data.

Ray Data only fetches: order and content depend on the seed and the position alone, so that a run can resume anywhere,
with any number of workers.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from training.presets import Preset

if TYPE_CHECKING:
    from ray.data import Dataset

VALIDATION_BATCH = 8
MAX_BLOCKS = 1_000
"""Of a worker's examples. Each is a task of Ray's: the tens of thousands of a run of any number of steps, ended by
`minutes`, would take the cores from the workers."""
E = TypeVar("E")


@dataclass(frozen=True, kw_only=True)
class Batch(Generic[E]):
    """Examples that are learnt from together; each stage has a type of example.

    Example: Batch(examples=[Crop(pixels=..., weight=...)], ids=[17])
    """

    examples: list[E]
    ids: list[Any]
    """Ids of the examples: their own in a stored data set, else their positions."""
    step: int = 0
    """The optimizer step that learns from it."""


class ExampleSource(Protocol):
    """Where a run's examples come from."""

    def example_at(self, position: int) -> tuple[Any, Any]:
        """The id and the example at a position, counted over epochs: a function of the position alone."""


@dataclass(frozen=True, kw_only=True)
class StageData:
    """A run's examples, as a stage sees them when it is built."""

    training: ExampleSource
    validation: ExampleSource | None
    """Examples that are never trained on; None where there are none."""

    @property
    def samples(self) -> ExampleSource:
        """What samples are drawn from: held-out examples where there are some."""
        return self.validation or self.training


def batch_at(source: ExampleSource, start: int, count: int) -> Batch[Any]:
    """The examples from position `start` on."""
    return _batch([source.example_at(position) for position in range(start, start + count)])


def _batch(found: list[tuple[Any, Any]]) -> Batch[Any]:
    return Batch(ids=[own_id for own_id, _ in found], examples=[example for _, example in found])


def validation_batches(
    source: ExampleSource | None, preset: Preset, *, rank: int = 0, num_workers: int = 1
) -> list[Batch[Any]]:
    """A worker's share of the batches that are never trained on: the first ones, always the same, dealt out in turn.

    All workers have as many, since some strategies need all of them for a call: the last round begins again at the
    first batch. `preset.validation_batches` says which of them count.
    """
    if source is None:
        return []
    size, num_batches = min(preset.batch_size, VALIDATION_BATCH), preset.validation_batches
    rounds = math.ceil(num_batches / num_workers)
    numbers = [(rank + turn * num_workers) % num_batches for turn in range(rounds)]
    return [batch_at(source, number * size, size) for number in numbers]


def examples_per_step(preset: Preset) -> int:
    return preset.batch_size * preset.optimizer.gradient_accumulation_steps


def local_batches(source: ExampleSource, preset: Preset) -> Callable[[int], Iterator[Batch[Any]]]:
    """Batches from a step on, made a few ahead by a thread of this process."""

    def batches(step: int) -> Iterator[Batch[Any]]:
        ahead: queue.Queue[Batch[Any] | Exception] = queue.Queue(maxsize=4)

        def produce() -> None:
            try:
                size = preset.batch_size
                for start in range(step * examples_per_step(preset), preset.steps * examples_per_step(preset), size):
                    ahead.put(batch_at(source, start, size))
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
    """Numbers of a worker's examples, counted from 0 at `first_step` -> their positions.

    A worker takes its share of each batch, so that a batch holds the same examples for any number of workers, and
    wherever a run resumes."""
    share = preset.batch_size // num_workers
    batches, places = np.divmod(ids, share)
    return (
        (first_step * preset.optimizer.gradient_accumulation_steps + batches) * preset.batch_size
        + rank * share
        + places
    )


def ray_batches(
    source: ExampleSource, preset: Preset, *, rank: int, num_workers: int
) -> Callable[[int], Iterator[Batch[Any]]]:
    """A worker's batches, in order, made by Ray Data's tasks from a step on: a worker that resumes there makes none of
    those before. Each worker has a pipeline of its own: a shared one would give each worker what is ready first."""

    def batches(step: int) -> Iterator[Batch[Any]]:
        examples = _ray_examples(source, preset, first_step=step, rank=rank, num_workers=num_workers)
        for block in examples.iter_batches(batch_size=preset.batch_size // num_workers, batch_format="numpy"):
            yield _batch(list(block["example"]))

    return batches


def _ray_examples(source: ExampleSource, preset: Preset, *, first_step: int, rank: int, num_workers: int) -> Dataset:
    """A worker's examples from `first_step` to the end of the preset."""
    import ray

    def make(block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        positions = worker_positions(block["id"], preset, first_step=first_step, rank=rank, num_workers=num_workers)
        made = np.empty(len(positions), dtype=object)
        made[:] = [source.example_at(int(position)) for position in positions]
        return {"example": made}

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_fallback_to_arrow_object_ext_type = True  # examples are objects; unset, Ray warns of them
    share = preset.batch_size // num_workers
    num_examples = (preset.steps - first_step) * preset.optimizer.gradient_accumulation_steps * share
    blocks = min(MAX_BLOCKS, max(1, num_examples // (8 * share)))
    examples = ray.data.range(num_examples, override_num_blocks=blocks).map_batches(make, batch_size=share)
    examples.context.enable_progress_bars = False
    return examples
