"""What fronts must agree on: who owns a running story, what each client has sent, how much work there is.

One ledger serves all fronts, as a deployment of one replica: also where there is one front, since Serve starts the next
one beside it when it replaces it. The ledger holds nothing that could be lost with it, because each front repeats what
it holds with every heartbeat.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from deployments.stories.admission import Load
from deployments.stories.events import StreamEvent

HEARTBEAT_S = 0.5
"""Time between two heartbeats of a front."""
LEASE_S = 3.0
"""A front without a heartbeat for this long loses its stories to the first front that claims them."""
GRACE_S = 1.5
"""After a ledger's start no orphan is granted for this long: its owner may be alive and about to say so."""
READER_S = 5.0
"""A story's events are relayed for this long after a reader has last asked for them."""


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """The reply to a heartbeat."""

    lost: dict[str, int]
    """Leases of the front that belong to another one now."""
    cancelled: tuple[str, ...]
    """Stories of the front that a client has cancelled at another one."""
    followed: tuple[str, ...]
    """Stories of the front that a client reads at another one."""
    orphans: tuple[str, ...]
    """Stories whose front is silent."""
    load: Load
    """Load of the other fronts."""
    epoch: str
    """Changes when the ledger restarts: it has forgotten the orphans that it knew of."""


@dataclass(frozen=True, kw_only=True)
class EventSlice:
    """Some events of a story that runs at another front."""

    number: int
    """The lease's under which the story runs: another lease starts the events from the first."""
    events: tuple[StreamEvent, ...]


class Ledger(Protocol):
    """What a front asks of it, wherever it is."""

    async def heartbeat(self, front: str, held: Mapping[str, int], load: Load) -> Instructions:
        """Record that `front` is alive and holds the leases `held`, name -> number."""

    async def claim(self, front: str, name: str, *, is_new: bool = False) -> int | None:
        """Grant a lease on a name, such as a story's id: its fencing number, which only grows. None where another
        holder has it. `is_new`: nobody can have it yet."""

    async def release(self, name: str, number: int) -> None:
        """Give a lease back."""

    async def cancel(self, name: str) -> bool:
        """Ask a story's owner to cancel it; False where it has none."""

    async def begin(self, front: str, client: str, *, per_minute: int, concurrent: int) -> float:
        """Count a client's request that makes something: 0, or the seconds after which it may come again."""

    async def end(self, front: str, client: str) -> None:
        """Count such a request as done."""

    async def read(self, name: str, start: int) -> EventSlice | None:
        """Return a running story's events from number `start` on, as far as they are here; None where it has no
        owner."""

    async def publish(self, name: str, number: int, start: int, events: Sequence[StreamEvent]) -> bool:
        """Store a running story's events from number `start` on; False where no reader asks for them any longer, or
        those before `start` are not here: a ledger that is new has to get all."""


@dataclass
class _Lease:
    front: str
    number: int
    until: float
    is_cancelled: bool = False


@dataclass
class _Relay:
    number: int
    wanted_until: float
    events: list[StreamEvent] = field(default_factory=list)


@dataclass
class _Use:
    """What a client has left of its requests a minute, and how many run at each front."""

    left: float
    at: float
    running: dict[str, int] = field(default_factory=dict)


class LocalLedger:
    """The ledger in this process; see Ledger."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._epoch, self._started_at = secrets.token_hex(8), clock()
        self._last_number = 0
        self._leases: dict[str, _Lease] = {}
        self._ended: dict[str, tuple[int, float]] = {}
        """Leases that were given back, with their number: a heartbeat that was sent before may still name them."""
        self._relays: dict[str, _Relay] = {}
        self._uses: dict[str, _Use] = {}
        self._fronts: dict[str, tuple[float, Load]] = {}

    async def heartbeat(self, front: str, held: Mapping[str, int], load: Load) -> Instructions:
        now = self._clock()
        self._fronts[front] = (now, load)
        self._forget_silent(now)
        lost = {}
        for name, number in held.items():
            lease = self._leases.get(name)
            if lease is None and self._ended.get(name, (0, 0.0))[0] < number:  # this ledger is new
                lease = self._leases[name] = _Lease(front, number, 0.0)
                self._last_number = max(self._last_number, number)
            if lease and (lease.front, lease.number) == (front, number):
                lease.until = now + LEASE_S
            else:
                lost[name] = number
        mine = {name: lease for name, lease in self._leases.items() if lease.front == front and name in held}
        others = [load for name, (_, load) in self._fronts.items() if name != front]
        return Instructions(
            lost=lost,
            cancelled=tuple(name for name, lease in mine.items() if lease.is_cancelled),
            followed=tuple(name for name in mine if self._is_followed(name, now)),
            orphans=tuple(name for name, lease in self._leases.items() if lease.until <= now),
            load=Load.total(others),
            epoch=self._epoch,
        )

    async def claim(self, front: str, name: str, *, is_new: bool = False) -> int | None:
        now = self._clock()
        is_too_soon = now < self._started_at + GRACE_S and any(other != front for other in self._fronts)
        lease = self._leases.get(name)
        if not is_new and (is_too_soon or (lease and lease.until > now)):
            return None
        # The time is above every number that an earlier ledger has given.
        self._last_number = max(self._last_number + 1, time.time_ns())
        self._leases[name] = _Lease(front, self._last_number, now + LEASE_S)
        return self._last_number

    async def release(self, name: str, number: int) -> None:
        lease = self._leases.get(name)
        if lease and lease.number == number:
            del self._leases[name]
        self._ended[name] = (number, self._clock())

    async def cancel(self, name: str) -> bool:
        if lease := self._leases.get(name):
            lease.is_cancelled = True
        return lease is not None

    async def begin(self, front: str, client: str, *, per_minute: int, concurrent: int) -> float:
        now = self._clock()
        use = self._uses.setdefault(client, _Use(left=per_minute, at=now))
        use.left = min(per_minute, use.left + (now - use.at) * per_minute / 60)
        use.at = now
        if sum(use.running.values()) >= concurrent:
            return 1.0
        if use.left < 1:
            return (1 - use.left) * 60 / per_minute
        use.left -= 1
        use.running[front] = use.running.get(front, 0) + 1
        return 0.0

    async def end(self, front: str, client: str) -> None:
        use = self._uses.get(client)
        if use and use.running.get(front):  # a ledger that is new has not seen it begin
            use.running[front] -= 1

    async def read(self, name: str, start: int) -> EventSlice | None:
        now = self._clock()
        relay, lease = self._relays.get(name), self._leases.get(name)
        if lease is None and relay is None:
            return None
        if relay is None or (lease and lease.number > relay.number):
            assert lease
            relay = self._relays[name] = _Relay(lease.number, now)
        relay.wanted_until = now + READER_S
        events = tuple(relay.events[start:])
        if not events and lease is None:  # all of it is read, or its front died
            return None
        return EventSlice(number=relay.number, events=events)

    async def publish(self, name: str, number: int, start: int, events: Sequence[StreamEvent]) -> bool:
        relay = self._relays.get(name)
        if relay is None or relay.number != number or not self._is_followed(name, self._clock()):
            return False
        if start > len(relay.events):
            return False
        relay.events[start:] = events
        return True

    def _is_followed(self, name: str, now: float) -> bool:
        relay = self._relays.get(name)
        return relay is not None and relay.wanted_until > now

    def _forget_silent(self, now: float) -> None:
        """What fronts that are gone had begun, and what nobody asks for."""
        for front in [front for front, (seen_at, _) in self._fronts.items() if seen_at + LEASE_S <= now]:
            del self._fronts[front]
            for use in self._uses.values():
                use.running.pop(front, None)
        for name in [name for name in self._relays if not self._is_followed(name, now)]:
            del self._relays[name]
        for name in [name for name, (_, at) in self._ended.items() if at + LEASE_S <= now]:
            del self._ended[name]
