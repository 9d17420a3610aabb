"""`python -m deployments.profile URL`: what a page's text and picture take on a running server, for `deployments.plan`.

The server has one replica of each engine, and nobody else uses it. Stories are streamed alone and as many at once as a
generator's batch holds, and their pages redrawn likewise, which only the decoder does. The stories are deleted.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from deployments.autoscaling.stages import Profile, Stage
from deployments.client import Client, ClientError

PROMPT = "A fox who finds a red balloon"
NUM_ALONE = 3
"""Stories, one after another, whose pages are those of a generator that has nothing else to do."""
FIRST_SEED = 700_000

Item = TypeVar("Item")
Result = TypeVar("Result")


def measure(client: Client, *, pages: int, steps: int | None, text_batch: int, picture_batch: int) -> Profile:
    """Both stages. Raises ClientError where the server refuses, or a story fails: its times are those of no story."""
    settings = {"pages": pages} | ({"steps": steps} if steps else {})
    seeds = iter(range(FIRST_SEED, FIRST_SEED + 1_000_000))
    with contextlib.ExitStack() as stories:

        def write(_: int) -> tuple[str, list[float]]:
            return _write(client, lambda name: stories.callback(client.delete, name), seed=next(seeds), **settings)

        def redraw(name: str) -> float:
            began = time.perf_counter()
            client.redraw(name, 1, seed=next(seeds), **({"steps": steps} if steps else {}))
            return time.perf_counter() - began

        write(0)  # the first call is the slowest
        alone = [write(number) for number in range(NUM_ALONE)]
        full = _at_once(write, range(max(text_batch, picture_batch)), num=text_batch)
        names = [name for name, _ in full][:picture_batch]
        drawn_alone = [redraw(name) for name, _ in alone]
        drawn_full = _at_once(redraw, names, num=picture_batch)
    written = [seconds for _, page_s in alone for seconds in page_s]
    return Profile(
        text=_stage(written, [seconds for _, page_s in full for seconds in page_s], text_batch),
        picture=_stage(drawn_alone, drawn_full, picture_batch),
    )


def _write(client: Client, note: Callable[[str], object], **settings: int) -> tuple[str, list[float]]:
    """A story's id, which `note` hears as soon as there is one, and the seconds of each page's text."""
    name, page_s, began = "", [], time.perf_counter()
    for event in client.create(PROMPT, **settings):
        if event.name == "story":
            name = event.data["id"]
            note(name)
        elif event.name == "slot":
            now = time.perf_counter()
            page_s.append(now - began)
            began = now
        elif event.name == "error" or (event.name == "done" and event.data["status"] != "done"):
            why = event.data["error"]["message"] if event.name == "error" else f"it is {event.data['status']}"
            raise ClientError(f"story {name} has no times ({why}): mend that on the server, then measure again")
    return name, page_s


def _at_once(work: Callable[[Item], Result], items: Sequence[Item], *, num: int) -> list[Result]:
    with ThreadPoolExecutor(num) as pool:
        return list(pool.map(work, items))


def _stage(alone: Sequence[float], full: Sequence[float], batch: int) -> Stage:
    mean = statistics.mean(alone)
    return Stage(
        alone_s=round(mean, 4),
        full_s=round(max(mean, statistics.mean(full)), 4),
        batch=batch,
        cv=round(statistics.stdev(alone) / mean, 4),
    )


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deployments.profile", description=__doc__)
    parser.add_argument("url", help="of the server")
    parser.add_argument("--key", default="", help="API key, where the server asks for one")
    parser.add_argument("--pages", type=int, default=4, help="of a story (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of a picture (default: the model's)")
    parser.add_argument(
        "--text-batch", type=int, default=16, help="the server's generator_max_batch (default: %(default)s)"
    )
    parser.add_argument("--picture-batch", type=int, default=8, help="its decoder_max_batch (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("measured.json"), help="(default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_args(arguments)
    try:
        with Client(options.url, key=options.key) as client:
            profile = measure(
                client,
                pages=options.pages,
                steps=options.steps,
                text_batch=options.text_batch,
                picture_batch=options.picture_batch,
            )
        profile.save(options.output)
    except (ClientError, OSError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    for name, stage in (("text", profile.text), ("picture", profile.picture)):
        print(f"{name}: {stage.alone_s:.2f} s alone, {stage.full_s:.2f} s in a batch of {stage.batch}")
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
