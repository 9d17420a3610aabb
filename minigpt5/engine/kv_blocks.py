"""Blocks of a KV store that slots share (arXiv 2309.06180).

Shape letters: N slots of a pass, B blocks of a slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from minigpt5.engine.even_attention import BLOCK as EVEN_BLOCK
from minigpt5.limits import BLOCK


class Blocks:
    """Blocks of a store, and which of them each slot has, in the order of its positions.

    The store has one block more, of zeros, which stands where a slot has none: what is masked must be finite."""

    def __init__(self, *, num_slots: int, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks))
        self._of_slots: list[list[int]] = [[] for _ in range(num_slots)]

    def num_available(self, idle: Iterable[int]) -> int:
        """Blocks that are free, or that idle slots have."""
        return len(self._free) + sum(len(self._of_slots[slot]) for slot in idle)

    def resize(self, slot: int, num_positions: int) -> None:
        """Give a slot blocks for so many positions, and take back what it has beyond them."""
        owned, needed = self._of_slots[slot], num_blocks(num_positions)
        assert needed - len(owned) <= len(self._free), "blocks are reserved before they are taken"
        while len(owned) < needed:
            owned.append(self._free.pop())
        while len(owned) > needed:
            self._free.append(owned.pop())

    def places(self, slots: Sequence[int]) -> Tensor:
        """The places of the slots' positions, as many as the longest has, and then of zeros; in all a multiple of what
        even attention takes at once."""
        step = EVEN_BLOCK // BLOCK
        longest = -(-max(len(self._of_slots[slot]) for slot in slots) // step) * step
        zeros = self.num_blocks
        table_NB = torch.tensor(
            [self._of_slots[slot] + [zeros] * (longest - len(self._of_slots[slot])) for slot in slots]
        )
        return (table_NB[:, :, None] * BLOCK + torch.arange(BLOCK)).flatten(1)


def num_blocks(num_positions: int) -> int:
    """Blocks that hold so many positions."""
    return -(-num_positions // BLOCK)
