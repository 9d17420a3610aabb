"""States come back by their tickets, over a real socket."""

from __future__ import annotations

import asyncio
import socket

import numpy as np
import pytest

from minigpt5.engine.vllm.mailbox import Mailbox

SHAPE = (2, 3)


def frame(ticket: bytes, value: float) -> bytes:
    return ticket + np.full(SHAPE, value, np.float32).tobytes()


async def opened(ends: list[str]) -> tuple[Mailbox, socket.socket]:
    mailbox = Mailbox(SHAPE, on_closed=lambda: ends.append("closed"))
    await mailbox.open()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"\0{mailbox.address}")
    return mailbox, connection


def test_each_ticket_gets_its_own_states_and_nobody_those_of_a_ticket_that_is_gone() -> None:
    async def run() -> None:
        mailbox, connection = await opened([])
        with mailbox.expect(b"a" * 16) as first, mailbox.expect(b"b" * 16) as second:
            with mailbox.expect(b"c" * 16):
                pass
            sent = frame(b"c" * 16, 3) + frame(b"b" * 16, 2) + frame(b"a" * 16, 1)
            for at in range(0, len(sent), 7):  # frames arrive in pieces
                connection.sendall(sent[at : at + 7])
                await asyncio.sleep(0)
            assert (await first == 1).all() and (await second == 2).all() and (await first).shape == SHAPE
        assert mailbox.num_expected == 0
        await mailbox.close()
        connection.close()

    asyncio.run(run())


def test_the_end_of_a_process_is_heard() -> None:
    ends: list[str] = []

    async def run() -> None:
        mailbox, connection = await opened(ends)
        await asyncio.sleep(0.01)
        connection.close()
        async with asyncio.timeout(5):
            while not ends:
                await asyncio.sleep(0.01)
        await mailbox.close()

    asyncio.run(run())
    assert ends == ["closed"]


def test_nothing_lies_on_a_disk_and_a_closed_mailbox_is_gone() -> None:
    async def run() -> str:
        mailbox, connection = await opened([])
        await mailbox.close()
        connection.close()
        return mailbox.address

    address = asyncio.run(run())
    with pytest.raises(ConnectionRefusedError):
        socket.socket(socket.AF_UNIX).connect(f"\0{address}")
