"""Readers of the store do not wait for its writers, and every use of the store says which it is."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from pathlib import Path

from deployments.stories.store_threads import NUM_THREADS, reading, writing
from tests.helpers.processes import ROOT
from tests.helpers.served import Served


def test_a_reader_passes_writers_who_wait_for_a_broken_store(tmp_path: Path) -> None:
    served, mends = Served(tmp_path), threading.Event()
    story_id = served.post({"prompt": "A fox", "pages": 1}).json()["id"]

    async def use() -> float:
        writers = [asyncio.create_task(writing(mends.wait, 30)) for _ in range(2 * NUM_THREADS)]
        await asyncio.sleep(0.1)  # all threads for writers are taken, and as many wait
        began = time.monotonic()
        assert (await reading(served.store.load, story_id)).status == "done"
        waited_s = time.monotonic() - began
        mends.set()
        assert all(await asyncio.gather(*writers))
        return waited_s

    assert asyncio.run(use()) < 5


def test_no_use_of_the_store_takes_a_thread_of_others() -> None:
    """asyncio.to_thread has a few threads for all of the process, which name servers are asked on as well."""
    found = {
        f"{path.name}: {line.strip()}"
        for path in (ROOT / "deployments").rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"to_thread\(.*(store|_keep|keep\b|_begin)", line)
    }
    assert not found
