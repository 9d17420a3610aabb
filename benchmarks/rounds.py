"""The rounds of the engines' bench: every way in turns, so that a slow minute of the machine meets all of them.

What the ratios need is measured in every round, all else once, after the last one.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.load import Load
from benchmarks.turns import Program

ONE_BY_ONE = ("llamacpp",)
"""Peers whose program writes one text after another: their speed with several at once says nothing."""


class Stories(Protocol):
    """Streams stories at once, over HTTP."""

    def stories(self, pictures: str, num: int) -> dict[str, Any]: ...

    def idle_cores(self) -> dict[str, float]: ...

    def memory_gib(self) -> float: ...


@dataclass(kw_only=True)
class Programs:
    """What runs and waits for its turn."""

    published: Program
    limit: Program
    text: Program
    pictures: Program
    eager: Program
    ours: Program
    peers: dict[str, Program] = field(default_factory=dict)
    """Name -> a peer that writes text; those that could be started."""
    http: Stories | None = None


@dataclass(kw_only=True)
class Figures:
    """What was measured; a list has a value for each round."""

    stories: dict[str, dict[str, Any]]
    """Pictures -> way -> figures; "ours" and "http" by how many stories at once."""
    text: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Who writes -> how many texts at once -> tokens a second."""
    pictures: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Who draws -> how many in a batch -> seconds a picture of the default request."""
    unet: dict[str, Any] = field(default_factory=dict)
    weight_bytes: int = 0
    """Bytes of the weights that a token reads."""
    peak: dict[str, list[float]] = field(default_factory=dict)
    """The machine's own."""
    server: dict[str, Any] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)


def measure(
    programs: Programs, load: Load, keep: Callable[[Figures, int], None] = lambda figures, num_rounds: None
) -> Figures:
    """All rounds, and what is measured once. `keep` gets what there is after each round, and how many those are."""
    figures = Figures(stories={pictures: {} for pictures in load.stories})
    _warm_up(programs, load)
    _measure_once_before(programs, load, figures)
    for num_rounds in range(1, load.rounds + 1):
        _measure_alone(programs, load, figures)
        for pictures, nums in load.repeated.items():
            _measure_stories(programs, load, figures, pictures, nums)
        _measure_server(programs, figures)
        keep(_with_middles(figures), num_rounds)
    for pictures, nums in load.stories.items():
        _measure_the_rest(programs, load, figures, pictures, nums)
    _measure_server(programs, figures)
    return _with_middles(figures)


def _measure_server(programs: Programs, figures: Figures) -> None:
    figures.counters = programs.ours.measure("counters")
    if programs.http:
        figures.server["memory_gib"] = programs.http.memory_gib()


def _with_middles(figures: Figures) -> Figures:
    """The rounds of stories as one each; pictures that no round has had yet are left out."""
    stories = {
        pictures: ways
        | {way: {num: middle(rounds) for num, rounds in ways.get(way, {}).items()} for way in ("ours", "http")}
        for pictures, ways in figures.stories.items()
        if "published" in ways
    }
    return dataclasses.replace(figures, stories=stories)


def middle(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the round in the middle, with the stories a second of all rounds."""
    rates = [one["stories_per_s"] for one in rounds]
    chosen = min(rounds, key=lambda one: abs(one["stories_per_s"] - statistics.median(rates)))
    return {**chosen, "stories_per_s_of_rounds": rates}


def _warm_up(programs: Programs, load: Load) -> None:
    """The first call is always the slowest."""
    programs.limit.measure("text", batch_size=1)
    for pictures in load.repeated:
        programs.published.measure("story", pictures=pictures)
        programs.ours.measure("stories", pictures=pictures, num=1)
        if programs.http:
            programs.http.stories(pictures, 1)
    for num in load.picture_batches:
        programs.pictures.measure("pictures", num=num)
        programs.eager.measure("pictures", num=num)
    for writer in (programs.text, *programs.peers.values()):
        _write(programs, load, writer, programs.text.measure("prompts", num=1))


def _measure_once_before(programs: Programs, load: Load, figures: Figures) -> None:
    """What does not change, and the sweep that says which batch sizes the rounds use."""
    figures.weight_bytes = programs.text.measure("weight_bytes")
    figures.unet["flops_a_sample"] = programs.eager.measure("unet_flops")
    if programs.http:
        figures.server["idle_cores"] = programs.http.idle_cores()
    text_s = {size: programs.limit.measure("text", batch_size=size) for size in load.batch_sizes}
    for pictures, ways in figures.stories.items():
        picture_s = {
            size: programs.limit.measure("pictures", pictures=pictures, batch_size=size) for size in load.batch_sizes
        }
        ways["limit"] = {
            "text_s_by_batch_size": text_s,
            "picture_s_by_batch_size": picture_s,
            "stories_per_s": [1 / (min(text_s.values()) + load.pages * min(picture_s.values()))],
        }


def _measure_alone(programs: Programs, load: Load, figures: Figures) -> None:
    """The machine, text without pictures, and pictures without text."""
    for name, value in programs.limit.measure("peak").items():
        figures.peak.setdefault(name, []).append(value)
    for num in load.text_at_once:
        prompts = programs.text.measure("prompts", num=num)
        for name, writer in {"ours": programs.text, **programs.peers}.items():
            if name in ONE_BY_ONE and num > 1:
                continue
            seconds = _write(programs, load, writer, prompts)
            rates = figures.text.setdefault(name, {}).setdefault(str(num), [])
            rates.append(num * load.text_tokens / seconds)
    figures.unet.setdefault("seconds_a_sample", []).append(programs.pictures.measure("unet"))
    drawing = {"ours": programs.pictures, "eager": programs.eager, "pipeline": programs.published}
    for num in load.picture_batches:
        for name, program in drawing.items():
            seconds = statistics.median(program.measure("pictures", num=num) for _ in range(3))
            figures.pictures.setdefault(name, {}).setdefault(str(num), []).append(seconds)


def _write(programs: Programs, load: Load, writer: Program, prompts: list[list[int]]) -> float:
    """Seconds of texts; ours makes its own prompts, of the same length."""
    if writer is programs.text:
        return writer.measure("text", num=len(prompts))
    return writer.measure("text", prompts=prompts, num_tokens=load.text_tokens)


def _measure_stories(programs: Programs, load: Load, figures: Figures, pictures: str, nums: tuple[int, ...]) -> None:
    """One round of one kind of pictures."""
    ways = figures.stories[pictures]
    published = ways.setdefault("published", {"story_s": [], "stories_per_s": []})
    published["story_s"].append(programs.published.measure("story", pictures=pictures))
    published["stories_per_s"].append(1 / published["story_s"][-1])
    ways.setdefault("bound_s", []).append(programs.ours.measure("bound", pictures=pictures))
    limit = ways["limit"]
    if len(limit["stories_per_s"]) < len(ways["bound_s"]):  # the first round has the sweep
        text_s, picture_s = limit["text_s_by_batch_size"], limit["picture_s_by_batch_size"]
        text = programs.limit.measure("text", batch_size=min(text_s, key=text_s.__getitem__))
        best = min(picture_s, key=picture_s.__getitem__)
        picture = programs.limit.measure("pictures", pictures=pictures, batch_size=best)
        limit["stories_per_s"].append(1 / (text + load.pages * picture))
    for num in nums if programs.http else ():
        assert programs.http is not None
        ways.setdefault("http", {}).setdefault(str(num), []).append(programs.http.stories(pictures, num))


def _measure_the_rest(programs: Programs, load: Load, figures: Figures, pictures: str, nums: tuple[int, ...]) -> None:
    """What no ratio needs: the engines without HTTP, other numbers of stories, other numbers of steps."""
    ways = figures.stories[pictures]
    if pictures not in load.repeated:
        _measure_stories(programs, load, figures, pictures, nums)
    for num in nums:
        if programs.http and str(num) not in ways.get("http", {}):
            ways.setdefault("http", {})[str(num)] = [programs.http.stories(pictures, num)]
        ways.setdefault("ours", {})[str(num)] = [programs.ours.measure("stories", pictures=pictures, num=num)]
