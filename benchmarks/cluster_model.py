"""A model of a served cluster: stories -> generators -> decoders, as events in simulated seconds.

Replicas share their steps as `deployments/autoscaling/stages.py` says. Serve's own functions make the scaling
decisions, with the figures that Serve would have seen by then. Not modelled: the front, failures, and the 20 s after
which Serve kills a replica that is taken away and still busy.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve._private.metrics_utils import aggregate_timeseries
from ray.serve.autoscaling_policy import (
    _apply_delay_logic,
    _apply_scaling_factors,
    _get_cold_start_scale_up_replicas,
    default_autoscaling_policy,
)
from ray.serve.config import AggregationFunction, AutoscalingConfig, AutoscalingContext

from deployments.autoscaling.policy import DECODER, GENERATOR, DecoderStats, GeneratorStats
from deployments.autoscaling.stages import Profile, Stage
from deployments.engines.stage_clock import StageClock

TICK_S = 1.0
"""Time between two decisions; Serve's is 0.1 s."""
PUSH_S = 10.0
"""Serve's `metrics_interval_s`: a replica and a handle send what they have sampled so often."""

Policy = Callable[[Mapping[DeploymentID, AutoscalingContext]], tuple[dict[DeploymentID, int], object]]


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A story that a client asks for."""

    at_s: float
    pages: int


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What both policies are given alike."""

    profile: Profile
    generator: AutoscalingConfig
    decoder: AutoscalingConfig
    generator_start_s: float
    """Seconds from the decision to the replica's first request."""
    decoder_start_s: float


@dataclass(kw_only=True)
class Run:
    """What a simulated run showed."""

    first_picture_s: list[float] = field(default_factory=list)
    """Of each story, in the order of arrival."""
    replica_s: dict[str, float] = field(default_factory=dict)
    """Seconds of all replicas of an engine, from the start of each to its end."""
    series: list[dict[str, float]] = field(default_factory=list)
    """Replicas and queues at each decision."""
    num_changes: int = 0
    """Decisions that changed a number of replicas."""


def default_policy(contexts: Mapping[DeploymentID, AutoscalingContext]) -> tuple[dict[DeploymentID, int], object]:
    """Ray's own, for each deployment; the targets are those of their configs."""
    return {name: default_autoscaling_policy(context)[0] for name, context in contexts.items()}, None  # type: ignore[misc]


def simulate(
    arrivals: Iterable[Arrival], cluster: Cluster, policy: Policy | None, *, seed: int = 0, seconds: float = 0.0
) -> Run:
    """Run all stories to their ends, and for at least so many seconds. `policy` None: replicas stay at their minima."""
    return _Simulation(cluster, policy, seed).run(sorted(arrivals, key=lambda one: one.at_s), seconds)


@dataclass(eq=False)
class _Job:
    size: float
    """Items of the stage; 1 is a mean one."""
    done: Callable[[_Replica], None]


@dataclass(eq=False)
class _Story:
    arrived_s: float
    pages_left: int
    first_picture_s: float = math.nan
    generator: _Replica | None = None


class _Replica:
    """Places for a batch, and a queue before them."""

    _ids = itertools.count()

    def __init__(self, stage: Stage, clock: Callable[[], float]) -> None:
        self.number, self.stage, self.now = next(self._ids), stage, clock
        self.clock = StageClock(stage.batch, speed_up=stage.speed_up, clock=clock)
        self.stories: set[_Story] = set()
        self.waiting: deque[_Job] = deque()
        self.version = 0
        self._inside: list[tuple[float, int, _Job]] = []
        self._progress = 0.0
        """Items that a job which had been inside from the start would have done."""
        self._at, self._order = clock(), itertools.count()

    @property
    def num_jobs(self) -> int:
        return len(self._inside) + len(self.waiting)

    def add(self, job: _Job) -> None:
        self._advance()
        self.clock.begin()
        self.waiting.append(job)
        self._fill()

    def finish(self) -> _Job:
        """The job that is done now."""
        self._advance()
        job = heapq.heappop(self._inside)[2]
        self.clock.end()
        self.clock.finish_item()
        self._fill()
        return job

    def next_end_s(self) -> float:
        """When the next job is done; infinite where none is inside."""
        if not self._inside:
            return math.inf
        return self._at + max(0.0, self._inside[0][0] - self._progress) * self.stage.latency_s(len(self._inside))

    def _advance(self) -> None:
        if self._inside:
            self._progress += (self.now() - self._at) / self.stage.latency_s(len(self._inside))
        self._at = self.now()

    def _fill(self) -> None:
        while self.waiting and len(self._inside) < self.stage.batch:
            job = self.waiting.popleft()
            heapq.heappush(self._inside, (self._progress + job.size, next(self._order), job))
        self.version += 1


class _Pool:
    """The replicas of one engine, and what Serve's controller knows of them."""

    def __init__(
        self, name: str, stage: Stage, config: AutoscalingConfig, start_s: float, now: Callable[[], float]
    ) -> None:
        self.id, self.stage, self.config = DeploymentID(name, "default"), stage, config
        self.start_s, self.now = start_s, now
        self.ready = [_Replica(stage, now) for _ in range(config.min_replicas)]
        self.starting: list[float] = []
        """When each will be ready."""
        self.leaving: list[_Replica] = []
        self.target = config.min_replicas
        self.held: deque[Callable[[], None]] = deque()
        """Calls that wait at the handle for the first replica."""
        self.state: dict[str, Any] = {}
        self.replica_s = 0.0
        self._sampled: deque[TimeStampedValue] = deque()
        self._pushed: list[TimeStampedValue] = []
        self._metrics: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
        self._sample_at = self._push_at = 0.0

    @property
    def num(self) -> int:
        """Replicas that cost something."""
        return len(self.ready) + len(self.starting) + len(self.leaving)

    @property
    def num_jobs(self) -> int:
        return sum(replica.num_jobs for replica in (*self.ready, *self.leaving)) + len(self.held)

    @property
    def num_stories(self) -> int:
        return sum(len(replica.stories) for replica in (*self.ready, *self.leaving)) + len(self.held)

    def tick(self, num_ongoing: float, stats: Callable[[_Replica], GeneratorStats | DecoderStats]) -> None:
        """Sample and push what replicas and handles report."""
        now = self.now()
        if now >= self._sample_at:
            self._sample_at = now + min(0.2 * self.config.look_back_period_s, PUSH_S)
            self._sampled.append(TimeStampedValue(now, num_ongoing))
            while self._sampled[0].timestamp < now - self.config.look_back_period_s:
                self._sampled.popleft()
        if now >= self._push_at or (not self.ready and self.held):  # Serve pushes at once where there is no replica
            self._push_at = now + PUSH_S
            self._pushed = list(self._sampled)
            self._metrics = {}
            for replica in self.ready:
                for name, value in dataclasses.asdict(stats(replica)).items():
                    self._metrics.setdefault(name, {})[ReplicaID(str(replica.number), self.id)] = [
                        TimeStampedValue(now, value)
                    ]

    def context(self) -> AutoscalingContext:
        now = self.now()
        total = len(self.held) if not self.ready else 0.0
        if self._pushed and self.ready:
            total = aggregate_timeseries(
                self._pushed, AggregationFunction.MEAN, last_window_s=max(1e-3, now - self._pushed[-1].timestamp)
            )
        return AutoscalingContext(
            deployment_id=self.id,
            deployment_name=self.id.name,
            app_name="default",
            current_num_replicas=len(self.ready),
            target_num_replicas=self.target,
            running_replicas=[],
            total_num_requests=total or 0.0,
            total_queued_requests=float(len(self.held)),
            aggregated_metrics={},
            raw_metrics=self._metrics,
            capacity_adjusted_min_replicas=self.config.min_replicas,
            capacity_adjusted_max_replicas=self.config.max_replicas,
            policy_state=self.state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now,
            config=self.config,
        )

    def decide(self, desired: float, context: AutoscalingContext) -> int:
        """What Serve makes of a policy's answer (`_apply_app_level_autoscaling_config`), with the simulated clock."""
        if (cold := _get_cold_start_scale_up_replicas(context)) is not None:
            target = cold
        else:
            number = _apply_scaling_factors(desired, context.current_num_replicas, self.config)
            if context.current_num_replicas or not number:
                number, self.state = _apply_delay_logic(
                    max(0, number), self.target, self.config, self.state, _now=self.now()
                )
            target = number
        return max(self.config.min_replicas, min(self.config.max_replicas, math.ceil(target)))

    def scale(self, target: int) -> bool:
        """Start or take away replicas; the emptiest ones go first."""
        changed, self.target = target != self.target, target
        while len(self.ready) + len(self.starting) < target:
            self.starting.append(self.now() + self.start_s)
        while len(self.ready) + len(self.starting) > target:
            if self.starting:
                self.starting.pop()
            else:
                emptiest = min(
                    self.ready, key=lambda replica: (replica.num_jobs + len(replica.stories), -replica.number)
                )
                self.ready.remove(emptiest)
                self.leaving.append(emptiest)
        return changed


class _Simulation:
    def __init__(self, cluster: Cluster, policy: Policy | None, seed: int) -> None:
        self.profile, self.policy, self.random = cluster.profile, policy, random.Random(seed)
        self.now, self._order = 0.0, itertools.count()
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        clock = lambda: self.now  # noqa: E731
        self.generators = _Pool(GENERATOR, self.profile.text, cluster.generator, cluster.generator_start_s, clock)
        self.decoders = _Pool(DECODER, self.profile.picture, cluster.decoder, cluster.decoder_start_s, clock)
        self.pools = (self.generators, self.decoders)
        self.num_open = 0
        self.out = Run()

    def run(self, arrivals: list[Arrival], seconds: float) -> Run:
        stories = [_Story(one.at_s, one.pages) for one in arrivals]
        self.num_open = sum(story.pages_left for story in stories)
        for story in stories:
            self._at(story.arrived_s, partial(self._arrive, story))
        self._at(0.0, self._tick)
        while self.events and (self.num_open or self.now < seconds):
            self.now, _, act = heapq.heappop(self.events)
            act()
        self.out.first_picture_s = [story.first_picture_s - story.arrived_s for story in stories]
        self.out.replica_s = {pool.id.name: pool.replica_s for pool in self.pools}
        return self.out

    def _at(self, at_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self.events, (at_s, next(self._order), act))

    def _size(self, stage: Stage) -> float:
        """A log-normal number with mean 1 and the stage's coefficient of variation."""
        variance = math.log(1 + stage.cv**2)
        return self.random.lognormvariate(-variance / 2, math.sqrt(variance)) if stage.cv else 1.0

    def _arrive(self, story: _Story) -> None:
        if not self.generators.ready:
            self.generators.held.append(partial(self._arrive, story))
            return
        story.generator = self.random.choice(self.generators.ready)  # a hash of its session
        story.generator.stories.add(story)
        self._write(story)

    def _write(self, story: _Story) -> None:
        assert story.generator
        self._give(story.generator, _Job(self._size(self.profile.text), partial(self._written, story)))

    def _written(self, story: _Story, replica: _Replica) -> None:
        story.pages_left -= 1
        self._draw(story)
        if story.pages_left:
            self._write(story)
        else:
            replica.stories.remove(story)

    def _draw(self, story: _Story) -> None:
        ready = self.decoders.ready
        if not ready:
            self.decoders.held.append(partial(self._draw, story))
            return
        two = self.random.sample(ready, min(2, len(ready)))  # Serve's power of two choices
        self._give(
            min(two, key=lambda replica: replica.num_jobs),
            _Job(self._size(self.profile.picture), partial(self._drawn, story)),
        )

    def _drawn(self, story: _Story, replica: _Replica) -> None:
        self.num_open -= 1
        if math.isnan(story.first_picture_s):
            story.first_picture_s = self.now

    def _give(self, replica: _Replica, job: _Job) -> None:
        replica.add(job)
        self._await(replica)

    def _await(self, replica: _Replica) -> None:
        """Come back when the replica's next job is done, unless it changes before."""
        version = replica.version

        def finish() -> None:
            if replica.version == version:
                job = replica.finish()
                self._await(replica)
                job.done(replica)

        if (end_s := replica.next_end_s()) < math.inf:
            self._at(end_s, finish)

    def _tick(self) -> None:
        for pool in self.pools:
            pool.replica_s += TICK_S * pool.num
            while pool.starting and min(pool.starting) <= self.now:
                pool.starting.remove(min(pool.starting))
                pool.ready.append(_Replica(pool.stage, pool.now))
            if pool.ready:
                for call in [pool.held.popleft() for _ in range(len(pool.held))]:
                    call()
            pool.leaving = [replica for replica in pool.leaving if replica.num_jobs or replica.stories]
        self.generators.tick(self.generators.num_stories, _writing)
        self.decoders.tick(self.decoders.num_jobs, _drawing)
        if self.policy:
            contexts = {pool.id: pool.context() for pool in self.pools}
            desired, _ = self.policy(contexts)
            for pool in self.pools:
                self.out.num_changes += pool.scale(pool.decide(desired[pool.id], contexts[pool.id]))
        self.out.series.append(
            {
                "at_s": self.now,
                "generators": len(self.generators.ready),
                "decoders": len(self.decoders.ready),
                "stories": self.generators.num_stories,
                "pictures": self.decoders.num_jobs,
            }
        )
        self._at(self.now + TICK_S, self._tick)


def _writing(replica: _Replica) -> GeneratorStats:
    left = sum(story.pages_left for story in replica.stories)
    return GeneratorStats(pages_left=left, pictures_left=left, speed=replica.clock.speed, page_s=replica.clock.item_s)


def _drawing(replica: _Replica) -> DecoderStats:
    clock = replica.clock
    return DecoderStats(busy=clock.busy, waiting=clock.num_waiting, picture_s=clock.item_s)
