"""The backend's end of the seam: states come back from vLLM's process by the ticket of their request.

It is a socket in Linux's abstract namespace, so nothing lies on a disk, and nothing stays when a process is killed.
The kernel says who connects: only processes of the same user may. They end when this end is closed (connector.py).

Shape letters: H hidden width, V vokens of a picture.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import struct
from collections.abc import Callable, Iterator

import numpy as np

TICKET_BYTES = 16


class Mailbox:
    """Frames of a ticket and its states. All calls are made in one event loop."""

    def __init__(self, shape: tuple[int, int], *, on_closed: Callable[[], None]) -> None:
        """`shape` of the states. `on_closed`: called when a process that had connected is gone."""
        self.address = f"minigpt5-{secrets.token_hex(16)}"
        self._shape, self._on_closed = shape, on_closed
        self._expected: dict[bytes, asyncio.Future[np.ndarray]] = {}
        self._server: asyncio.Server | None = None

    @property
    def num_expected(self) -> int:
        """Tickets that are out."""
        return len(self._expected)

    async def open(self) -> None:
        self._server = await asyncio.start_unix_server(self._receive, path=f"\0{self.address}")

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()

    @contextlib.contextmanager
    def expect(self, ticket: bytes) -> Iterator[asyncio.Future[np.ndarray]]:
        """What comes under a ticket, (V, H) float32; what comes after the context is dropped."""
        self._expected[ticket] = asyncio.get_running_loop().create_future()
        try:
            yield self._expected[ticket]
        finally:
            del self._expected[ticket]

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        credentials = writer.get_extra_info("socket").getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
        )
        if struct.unpack("3i", credentials)[1] != os.getuid():
            writer.close()
            return
        num_bytes = TICKET_BYTES + 4 * self._shape[0] * self._shape[1]
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                frame = await reader.readexactly(num_bytes)
                states = self._expected.get(frame[:TICKET_BYTES])
                if states is not None and not states.done():
                    states.set_result(np.frombuffer(frame, np.float32, offset=TICKET_BYTES).reshape(self._shape))
        self._on_closed()
