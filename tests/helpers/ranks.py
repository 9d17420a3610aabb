"""A program in several processes that find each other as torchrun's do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900
# gloo's threads that still run when a process ends abort it, now and then.
END = """
from torch import distributed as group_of_ranks
if group_of_ranks.is_initialized():
    group_of_ranks.destroy_process_group()
"""


def run_ranks(program: str, arguments: list[str], *, num: int) -> list[str]:
    """Run Python code in `num` processes of one machine, and return what each printed. Raises AssertionError where one
    of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program + END, *arguments],
            cwd=ROOT,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(num)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return outputs
