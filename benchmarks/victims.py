"""Processes of a server on this machine, by what they are, and their deaths."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import psutil

TITLES = {
    "generator": "ray::ServeReplica:default:VokenGenerator",
    "decoder": "ray::ServeReplica:default:DiffusionDecoder",
    "front": "ray::ServeReplica:default:Ingress",
    "fronts": "ray::ServeReplica:default:Ingress",
    "ledger": "ray::ServeReplica:default:Ledger",
    "proxy": "ray::ProxyActor",
    "controller": "ray::ServeController",
}
"""Kind -> beginning of the command line."""
REPLICA = "ray::ServeReplica"


def family(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The living among `roots` and all that they have started."""
    found = []
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [root, *root.children(recursive=True)]
    return found


def find(roots: Iterable[psutil.Process], title: str) -> list[psutil.Process]:
    """Those of a family whose command line begins with `title`."""
    found = []
    for process in family(roots):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
    return found


def kill(processes: Sequence[psutil.Process], *, wait_s: float = 0.0) -> int:
    """SIGKILL; how many processes were named. `wait_s`: at most so long until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    if wait_s:
        psutil.wait_procs(processes, timeout=wait_s)
    return len(processes)
