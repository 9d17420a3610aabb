"""`python -m deployments.plan --stories-per-hour N --pages P --profile measured.json`: how many replicas a load needs.

Assumptions, which the output repeats. Stories arrive at random (Poisson) and independently. Each replica's batch is so
many servers, whose seconds grow with the number of items inside. A story stays with one generator, which is a queue of
its own, in which stories take turns, so that the spread of their lengths does not matter: its wait is that of M/M/c.
All decoders are one queue, whose wait is that of M/G/c by Allen and Cunneen: the mean wait of M/M/c, times half the sum
of two squared coefficients of variation. That of arrivals is the number of pages that a story asks for while the queue
remembers it; that of service was measured. Replicas are as few as keep their use below `--max-use`. Start times,
failures and autoscaling are left out.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deployments.autoscaling.stages import Profile, Stage
from minigpt5.errors import SettingsError

MAX_USE = 0.7
ASSUMPTIONS = (
    "Poisson arrivals, one story a client, every page with one picture",
    "texts take turns and wait as in M/M/c, pictures as in M/G/c by Allen and Cunneen",
    "a story stays with its generator, and every decoder draws for all",
    "all replicas are up",
)


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One engine under a load."""

    replicas: int
    use: float
    """Share of its batches' time that is taken."""
    seconds: float
    """Mean seconds of an item inside."""
    wait_s: float
    """Mean seconds before."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a load needs, and what a client then sees."""

    text: StagePlan
    picture: StagePlan
    gpus: float
    gpu_s_per_page: float

    @property
    def first_picture_s(self) -> float:
        """Expected seconds from a story's acceptance to its first picture."""
        return self.text.wait_s + self.text.seconds + self.picture.wait_s + self.picture.seconds


def plan(
    profile: Profile,
    *,
    stories_per_hour: float,
    pages: float,
    max_use: float = MAX_USE,
    generator_gpus: float = 1.0,
    decoder_gpus: float = 1.0,
) -> Plan:
    pages_per_s = stories_per_hour * pages / 3600
    text = plan_text(profile.text, pages_per_s, max_use=max_use)
    picture = plan_picture(profile.picture, pages_per_s, max_use=max_use, pages=pages, text_s=text.seconds)
    gpus = text.replicas * generator_gpus + picture.replicas * decoder_gpus
    return Plan(text=text, picture=picture, gpus=gpus, gpu_s_per_page=gpus / pages_per_s)


def plan_text(stage: Stage, pages_per_s: float, *, max_use: float) -> StagePlan:
    """Generators. Stories take turns page by page, so that their lengths do not matter, only how many there are."""
    replicas, use = _fewest(stage, pages_per_s, max_use)
    seconds = _seconds(stage, pages_per_s / replicas, own=1.0)
    wait_s = mmc_wait_s(stage.batch, pages_per_s / replicas, seconds)
    return StagePlan(replicas=replicas, use=use, seconds=seconds, wait_s=wait_s)


def plan_picture(stage: Stage, pictures_per_s: float, *, max_use: float, pages: float, text_s: float) -> StagePlan:
    """Decoders of stories with so many pages, which ask for a picture every `text_s`."""
    replicas, use = _fewest(stage, pictures_per_s, max_use)
    seconds = _seconds(stage, pictures_per_s / replicas, own=1 / replicas)
    remembered_s = seconds / (1 - use)
    """How long a queue takes to forget an arrival."""
    arrivals = min(pages, 1 + remembered_s / text_s)
    wait_s = mmc_wait_s(replicas * stage.batch, pictures_per_s, seconds) * (arrivals + stage.cv**2) / 2
    return StagePlan(replicas=replicas, use=use, seconds=seconds, wait_s=wait_s)


def mmc_wait_s(servers: int, items_per_s: float, seconds: float) -> float:
    """Mean wait of M/M/c."""
    offered = items_per_s * seconds
    return erlang_c(servers, offered) * seconds / (servers - offered)


def erlang_c(servers: int, offered: float) -> float:
    """Probability that an arrival waits, for `offered` = arrivals a second times seconds of each, below `servers`."""
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = offered * blocked / (number + offered * blocked)  # Erlang B, by its recursion
    return blocked / (1 - offered / servers * (1 - blocked))


def _fewest(stage: Stage, items_per_s: float, max_use: float) -> tuple[int, float]:
    """Replicas, and the share of their time that is taken."""
    busy = items_per_s * stage.item_s
    replicas = max(1, math.ceil(busy / max_use))
    return replicas, busy / replicas


def _seconds(stage: Stage, items_per_s: float, *, own: float) -> float:
    """Seconds of an item on a replica. It shares the replica with as many as there are on average, whose number follows
    from their seconds (Little). `own`: what it adds to them; the emptiest of several replicas has fewer."""
    low, high = stage.alone_s, stage.full_s
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if stage.latency_s(own + items_per_s * middle) > middle else (low, middle)
    return high


def to_text(found: Plan, *, stories_per_hour: float, pages: float) -> str:
    lines = [f"{stories_per_hour:g} stories an hour of {pages:g} pages:"]
    for name, stage in (("VokenGenerator", found.text), ("DiffusionDecoder", found.picture)):
        lines.append(
            f"  {name:<17}{stage.replicas:>4} replicas, {100 * stage.use:.0f} % used; "
            f"an item waits {stage.wait_s:.2f} s and takes {stage.seconds:.2f} s"
        )
    lines += [
        f"  GPUs             {found.gpus:>4g}",
        f"  GPU-seconds a page: {found.gpu_s_per_page:.2f}",
        f"  expected time to first picture: {found.first_picture_s:.1f} s",
        "assumed: " + "; ".join(ASSUMPTIONS),
    ]
    return "\n".join(lines)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deployments.plan", description=__doc__)
    parser.add_argument("--stories-per-hour", type=float, required=True)
    parser.add_argument("--pages", type=float, required=True, help="of a story, on average")
    parser.add_argument("--profile", type=Path, required=True, help="made by `python -m deployments.profile`")
    parser.add_argument(
        "--max-use", type=float, default=MAX_USE, help="share of a replica's time (default: %(default)s)"
    )
    parser.add_argument("--generator-gpus", type=float, default=1.0, help="of a replica (default: %(default)s)")
    parser.add_argument("--decoder-gpus", type=float, default=1.0, help="of a replica (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not (options.stories_per_hour > 0 and options.pages > 0):
        parser.error("--stories-per-hour and --pages must be above 0")
    if not 0 < options.max_use < 1:
        parser.error(f"--max-use is {options.max_use:g} but must lie between 0 and 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_args(arguments)
    load = {"stories_per_hour": options.stories_per_hour, "pages": options.pages}
    try:
        profile = Profile.load(options.profile)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = plan(
        profile,
        **load,
        max_use=options.max_use,
        generator_gpus=options.generator_gpus,
        decoder_gpus=options.decoder_gpus,
    )
    print(to_text(found, **load))
    return 0


if __name__ == "__main__":
    sys.exit(main())
