"""Who takes part in an engine's next step: deficit round-robin over keys, then oldest first (Shreedhar and Varghese,
"Efficient Fair Queuing Using Deficit Round-Robin", SIGCOMM 1995)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class FairShare:
    """Divides the `places` of each step equally among the keys that ask for some.

    A key that asks for few is never slowed down by one that asks for many: while there are several, none gets more
    than the one that asks for least, or than `least` where that is more. What a key could not use for want of a
    place it has in store at the next step.
    """

    def __init__(self, places: float, *, least: float) -> None:
        self.places, self.least = places, least
        self._deficits: dict[str, float] = {}

    def choose(self, asking: Sequence[T], *, key: Callable[[T], str], cost: Callable[[T], float]) -> list[T]:
        """Some of `asking`, which are in order of age; at least one where there is one."""
        by_key: dict[str, list[T]] = {}
        for item in asking:
            by_key.setdefault(key(item), []).append(item)
        self._deficits = {name: self._deficits.get(name, 0.0) for name in by_key}
        smallest = min((sum(map(cost, items)) for items in by_key.values()), default=0.0)
        quantum = self.places if len(by_key) == 1 else max(smallest, self.least)
        chosen: list[T] = []
        free = self.places
        # Whoever has most in store comes first, so that more keys than places take turns.
        for name in sorted(by_key, key=lambda name: -self._deficits[name]):
            deficit = min(self._deficits[name] + quantum, self.places)
            for item in by_key[name]:
                if cost(item) > min(deficit, free) and chosen:
                    break
                chosen.append(item)
                deficit, free = deficit - cost(item), free - cost(item)
            else:
                deficit = min(deficit, 0.0)  # who wants for nothing saves nothing
            self._deficits[name] = deficit
        return chosen
