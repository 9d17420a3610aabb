"""Samples that cost more to make than to learn from, kept to be learnt from again.

A buffer is not checkpointed: a resumed run fills it again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TensorBatch:
    """Tensors of the same samples along their first axis. Subclasses name them; one that no sample has is None."""

    def __len__(self) -> int:
        return len(next(iter(self._parts().values())))

    def __getitem__(self, samples: slice) -> Self:
        return self._map(lambda part: part[samples])

    @classmethod
    def cat(cls, batches: Sequence[TensorBatch]) -> Self:
        """One batch of several, which all have the same tensors; those that `cls` does not name are left out."""
        names = {field.name for field in fields(cls)} & batches[0]._parts().keys()
        return cls(**{name: torch.cat([batch._parts()[name] for batch in batches]).contiguous() for name in names})

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts().values())

    def clone(self) -> Self:
        return self._map(Tensor.clone)

    def contiguous(self) -> Self:
        """In the memory format that `cat` gives: in another one convolutions round otherwise."""
        return self._map(Tensor.contiguous)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, **{name: change(part) for name, part in self._parts().items()})

    def _parts(self) -> dict[str, Tensor]:
        return {name: part for name, part in vars(self).items() if part is not None}


B = TypeVar("B", bound=TensorBatch)


class ReplayBuffer(Generic[B]):
    """The newest samples: at most `max_samples`, or as many as fit in `max_bytes`, where all are of one size."""

    def __init__(self, *, max_samples: int | None = None, max_bytes: int | None = None) -> None:
        self.max_samples, self.max_bytes = max_samples, max_bytes
        self._samples: deque[B] = deque()

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def capacity(self) -> int:
        """Samples that have room, of the size of those in the buffer, of which there must be one."""
        by_bytes = [] if self.max_bytes is None else [self.max_bytes // self._samples[0].nbytes]
        return min([*by_bytes, *([] if self.max_samples is None else [self.max_samples])])

    def extend(self, batch: B) -> None:
        """Keep a batch's samples, which push out the oldest. Copies: a view would keep the whole batch alive."""
        self._samples.extend(batch[at : at + 1].clone() for at in range(len(batch)))
        while len(self._samples) > self.capacity:
            self._samples.popleft()

    def sample(self, num: int) -> list[B]:
        """Batches of one sample each, drawn by torch's generator; one may come more than once."""
        return [self._samples[index] for index in torch.randint(len(self), (num,)).tolist()]
