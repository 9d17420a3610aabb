"""Results by their content: the least recently used ones go when the bytes run out."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class BoundedCache(Generic[V]):
    """At most `max_bytes` of values, as `size_bytes` counts them. Any thread may use it."""

    def __init__(self, max_bytes: int, *, size_bytes: Callable[[V], int]) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._size_bytes = size_bytes
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> V | None:
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key]

    def put(self, key: Hashable, value: V) -> None:
        """A value larger than the whole cache is not kept."""
        size = self._size_bytes(value)
        with self._lock:
            if key in self._values or size > self.max_bytes:
                return
            self._values[key] = value
            self.num_bytes += size
            while self.num_bytes > self.max_bytes:
                _, oldest = self._values.popitem(last=False)
                self.num_bytes -= self._size_bytes(oldest)
