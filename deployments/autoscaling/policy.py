"""How many replicas of each engine a Serve application runs: `autoscaling_policy` in a Serve config.

Decoders follow the pictures that running stories are about to ask for, and not only their own queue. Generators follow
the text that is still to be written. Serve applies bounds and delays to what the policy returns. Its controller gets
this module by value, so the module imports nothing of the project.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext


class DeploymentId(Protocol):
    """What Serve tells deployments apart by."""

    @property
    def name(self) -> str: ...


Id = TypeVar("Id", bound=DeploymentId)
GENERATOR, DECODER = "VokenGenerator", "DiffusionDecoder"
"""Names of the deployments that the policy scales."""


@dataclass(frozen=True, kw_only=True)
class GeneratorStats:
    """What a generator's replica reports of itself (`record_autoscaling_stats`). A sum of them speaks for all."""

    pages_left: float = 0.0
    """Pages that its stories still have to write."""
    pictures_left: float = 0.0
    """Pictures that its stories will still ask for."""
    speed: float = 0.0
    """How fast it writes with the stories that it has, as a share of its speed with a full batch."""
    page_s: float = 0.0
    """Seconds of the replica for one page's text, in a full batch; 0: it has written none."""


@dataclass(frozen=True, kw_only=True)
class DecoderStats:
    """What a decoder's replica reports of itself."""

    busy: float = 0.0
    """Share of its batch that is taken, from 0 to 1."""
    waiting: float = 0.0
    """Pictures that wait for a place in its batch."""
    picture_s: float = 0.0
    """Seconds of the replica for one picture, in a full batch; 0: it has drawn none."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One engine as the policy sees it."""

    target: int
    """Replicas that it should have by the last decision."""
    least: int
    most: int
    load: float
    """Replicas that the work in sight would keep busy."""
    is_needed: bool
    """Whether a story runs or waits that needs it."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Knobs of the policy: `policy_kwargs` in a Serve config."""

    text_s: float = 15.0
    """Generators are as many as would write all text in sight within this time, and decoders follow them."""
    wait_s: float = 30.0
    """Decoders are as many more as would draw within this time what waits for a place."""
    use: float = 0.95
    """Share of a replica's time that is planned with when replicas are added."""
    use_below: float = 0.7
    """Replicas are removed where the rest would have less to do than this share. Between the two nothing changes."""
    page_s: float = 1.0
    """Seconds of `GeneratorStats.page_s` until they are measured."""
    picture_s: float = 1.0
    """Seconds of `DecoderStats.picture_s` until they are measured."""
    generator_cost: float = 1.0
    """Cost of a replica in any unit, such as GPUs or money an hour."""
    decoder_cost: float = 1.0
    max_cost: float = math.inf
    """Upper bound of the cost of all replicas together, above the minima."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}: it must be above 0")
        if not self.use_below < self.use <= 1:
            raise ValueError(f"use_below is {self.use_below} and use is {self.use}: use_below < use <= 1")


class StoryPolicy:
    """Serve builds it once and calls it at each of its decisions.

    The one thing that it remembers is how long a page's text and a picture took last: without replicas nobody says so.
    """

    def __init__(self, **settings: float) -> None:
        """`settings`: fields of Settings. Raises TypeError or ValueError where one is unknown or cannot be."""
        self.settings = Settings(**settings)

    def __call__(self, contexts: Mapping[Id, AutoscalingContext]) -> tuple[dict[Id, int], dict[Id, dict[str, Any]]]:
        """Desired replicas of the two engines, and no state for Serve to keep."""
        by_name = {found.name: (found, context) for found, context in contexts.items()}
        if not {GENERATOR, DECODER} <= by_name.keys():  # one of them has a fixed number of replicas
            return {}, {}
        (generator_id, generator), (decoder_id, decoder) = by_name[GENERATOR], by_name[DECODER]
        writing = read_stats(generator, GeneratorStats)
        drawing = read_stats(decoder, DecoderStats)
        self.settings = replace(
            self.settings,
            page_s=_mean(generator, "page_s") or self.settings.page_s,
            picture_s=_mean(decoder, "picture_s") or self.settings.picture_s,
        )
        text = _engine(
            generator,
            load=writing.pages_left * self.settings.page_s / self.settings.text_s,
            is_needed=generator.total_num_requests > 0 or writing.pages_left > 0,
        )
        # Generators that are only starting will write as well: decoders start beside them.
        num_writing = max(writing.speed, _desired(text, self.settings))
        asked_per_s = min(num_writing / self.settings.page_s, writing.pictures_left / self.settings.text_s)
        waiting = drawing.waiting + decoder.total_queued_requests
        pictures = _engine(
            decoder,
            load=max(asked_per_s * self.settings.picture_s, drawing.busy)
            + waiting * self.settings.picture_s / self.settings.wait_s,
            is_needed=text.is_needed,
        )
        decision = decide(text, pictures, self.settings)
        return {generator_id: decision[0], decoder_id: decision[1]}, {}


def decide(generator: Engine, decoder: Engine, settings: Settings) -> tuple[int, int]:
    """Replicas of both engines, within their bounds and the cost limit."""
    desired = [_desired(generator, settings), _desired(decoder, settings)]
    engines, costs = (generator, decoder), (settings.generator_cost, settings.decoder_cost)
    while sum(cost * number for cost, number in zip(costs, desired, strict=True)) > settings.max_cost:
        above = [index for index, engine in enumerate(engines) if desired[index] > max(engine.least, 1)]
        if not above:
            break
        # The engine that the loss of a replica slows down least.
        desired[min(above, key=lambda index: engines[index].load / (desired[index] - 1))] -= 1
    return desired[0], desired[1]


def read_stats(context: AutoscalingContext, kind: type[_Stats]) -> _Stats:
    """The sum of what an engine's replicas have reported last; nothing of a replica that is too new."""
    return kind(**{field.name: sum(_latest(context, field.name)) for field in fields(kind)})


_Stats = TypeVar("_Stats", GeneratorStats, DecoderStats)


def _desired(engine: Engine, settings: Settings) -> int:
    """Replicas for the work in sight. The target stays while it lies between the two shares of use."""
    fewest, most = math.ceil(engine.load / settings.use), math.ceil(engine.load / settings.use_below)
    desired = min(max(engine.target, fewest), most)
    return min(max(desired, engine.least, int(engine.is_needed)), engine.most)


def _engine(context: AutoscalingContext, *, load: float, is_needed: bool) -> Engine:
    return Engine(
        target=context.target_num_replicas,
        least=context.capacity_adjusted_min_replicas,
        most=context.capacity_adjusted_max_replicas,
        load=load,
        is_needed=is_needed,
    )


def _latest(context: AutoscalingContext, name: str) -> list[float]:
    return [series[-1].value for series in (context.raw_metrics or {}).get(name, {}).values() if series]


def _mean(context: AutoscalingContext, name: str) -> float:
    """The mean over the replicas that have measured it; 0 where none has."""
    known = [value for value in _latest(context, name) if value]
    return sum(known) / len(known) if known else 0.0
