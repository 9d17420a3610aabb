"""The ledger of all fronts: who owns what, and what it forgets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from deployments.stories.admission import Admission, Load, Overloaded
from deployments.stories.ledger import GRACE_S, LEASE_S, READER_S, LocalLedger
from tests.deployments.stories.test_admission import story

NONE = Load()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ask(clock: Clock) -> Callable[..., Any]:
    """Call a ledger's method by its name."""
    ledger = LocalLedger(clock=clock)
    return lambda name, *arguments, **options: asyncio.run(getattr(ledger, name)(*arguments, **options))


def test_a_story_has_one_owner_and_numbers_only_grow(ask: Callable[..., Any], clock: Clock) -> None:
    first = ask("claim", "a", "story_1")
    assert first and ask("claim", "b", "story_1") is None and ask("claim", "a", "story_1") is None
    clock.now = 0.9 * LEASE_S
    assert ask("heartbeat", "a", {"story_1": first}, NONE).lost == {}
    clock.now = 1.8 * LEASE_S
    assert ask("claim", "b", "story_1") is None  # it was renewed
    ask("release", "story_1", first)
    second = ask("claim", "b", "story_1")
    assert second > first
    ask("release", "story_1", first)  # an earlier owner cannot give it back again
    assert ask("claim", "c", "story_1") is None
    assert ask("heartbeat", "a", {"story_1": first}, NONE).lost == {"story_1": first}


def test_the_stories_of_a_silent_front_are_told_of_and_taken(ask: Callable[..., Any], clock: Clock) -> None:
    first = ask("claim", "a", "story_1")
    clock.now = LEASE_S
    assert ask("heartbeat", "b", {}, NONE).orphans == ("story_1",)
    assert ask("heartbeat", "a", {"story_1": first}, NONE).lost == {}  # it was only slow
    clock.now = 2 * LEASE_S
    taken = ask("claim", "b", "story_1")
    assert taken > first
    assert ask("heartbeat", "a", {"story_1": first}, NONE).lost == {"story_1": first}


def test_a_new_ledger_learns_who_owns_what_before_anything_is_taken_up(clock: Clock) -> None:
    async def use() -> None:
        old, new = LocalLedger(clock=clock), LocalLedger(clock=clock)
        held = {"story_1": await old.claim("a", "story_1") or 0}
        assert (await old.heartbeat("a", held, NONE)).epoch != (await new.heartbeat("b", {}, NONE)).epoch
        assert await new.claim("a", "story_1") is None  # too soon: another front lives
        assert await new.claim("a", "story_2", is_new=True)
        clock.now = 0.9 * GRACE_S
        assert (await new.heartbeat("a", held, NONE)).lost == {}
        clock.now = 1.1 * GRACE_S
        assert await new.claim("b", "story_1") is None
        assert (await new.claim("b", "story_3") or 0) > held["story_1"]

    asyncio.run(use())


def test_a_beat_that_was_sent_before_does_not_bring_a_lease_back(ask: Callable[..., Any], clock: Clock) -> None:
    clock.now = GRACE_S
    number = ask("claim", "a", "story_1")
    ask("release", "story_1", number)
    ask("heartbeat", "a", {"story_1": number}, NONE)
    assert ask("claim", "b", "story_1")


def test_what_a_dead_front_had_begun_is_forgotten(ask: Callable[..., Any], clock: Clock) -> None:
    limits = {"per_minute": 60, "concurrent": 1}
    ask("heartbeat", "a", {}, Load(num_running=3))
    assert ask("begin", "a", "alice", **limits) == 0
    assert ask("begin", "b", "alice", **limits) > 0
    assert ask("heartbeat", "b", {}, NONE).load.num_running == 3
    clock.now = LEASE_S
    assert ask("heartbeat", "b", {}, NONE).load.num_running == 0
    assert ask("begin", "b", "alice", **limits) == 0
    ask("end", "b", "alice")
    ask("end", "b", "alice")  # of one that another ledger has seen begin
    assert ask("begin", "b", "alice", **limits) == 0


def test_events_are_relayed_while_somebody_asks(ask: Callable[..., Any], clock: Clock) -> None:
    assert ask("read", "story_1", 0) is None
    number = ask("claim", "a", "story_1")
    assert not ask("publish", "story_1", number, 0, ["one"])  # nobody asks
    assert ask("read", "story_1", 0).events == ()
    assert ask("heartbeat", "a", {"story_1": number}, NONE).followed == ("story_1",)
    assert ask("publish", "story_1", number, 0, ["one", "two"])
    assert ask("read", "story_1", 1).events == ("two",)
    ask("release", "story_1", number)
    assert ask("publish", "story_1", number, 2, ["done"])
    assert ask("read", "story_1", 2).events == ("done",)
    assert ask("read", "story_1", 3) is None
    clock.now = READER_S
    assert not ask("publish", "story_1", number, 3, ["late"])
    ask("heartbeat", "b", {}, NONE)
    assert ask("read", "story_1", 0) is None


def test_another_owner_tells_a_story_from_its_beginning(ask: Callable[..., Any], clock: Clock) -> None:
    first = ask("claim", "a", "story_1")
    ask("read", "story_1", 0)
    ask("publish", "story_1", first, 0, ["one"])
    clock.now = LEASE_S
    second = ask("claim", "b", "story_1")
    part = ask("read", "story_1", 1)
    assert (part.number, part.events) == (second, ())
    assert not ask("publish", "story_1", first, 1, ["two"])
    assert ask("publish", "story_1", second, 0, ["one again"])
    assert ask("read", "story_1", 0).events == ("one again",)


def test_admission_counts_what_other_fronts_have_promised() -> None:
    here, there = (Admission(max_wait_s=1e9, max_running=2) for _ in range(2))
    alone_s = here.wait_s(story())
    there.reserve(story())
    here.others = there.load
    assert here.wait_s(story()) == pytest.approx(2 * alone_s)  # twice the work for the same engines
    reservation = here.reserve(story())
    assert here.is_full
    with pytest.raises(Overloaded, match="2 requests are running"):
        here.reserve(story())
    reservation.release()
    here.others = Load.total([])
    assert not here.is_full and here.wait_s(story()) == pytest.approx(alone_s)


def test_events_that_would_leave_a_gap_are_not_taken(ask: Callable[..., Any]) -> None:
    """A ledger that is new has none of those before: the publisher begins again."""
    number = ask("claim", "a", "story_1")
    ask("read", "story_1", 0)
    assert not ask("publish", "story_1", number, 2, ["third"])
    assert ask("publish", "story_1", number, 0, ["first", "second"]) and ask("publish", "story_1", number, 2, ["third"])
    assert ask("read", "story_1", 0).events == ("first", "second", "third")
