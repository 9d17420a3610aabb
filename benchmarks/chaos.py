"""A cluster that breaks while stories are asked for: `python -m benchmarks.chaos [--only NAME ...] [--missing]`.

    nothing                       for comparison
    generator, decoder, front     one of the two replicas is killed
    ledger, controller            the only one is
    proxy                         one of Serve's HTTP processes
    raylet                        Ray's own process of the worker that has most replicas
    head                          every process of the head at once; Redis keeps the state, and the next head comes
    drain                         a worker is announced to go, and goes
    overload                      five times what the cluster can make, for five minutes
    disk-full                     the file system of the stories has no room for a while
    storage-slow, storage-lost    the S3 server of the stories is slow and fails, or answers nothing for a while

The cluster is `benchmarks/local_cluster.py`. A dozen stories are asked for, one after another, each with an
Idempotency-Key, and followed as a browser does. Something breaks at a seeded moment. Then every accepted story has to
be done, with each of its pages once; pictures that were finished before have to be the same bytes. The seconds to the
next page are those of the slowest story in flight, from the kill, or from the end of what the storage lacked. What
cannot be tried here is a row with its reason. The figures go into benchmarks/results/chaos.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.followed import ROUND_S, WRONG, Reader, finished_pictures, verdict, wait_for
from benchmarks.load import WHAT, WHO
from benchmarks.local_cluster import LocalCluster, Node, local_cluster
from benchmarks.overload import overload
from benchmarks.quality import machine
from benchmarks.victims import TITLES, find, kill
from minigpt5.errors import StoryNotFound
from minigpt5.story.store import StoryStore
from tests.helpers.s3 import MOTO, Faults, failing_s3, running_s3, variables

RESULTS = Path(__file__).parent / "results" / "chaos.json"
NUM_STORIES, NUM_PAGES, GAP_S = 12, 3, 2.5
"""A round: so many stories, each so many seconds after the one before."""
HEAD_AWAY_S = 5.0
DRAIN_S = 45
DISK_MIB, FULL_S = 32, 20.0
OUTAGE_S = 45.0
"""Longer than a store waits for one write."""
SLOW_S = 30.0
OVERLOAD_S, MAX_WAIT_S = 300.0, 60.0

Row = dict[str, Any]


class NotHere(Exception):
    """A scenario cannot be tried on this machine; the message says why."""


class Trial:
    """One round: stories that are asked for one after another, while something breaks."""

    def __init__(
        self, url: str, store: StoryStore, name: str, seed: int, *, num: int = NUM_STORIES, gap_s: float = GAP_S
    ) -> None:
        """`num` stories, each `gap_s` after the one before, from the server at `url` with this `store`."""
        self.url, self.store, self.name, self.seed, self._gap_s = url, store, name, seed, gap_s
        self.random = random.Random(f"{name}/{seed}")
        self.readers = [self._reader(number) for number in range(num)]
        self.marks: list[tuple[float, list[Reader]]] = []
        self.before: dict[tuple[str, int], str] = {}
        self._known = set(self.store.list_ids())

    def _reader(self, number: int) -> Reader:
        who, what = WHO[number % len(WHO)], WHAT[self.seed % len(WHAT)]
        body = {
            "prompt": f"A {who} who finds a {what}, {self.name} {self.seed}",
            "pages": NUM_PAGES,
            "seed": 100 * self.seed + number,
        }
        return Reader(self.url, body, key=f"{self.name}-{self.seed}-{number}")

    def mark(self) -> None:
        """Note that what broke a moment ago may recover from now on, and which stories are in flight."""
        self.marks.append((time.monotonic(), [reader for reader in self.readers if reader.is_under_way]))

    def note_pictures(self) -> None:
        """Note the pictures that are finished now."""
        self.before = finished_pictures(self.store, [one.story_id for one in self.readers if one.is_accepted])

    def run(self, strike: Callable[[Trial], Row]) -> Row:
        """The figures. `strike`: breaks something and marks the moment; returns what else is to be reported."""
        posting = threading.Thread(target=self._post, daemon=True)
        posting.start()
        wait_for(lambda: any(reader.has("text") for reader in self.readers), pause_s=0.02)
        after_s = self.random.uniform(0.1, 0.7) * len(self.readers) * self._gap_s
        time.sleep(after_s)
        more = strike(self)
        posting.join()
        for reader in self.readers:
            reader.join(ROUND_S)
        return {"scenario": self.name, "seed": self.seed, "after_s": round(after_s, 2), **self._figures(), **more}

    def _post(self) -> None:
        began = time.monotonic()
        for number, reader in enumerate(self.readers):
            time.sleep(max(0.0, began + number * self._gap_s - time.monotonic()))
            reader.start()

    def _figures(self) -> Row:
        found = verdict(self.readers, self.store, self.before)
        accepted = sum(reader.is_accepted for reader in self.readers)
        unanswered = sum(not reader.status for reader in self.readers)
        waits = [reader.next_page_s(since) for since, readers in self.marks for reader in readers]
        return {
            "accepted": accepted,
            "finished": accepted - found["lost"],
            "refused": len(self.readers) - accepted - unanswered,
            "unanswered": unanswered,
            "lost": found["lost"],
            "doubled": found["pages_twice"] + self._num_stories_twice(),
            "damaged": sum(found[name] for name in WRONG if name not in ("lost", "pages_twice")),
            "in_flight": max((len(readers) for _, readers in self.marks), default=0),
            "next_page_s": round(max(waits), 1) if waits else None,
            **{name: found[name] for name in ("pictures_finished_before", "restarts", "streams_lost")},
        }

    def _num_stories_twice(self) -> int:
        """Stories beside the accepted ones that somebody asked for: a repeated post has begun them once more."""
        accepted = {reader.story_id: reader.body["prompt"] for reader in self.readers if reader.is_accepted}
        num = 0
        for story_id in set(self.store.list_ids()) - self._known - accepted.keys():
            with contextlib.suppress(StoryNotFound):
                num += self.store.load(story_id).prompt in accepted.values()
        return num


class Chaos:
    """The cluster, its storage, and what can be done to them."""

    def __init__(self, cluster: LocalCluster, folder: Path, faults: Faults) -> None:
        self.cluster, self.faults, self.folder = cluster, faults, folder
        self._storage = ""

    def serve(self, storage: str = "") -> StoryStore:
        """Have the application on a storage, by default a folder. Serve starts all replicas again where it changes."""
        storage = storage or str(self.folder / "stories")
        if storage != self._storage:
            self.cluster.deploy(storage=storage, max_wait_s=MAX_WAIT_S)
            self._storage = storage
        return StoryStore(storage)

    def trial(self, name: str, seed: int, *, storage: str = "") -> Trial:
        """A round on this cluster."""
        return Trial(self.cluster.url, self.serve(storage), name, seed)

    def busiest_worker(self) -> Node:
        """The worker that has most replicas."""
        return max(self.cluster.workers, key=Node.num_replicas)


def nothing(chaos: Chaos, name: str, seed: int) -> Row:
    """Break nothing."""

    def strike(trial: Trial) -> Row:
        trial.mark()
        return {}

    return chaos.trial(name, seed).run(strike)


def kill_process(chaos: Chaos, name: str, seed: int) -> Row:
    """Kill one process of the kind that the scenario is named for."""

    def strike(trial: Trial) -> Row:
        victims = find(chaos.cluster.roots, TITLES[name])
        kill([trial.random.choice(victims)])
        trial.mark()
        trial.note_pictures()
        return {"of": len(victims)}

    return chaos.trial(name, seed).run(strike)


def kill_raylet(chaos: Chaos, name: str, seed: int) -> Row:
    """Kill Ray's process of the worker that has most replicas; the next machine comes after it."""

    def strike(trial: Trial) -> Row:
        node = chaos.busiest_worker()
        found = {"replicas": node.num_replicas()}
        node.kill_raylet()
        trial.mark()
        trial.note_pictures()
        chaos.cluster.add_worker()
        node.clean_up()
        return found

    return chaos.trial(name, seed).run(strike)


def kill_head(chaos: Chaos, name: str, seed: int) -> Row:
    """Kill every process of the head; the next one finds its state in Redis."""
    if not chaos.cluster.has_redis:
        raise NotHere("there is no redis-server on the PATH: apt-get install redis-server")

    def strike(trial: Trial) -> Row:
        killed_at = time.monotonic()
        chaos.cluster.head.kill()
        trial.mark()
        trial.note_pictures()
        time.sleep(HEAD_AWAY_S)
        chaos.cluster.start_head()
        return {"head_back_s": round(time.monotonic() - killed_at, 1)}

    return chaos.trial(name, seed).run(strike)


def drain(chaos: Chaos, name: str, seed: int) -> Row:
    """Announce that a worker goes away, as a cloud does of a spot machine, and take it away."""

    def strike(trial: Trial) -> Row:
        node = chaos.busiest_worker()
        found = {"replicas": node.num_replicas()}
        chaos.cluster.add_worker()
        gone_at = time.monotonic() + DRAIN_S
        chaos.cluster.drain(node, DRAIN_S)
        trial.mark()
        while time.monotonic() < gone_at and node.num_replicas():
            time.sleep(0.2)
        found["replicas_at_the_end"] = node.num_replicas()
        node.kill()
        trial.mark()
        trial.note_pictures()
        return found

    return chaos.trial(name, seed).run(strike)


def fill_disk(chaos: Chaos, name: str, seed: int) -> Row:
    """Leave no room on the file system of the stories, for a while."""

    def strike(trial: Trial) -> Row:
        ballast = disk / "ballast"
        fill(ballast)
        trial.note_pictures()
        time.sleep(FULL_S)
        ballast.unlink()
        trial.mark()
        return {"seconds": FULL_S}

    with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder)) as disk:
        return chaos.trial(name, seed, storage=str(disk / "stories")).run(strike)


def fail_storage(chaos: Chaos, name: str, seed: int) -> Row:
    """Have the S3 server of the stories fail: half of its requests, or all."""
    if not MOTO.is_file():
        raise NotHere("there is no S3 server: make install-s3")
    is_lost = name == "storage-lost"

    def strike(trial: Trial) -> Row:
        faults = chaos.faults
        faults.counts.clear()
        if not is_lost:
            trial.mark()
        faults.rate, faults.kinds = (1.0, ("drop",)) if is_lost else (0.5, ("delay", "drop", "slow down", "error"))
        time.sleep(OUTAGE_S if is_lost else SLOW_S)
        faults.rate = 0.0
        if is_lost:
            trial.mark()
        return {"seconds": OUTAGE_S if is_lost else SLOW_S, "faults": dict(faults.counts)}

    return chaos.trial(name, seed, storage="s3://bucket/stories").run(strike)


def ask_too_much(chaos: Chaos, name: str, seed: int, *, seconds: float = OVERLOAD_S) -> Row:
    """Ask for five times what the cluster can make."""
    store = chaos.serve()
    known = set(store.list_ids())
    found = overload(chaos.cluster.url, seconds=seconds, roots=chaos.cluster.roots)
    ends = found["ends"]
    refused = sum(number for end, number in ends.items() if end.isdigit())
    accepted, finished = sum(ends.values()) - refused, ends.get("done", 0)
    made = len(set(store.list_ids()) - known) - found["probes"]
    return {
        "scenario": name,
        "seed": seed,
        "accepted": accepted,
        "finished": finished,
        "refused": refused,
        "lost": accepted - finished,
        "doubled": max(0, made - accepted),
        "next_page_s": None,
        **found,
    }


SCENARIOS: dict[str, Callable[[Chaos, str, int], Row]] = {
    "nothing": nothing,
    **dict.fromkeys(("generator", "decoder", "front", "ledger", "controller", "proxy"), kill_process),
    "raylet": kill_raylet,
    "head": kill_head,
    "drain": drain,
    "overload": ask_too_much,
    "disk-full": fill_disk,
    **dict.fromkeys(("storage-slow", "storage-lost"), fail_storage),
}


def fill(ballast: Path) -> None:
    """Write until there is no room."""
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"0" * size)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a file system of DISK_MIB there. Raises NotHere where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        raise NotHere(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def made_chaos() -> Iterator[Chaos]:
    """The cluster, with an S3 server where there is one."""
    with contextlib.ExitStack() as stack:
        # Ray's sockets lie in the folder, and a socket's path has at most 107 bytes.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)))
        faults, environment = Faults(), {}
        if MOTO.is_file():
            direct = stack.enter_context(running_s3(folder))
            os.environ.update(variables(direct))  # what is looked at here is looked at without faults
            environment = variables(stack.enter_context(failing_s3(direct, faults)))
        cluster = stack.enter_context(local_cluster(folder, environment))
        yield Chaos(cluster, folder, faults)


def save(found: Mapping[str, Row], out: Path) -> None:
    """A row of each scenario, and ratios; one that was not tried has a reason, and counts nowhere."""
    rows = [found.get(name, {"scenario": name, "reason": "not run"}) for name in SCENARIOS]
    tried = [row for row in rows if "reason" not in row]
    waits = {row["scenario"]: row["next_page_s"] for row in tried if row["next_page_s"] is not None}
    memory = [row["memory_after"] for row in tried if "memory_after" in row]
    ratios = {
        "lost": sum(row["lost"] for row in tried),
        "doubled": sum(row["doubled"] for row in tried),
        "damaged": sum(row.get("damaged", 0) for row in tried),
        "recovery_s_max": max((wait for name, wait in waits.items() if name != "head"), default=None),
        "head_recovery_s": waits.get("head"),
        "memory_after_overload": memory[0] if memory else None,
    }
    report = {"ratios": ratios, "figures": {"scenarios": rows}, "machine": machine(), "command": "make chaos"}
    out.write_text(json.dumps(report, indent=1) + "\n")


def try_one(chaos: Chaos, name: str, seed: int) -> Row:
    """The row of a scenario; the cluster is whole afterwards."""
    began = time.monotonic()
    try:
        row = SCENARIOS[name](chaos, name, seed)
    except NotHere as reason:
        return {"scenario": name, "reason": str(reason)}
    chaos.cluster.wait_until_whole()
    return {**row, "whole_after_s": round(time.monotonic() - began, 1)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="(default: all)")
    parser.add_argument("--missing", action="store_true", help="only those that the results do not have yet")
    parser.add_argument("--seconds", type=float, default=2400, help="begin none after (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and of the stories")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    until = time.monotonic() + options.seconds
    known = json.loads(options.out.read_text())["figures"]["scenarios"] if options.out.exists() else []
    rows = {row["scenario"]: row for row in known if "reason" not in row}
    names = [name for name in options.only if not (options.missing and name in rows)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the cluster ends, too
    with made_chaos() as chaos:
        for name in names:
            if time.monotonic() < until:
                rows[name] = try_one(chaos, name, options.seed)
                save(rows, options.out)
                print(json.dumps(rows[name]), flush=True)


if __name__ == "__main__":
    main()
