"""Who has a turn at an engine that has its own scheduler."""

from __future__ import annotations

import asyncio

from minigpt5.engine.turns import Turns


def test_a_client_with_few_waits_for_no_other_ones_many() -> None:
    ends: list[str] = []

    async def one(turns: Turns, key: str) -> None:
        async with turns.turn(key):
            await asyncio.sleep(0.001)
        ends.append(key)

    async def together() -> None:
        turns = Turns(2)
        many = [asyncio.create_task(one(turns, "many")) for _ in range(10)]
        await asyncio.sleep(0)
        assert (turns.num_running, turns.num_waiting) == (2, 8)
        await one(turns, "few")
        assert turns.num_waiting >= 6
        await asyncio.gather(*many)
        assert (turns.num_running, turns.num_waiting) == (0, 0)

    asyncio.run(together())
    assert ends.index("few") <= 4


def test_some_places_are_left_to_clients_without_a_turn() -> None:
    async def together() -> None:
        turns = Turns(4, reserved=1)
        many = [await hold(turns, "many") for _ in range(5)]
        assert (turns.num_running, turns.num_waiting) == (3, 2)
        few = await hold(turns, "few")
        assert turns.num_running == 4
        for task in [*many, few]:
            task.cancel()
        await asyncio.gather(*many, few, return_exceptions=True)
        assert (turns.num_running, turns.num_waiting) == (0, 0)

    asyncio.run(together())


def test_one_place_serves_everybody() -> None:
    async def one() -> int:
        turns = Turns(1, reserved=1)
        for _ in range(3):
            async with turns.turn("a"):
                pass
        return turns.num_running

    assert asyncio.run(one()) == 0


def test_a_cancelled_turn_goes_to_the_next() -> None:
    async def together() -> None:
        turns = Turns(1)
        first, second, third = [await hold(turns, key) for key in "abc"]
        second.cancel()
        first.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        assert (turns.num_running, turns.num_waiting) == (1, 0)
        third.cancel()
        await asyncio.gather(third, return_exceptions=True)
        assert turns.num_running == 0

    asyncio.run(together())


def test_a_turn_that_ends_while_a_waiting_one_is_cancelled_fails_nobody_and_all_are_counted() -> None:
    async def together() -> None:
        turns, go = Turns(2), asyncio.Event()

        async def have(key: str) -> str:
            async with turns.turn(key):
                await go.wait()
            return key

        held = await hold(turns, "a")
        ending, cancelled, last = [asyncio.create_task(have(key)) for key in "baa"]
        await asyncio.sleep(0)
        go.set()  # the first one's task runs before that of the second, which is cancelled meanwhile
        cancelled.cancel()
        ends = await asyncio.gather(ending, cancelled, last, return_exceptions=True)
        assert (ends[0], type(ends[1]), ends[2]) == ("b", asyncio.CancelledError, "a")
        assert (turns.num_running, turns.num_waiting) == (1, 0)
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
        assert turns.num_running == 0

    asyncio.run(together())


async def hold(turns: Turns, key: str) -> asyncio.Task[None]:
    """A task that has a turn, or waits for one, until it is cancelled."""

    async def have() -> None:
        async with turns.turn(key):
            await asyncio.Event().wait()

    task = asyncio.create_task(have())
    for _ in range(3):
        await asyncio.sleep(0)
    return task
