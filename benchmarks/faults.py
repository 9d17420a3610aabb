"""A server whose processes are killed while stories are made: `python -m benchmarks.faults [--kind K] [--count 20]`.

    generator, decoder   the engines' replicas
    front                one of the two replicas behind HTTP, which own the stories under way
    fronts               both at once
    ledger               what the fronts agree by
    proxy                Serve's own HTTP process
    serve                every process of the server and of its Ray; it is then started again

Each round posts some stories, follows them as a browser does (a lost stream is taken up with `Last-Event-ID`), kills
one victim with SIGKILL at a seeded random moment, and waits for the end of all. Then every story has to be done, with
each of its pages once and a picture on each; pictures that were finished before the kill have to be the same bytes,
and what a reader was told has to be what is stored. Named points are the same with a moment that the story gives.
The same command resumes after a stop; the figures go into benchmarks/results/faults.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.followed import ROUND_S, WRONG, Reader, finished_pictures, verdict, wait_for
from benchmarks.quality import machine
from benchmarks.victims import TITLES, find, kill
from minigpt5.story.store import StoryStore

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
KINDS = ("generator", "decoder", "front", "fronts", "ledger", "proxy", "serve")
POINTS = ("before-text", "mid-text", "mid-picture", "picture-written", "recovering")
NUM_FRONTS = 2
NUM_STORIES, NUM_PAGES, STEPS = 3, 3, 12
START_S = 240.0
MAX_WAIT_S = 3000
"""No story is refused because those before it, which a kill delayed, were late."""


class Server:
    """`python -m deployments`, as often as it has to be started."""

    def __init__(self, folder: Path, port: int) -> None:
        self.storage, self.log, self.port = folder / "storage", folder / "log", port
        self.url, self.store = f"http://127.0.0.1:{port}", StoryStore(str(self.storage))
        self.num_kills = 0
        """Kills of a single front."""
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "deployments", "--port", str(self.port), "--storage", str(self.storage)]
        command += ["--fronts", str(NUM_FRONTS), "--max-wait-s", str(MAX_WAIT_S)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + START_S
        while not self.is_ready():
            assert self.process.poll() is None and time.monotonic() < deadline, f"the server did not start: {self.log}"
            time.sleep(0.2)

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=10, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def find(self, kind: str) -> list[psutil.Process]:
        """The processes of a kind that live now."""
        return find([psutil.Process(self.process.pid)], "" if kind == "serve" else TITLES[kind])

    def kill(self, kind: str) -> int:
        """SIGKILL; how many processes it hit."""
        victims = self.find(kind)
        if kind == "front":
            victims = victims[: self.num_kills % 2 + 1][-1:]  # one, then the other
            self.num_kills += 1
        kill(victims)
        if kind == "serve":
            self.process.wait()
            psutil.wait_procs(victims, timeout=30)
            self.start()
        return len(victims)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def post_stories(server: Server, seed: int) -> list[Reader]:
    readers = []
    for number in range(NUM_STORIES):
        body = {
            "prompt": f"A fox and {number} balloons, number {seed}",
            "pages": NUM_PAGES,
            "seed": 100 * seed + number,
            "steps": STEPS,
        }
        reader = Reader(server.url, body, key=f"{seed}-{number}")
        reader.post()
        assert reader.is_accepted, f"a story was not accepted: {reader.status}"
        readers.append(reader)
    return readers


def round_of(server: Server, kind: str, seed: int, *, moment: Callable[[list[Reader]], None]) -> dict[str, Any]:
    """One kill, when `moment` returns, and what came of it."""
    readers = post_stories(server, seed)
    for reader in readers:
        reader.start()
    began = time.monotonic()
    moment(readers)
    in_flight = sum(reader.is_under_way for reader in readers)
    after_s = time.monotonic() - began
    num_killed = server.kill(kind)
    # Nothing is written any more by who is dead.
    before = finished_pictures(server.store, [reader.story_id for reader in readers])
    for reader in readers:
        reader.join(ROUND_S)
    recovered_s = time.monotonic() - began - after_s
    return {
        "kind": kind,
        "seed": seed,
        "after_s": round(after_s, 2),
        "killed": num_killed,
        "stories": len(readers),
        "in_flight": in_flight,
        **verdict(readers, server.store, before),
        "recovered_s": round(recovered_s, 1),
    }


def kill_at(server: Server, point: str, seed: int) -> dict[str, Any]:
    """One death at a named point: of both fronts, one of which owns the story."""

    def moment(readers: list[Reader]) -> None:
        match point:
            case "before-text":
                return
            case "mid-text":
                wait_for(lambda: any(reader.has("text") for reader in readers))
            case "mid-picture":
                wait_for(lambda: any(reader.has("progress") for reader in readers))
            case "picture-written":
                folders = [server.storage / "stories" / reader.story_id / "pages/1" for reader in readers]
                wait_for(lambda: any((folder / "picture.png").exists() for folder in folders))
            case "recovering":
                wait_for(lambda: any(reader.has("image") for reader in readers))
                server.kill("fronts")
                wait_for(lambda: len(server.find("fronts")) == NUM_FRONTS)
                time.sleep(1)

    for attempt in range(20):
        result = round_of(server, "fronts", seed + attempt, moment=moment)
        result |= {"kind": "point", "point": point, "attempts": attempt + 1}
        # A picture that is written is announced within a moment: a kill that came too late shows nothing.
        if point != "picture-written" or result["pictures_finished_before"] == 0:
            break
    return result


def table(rounds: list[dict[str, Any]]) -> str:
    keys = ("stories", "in_flight", "lost", "pages_missing", "pages_twice", "pictures_missing", "pictures_changed")
    keys += ("pages_told_otherwise", "restarts")
    lines = [
        f"{'killed':24}{'kills':>6}" + "".join(f"{key.replace('pages_', '').replace('_', ' '):>17}" for key in keys)
    ]
    for name in [*KINDS, *(f"point {point}" for point in POINTS)]:
        found = [one for one in rounds if name in (one["kind"], f"point {one.get('point')}")]
        if found:
            sums = (sum(one[key] for one in found) for key in keys)
            lines.append(f"{name:24}{len(found):6}" + "".join(f"{value:17}" for value in sums))
    return "\n".join(lines)


def save(rounds: list[dict[str, Any]]) -> None:
    ratios = {key: sum(one[key] for one in rounds) for key in WRONG} | {"kills": len(rounds)}
    report = {"ratios": ratios, "figures": {"rounds": rounds}, "machine": machine(), "command": "make faults"}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kind", choices=(*KINDS, "point"), help="(default: all)")
    parser.add_argument("--count", type=int, default=20, help="kills of each kind (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=7200, help="begin no further kill after (default %(default)g)")
    parser.add_argument("--port", type=int, default=8192)
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    rounds: list[dict[str, Any]] = json.loads(RESULTS.read_text())["figures"]["rounds"] if RESULTS.exists() else []
    os.environ["RAY_AUTH_MODE"] = "disabled"  # it listens on this machine alone, for as long as this process lives
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), options.port)
        try:
            for point in POINTS:
                is_asked = options.kind in (None, "point") and not any(one.get("point") == point for one in rounds)
                if is_asked and time.monotonic() < until:
                    rounds.append(kill_at(server, point, 9000 + 100 * POINTS.index(point)))
                    save(rounds)
            for kind in KINDS:
                while options.kind in (None, kind) and time.monotonic() < until:
                    done = sum(one["kind"] == kind for one in rounds)
                    if done >= options.count:
                        break
                    rng = random.Random(f"{kind}/{done}")
                    delay = rng.uniform(0.1, 5)
                    seed = 1 + 1000 * KINDS.index(kind) + done
                    rounds.append(round_of(server, kind, seed, moment=lambda _, delay=delay: time.sleep(delay)))
                    save(rounds)
        finally:
            server.end()
    print(table(rounds))


if __name__ == "__main__":
    main()
