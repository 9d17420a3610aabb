"""Bulk illustration: `python -m benchmarks.bulk [kills|speed|memory|scaling]`, all of them without a word.

    kills     benchmarks/kills.py; goes on where it was stopped, `--seconds` is what one call may take
    speed     rows/s of a job against the same engines in one process with the best fixed batches
    memory    RSS of all processes and the object store over 2,000 pictures at 4 steps
    scaling   pictures/s with 1, 2 and 4 decoders, simulated ones where the machine has not the cores

Prints the tables and puts the figures into benchmarks/results/bulk.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from batch_jobs.failpoints import POINTS
from benchmarks import bulk_speed
from benchmarks.kills import KINDS, kill_at, kill_many, make_reference, table, write_input
from benchmarks.quality import machine

RESULTS = Path(__file__).parent / "results" / "bulk.json"


def load() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"ratios": {}, "figures": {}}


def save(name: str, figures: Any, **ratios: float) -> None:
    results = load()
    results["figures"][name] = figures
    results["ratios"] |= ratios
    results |= {"machine": machine(), "command": "make bench-bulk"}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def kills(options: argparse.Namespace) -> None:
    until = time.monotonic() + options.seconds
    work = Path(options.work).absolute()
    reference = make_reference(write_input(work), work / "reference")
    rounds: list[dict[str, Any]] = load()["figures"].get("kills", [])
    for point in POINTS:
        is_asked = options.kind in (None, "point") and not any(one.get("point") == point for one in rounds)
        if is_asked and time.monotonic() < until:
            rounds.append(kill_at(point, work=work, reference=reference))
            save("kills", rounds)
    for kind in KINDS if options.kind is None else {options.kind} & set(KINDS):
        while time.monotonic() < until:
            done = sum(one["kills"] for one in rounds if one["kind"] == kind)
            if done >= options.count:
                break
            seed = sum(one["kind"] == kind for one in rounds)
            for one in kill_many(kind, options.count - done, seed=seed, work=work, reference=reference, until=until):
                rounds.append(one)
                save("kills", rounds)
    print(table(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("kills", "speed", "memory", "scaling"))
    parser.add_argument("--kind", choices=(*KINDS, "point"), help="of kills (default: all)")
    parser.add_argument("--count", type=int, default=20, help="kills of each kind (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=3600, help="begin no further kill after (default %(default)g)")
    parser.add_argument("--work", default="runs/bulk", help="folder for inputs and outputs (default %(default)s)")
    options = parser.parse_args()
    if options.what in (None, "kills"):
        kills(options)
    measures = {"speed": bulk_speed.speed, "memory": bulk_speed.memory, "scaling": bulk_speed.scaling}
    for name, measure in measures.items():
        if options.what in (None, name):
            figures, ratios = measure(Path(options.work).absolute() / name)
            save(name, figures, **ratios)
            shown = {key: value for key, value in figures.items() if key != "curve"}
            print(json.dumps({**shown, **ratios}, indent=1))


if __name__ == "__main__":
    main()
