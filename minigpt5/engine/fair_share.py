"""Choose the jobs of an engine's next step: deficit round-robin over keys, then oldest first (Shreedhar and Varghese,
"Efficient Fair Queuing Using Deficit Round-Robin", SIGCOMM 1995)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Occupancy:
    """How full the steps of an engine were so far."""

    num_steps: int
    num_rows: float
    """Places that were taken in all steps together."""
    max_rows: float
    """Places of one step. A picture that is larger than a step has one alone, and takes more."""


class FairShare:
    """Divides the `places` of each step equally among the keys that ask for some.

    A key that asks for few is hardly slowed down by one that asks for many: while there are several, none gets more
    in a step than the one that asks for least, or than `min_places` where that is more. What a key got less than its
    share in one step it has in store for the next ones, and the other way round.
    """

    def __init__(self, places: float, *, min_places: float) -> None:
        self.places, self.min_places = places, min_places
        self._num_steps, self._num_taken = 0, 0.0
        self._store: dict[str, float] = {}

    @property
    def occupancy(self) -> Occupancy:
        return Occupancy(num_steps=self._num_steps, num_rows=self._num_taken, max_rows=self.places)

    def choose(self, asking: Sequence[T], *, key: Callable[[T], str], cost: Callable[[T], float]) -> list[T]:
        """Some of `asking`, which are in order of age; at least one where there is one."""
        by_key: dict[str, list[T]] = {}
        for item in asking:
            by_key.setdefault(key(item), []).append(item)
        store = {name: self._store.get(name, 0.0) for name in by_key}
        smallest = min((sum(map(cost, items)) for items in by_key.values()), default=0.0)
        most = self.places if len(by_key) == 1 else max(smallest, self.min_places)
        chosen: list[T] = []
        free = self.places
        for name in sorted(by_key, key=lambda name: -store[name]):  # with more keys than places they take turns
            taken = 0.0
            for item in by_key[name]:
                fits = taken + cost(item) <= most or (not taken and store[name] >= 0)
                if not (fits and cost(item) <= free) and chosen:
                    break
                chosen.append(item)
                taken, free = taken + cost(item), free - cost(item)
            store[name] -= taken
        taken_by_all = sum(map(cost, chosen))
        self._num_steps += bool(chosen)
        self._num_taken += taken_by_all
        share = taken_by_all / max(1, len(by_key))
        self._store = {name: min(max(value + share, -self.places), self.places) for name, value in store.items()}
        return chosen
