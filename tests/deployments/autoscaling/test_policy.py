"""The autoscaling policy: what it asks for, how Serve builds it, and what replicas report."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pytest
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from deployments.autoscaling.policy import DECODER, GENERATOR, StoryPolicy
from deployments.engines.diffusion_decoder import DiffusionDecoder
from deployments.engines.stage_clock import StageClock
from deployments.engines.voken_generator import VokenGenerator
from minigpt5.types import DrawRequest, DrawSettings, GeneratorEvent, StoryRequest, TextDelta, Usage, Vokens
from tests.helpers.fakes import FakeDecoder, FakeGenerator
from tests.helpers.served import VOKENS

GENERATOR_ID, DECODER_ID = DeploymentID(GENERATOR, "default"), DeploymentID(DECODER, "default")
NOTHING = {"pages_left": 0.0, "pictures_left": 0.0, "speed": 0.0, "page_s": 1.0}


def context(
    name: DeploymentID,
    *replicas: Mapping[str, float],
    target: int = 1,
    least: int = 1,
    most: int = 8,
    requests: float = 0.0,
    queued: float = 0.0,
) -> AutoscalingContext:
    """What Serve shows of a deployment whose replicas have reported these figures."""
    metrics: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
    for number, replica in enumerate(replicas):
        for key, value in replica.items():
            metrics.setdefault(key, {})[ReplicaID(str(number), name)] = [
                TimeStampedValue(0.0, 1e9),  # what it has said before does not count
                TimeStampedValue(1.0, value),
            ]
    return AutoscalingContext(
        deployment_id=name,
        deployment_name=name.name,
        app_name="default",
        current_num_replicas=len(replicas),
        target_num_replicas=target,
        running_replicas=[],
        total_num_requests=requests,
        total_queued_requests=queued,
        aggregated_metrics={},
        raw_metrics=metrics,
        capacity_adjusted_min_replicas=least,
        capacity_adjusted_max_replicas=most,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=AutoscalingConfig(min_replicas=least, max_replicas=most, upscale_delay_s=0, downscale_delay_s=0),
    )


def ask(policy: StoryPolicy, generator: AutoscalingContext, decoder: AutoscalingContext) -> tuple[int, int]:
    desired, state = policy({GENERATOR_ID: generator, DECODER_ID: decoder})
    assert state == {}
    return desired[GENERATOR_ID], desired[DECODER_ID]


def writing(pages_left: float, *, speed: float = 1.0, page_s: float = 1.0, drawn: bool = True) -> dict[str, float]:
    return {"pages_left": pages_left, "pictures_left": pages_left * drawn, "speed": speed, "page_s": page_s}


def drawing(waiting: float, *, picture_s: float = 2.0, busy: float = 0.0) -> dict[str, float]:
    return {"busy": busy, "waiting": waiting, "picture_s": picture_s}


def test_decoders_come_before_the_first_picture_is_asked_for() -> None:
    generator = context(GENERATOR_ID, writing(160), requests=10, most=1)
    _, decoders = ask(StoryPolicy(), generator, context(DECODER_ID, drawing(0)))
    assert decoders == 3  # a page a second, of two seconds each, at 0.95 of their time


def test_decoders_start_beside_the_generators_that_will_ask_them() -> None:
    decoder = context(DECODER_ID, drawing(0))
    generator = context(GENERATOR_ID, writing(30), requests=10)
    assert ask(StoryPolicy(text_s=15), generator, decoder) == (3, 5)  # two pages a second


def test_pages_that_draw_nothing_bring_no_decoder() -> None:
    generator = context(GENERATOR_ID, writing(160, drawn=False), requests=10)
    assert ask(StoryPolicy(), generator, context(DECODER_ID, drawing(0)))[1] == 1


def test_the_last_pages_bring_fewer_decoders_than_many() -> None:
    few, many = (context(GENERATOR_ID, writing(pages), requests=10) for pages in (6, 600))
    decoder = context(DECODER_ID, drawing(0))
    assert ask(StoryPolicy(), few, decoder)[1] < ask(StoryPolicy(), many, decoder)[1]


def test_pictures_that_nobody_writes_for_are_drawn_too() -> None:
    """Redraws need no generator: decoders follow their own batches and queues then."""
    idle, policy = context(GENERATOR_ID, NOTHING), StoryPolicy(wait_s=10, use=0.9)
    full = drawing(0, busy=1.0)
    assert ask(policy, idle, context(DECODER_ID, full, full, target=2))[1] == 3
    assert ask(policy, idle, context(DECODER_ID, drawing(20, busy=1.0)))[1] == 6


def test_generators_follow_the_text_that_is_left() -> None:
    policy = StoryPolicy(text_s=20)
    decoder = context(DECODER_ID, drawing(0))
    assert [
        ask(policy, context(GENERATOR_ID, writing(pages), requests=1), decoder)[0] for pages in (1, 18, 30, 45, 10_000)
    ] == [1, 1, 2, 3, 8]


def test_between_the_two_shares_of_use_nothing_changes() -> None:
    """No flapping: what adds a replica is more than what takes it away again."""
    policy = StoryPolicy(wait_s=10, use=0.9, use_below=0.6)
    idle = context(GENERATOR_ID, NOTHING)

    def decoders(pictures: float, target: int) -> int:
        return ask(policy, idle, context(DECODER_ID, drawing(pictures, picture_s=1.0), target=target))[1]

    assert [decoders(pictures, 2) for pictures in (18, 19)] == [2, 3]
    assert [decoders(pictures, 3) for pictures in (19, 13, 12)] == [3, 3, 2]


def test_a_load_that_swings_inside_the_band_changes_nothing() -> None:
    policy, target = StoryPolicy(wait_s=10, use=0.9, use_below=0.6), 3
    for turn in range(50):
        pictures = 19 if turn % 2 else 14
        decoder = context(DECODER_ID, drawing(pictures, picture_s=1.0), target=target)
        assert ask(policy, context(GENERATOR_ID, NOTHING), decoder)[1] == target


def test_both_engines_go_to_zero_and_come_back() -> None:
    policy = StoryPolicy()
    rest = (context(GENERATOR_ID, NOTHING, least=0), context(DECODER_ID, drawing(0), least=0))
    assert ask(policy, *rest) == (0, 0)
    gone = context(DECODER_ID, target=0, least=0)
    # A story waits at the front: its decoder starts beside its generator.
    assert ask(policy, context(GENERATOR_ID, target=0, least=0, requests=1, queued=1), gone) == (1, 1)
    # A picture is redrawn: no generator is needed.
    asleep = context(GENERATOR_ID, target=0, least=0)
    assert ask(policy, asleep, context(DECODER_ID, target=0, least=0, requests=1, queued=1)) == (0, 1)


def test_a_decoder_stays_while_a_story_runs() -> None:
    generator = context(GENERATOR_ID, writing(1, drawn=False), requests=1)
    assert ask(StoryPolicy(), generator, context(DECODER_ID, drawing(0), least=0))[1] == 1


def test_seconds_are_remembered_where_no_replica_says_them() -> None:
    policy = StoryPolicy(picture_s=1.0, wait_s=10)
    idle = context(GENERATOR_ID, NOTHING)
    ask(policy, idle, context(DECODER_ID, drawing(0, picture_s=8.0)))
    assert ask(policy, idle, context(DECODER_ID, target=0, least=0, requests=3, queued=3))[1] == 3


def test_costs_are_bounded_and_the_minima_stay() -> None:
    generator = context(GENERATOR_ID, writing(400), requests=20)
    decoder = context(DECODER_ID, drawing(100))
    free = ask(StoryPolicy(), generator, decoder)
    assert free == (8, 8)
    generators, decoders = ask(StoryPolicy(generator_cost=2.0, max_cost=12.0), generator, decoder)
    assert 2 * generators + decoders <= 12 and generators >= 1 and decoders > 1
    assert ask(StoryPolicy(max_cost=0.5), generator, decoder) == (1, 1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"horizon": 3.0}, "horizon"),
        ({"use": 0.0}, "use is 0"),
        ({"use": 0.5}, "use_below"),
        ({"max_cost": -1.0}, "max_"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, float], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        StoryPolicy(**settings)


def test_an_engine_of_a_fixed_number_leaves_the_other_alone() -> None:
    assert StoryPolicy()({DECODER_ID: context(DECODER_ID, drawing(9))}) == ({}, {})


def test_serve_builds_it_once_and_applies_its_bounds() -> None:
    policy = _resolve_policy_callable(
        AutoscalingPolicy(policy_function="deployments.autoscaling.policy:StoryPolicy", policy_kwargs={"wait_s": 10.0})
    )
    assert not isinstance(policy, type)
    contexts = {
        GENERATOR_ID: context(GENERATOR_ID, writing(600), requests=30),
        DECODER_ID: context(DECODER_ID, drawing(100), most=5),
    }
    decisions, state = _apply_app_level_autoscaling_config(policy)(contexts)
    assert decisions == {GENERATOR_ID: 8, DECODER_ID: 5}
    assert set(state) == set(contexts)


def test_the_controller_needs_nothing_of_the_project_but_the_policy() -> None:
    """Serve sends the module by value: it must not import torch, and not the project."""
    code = (
        "import sys, deployments.autoscaling.policy as policy\n"
        "policy.StoryPolicy()\n"
        "names = {name.split('.')[0] for name in sys.modules}\n"
        "assert not names & {'torch', 'minigpt5', 'fastapi', 'transformers'}, names\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# What replicas report


class Clocked:
    """Simulated seconds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_full_batch_is_measured_from_any_number_at_once() -> None:
    """Twice as many at once do twice as much here: an item alone in 6 s is one of a batch of two in 3 s."""
    for at_once in (1, 2):
        now = Clocked()
        clock = StageClock(2, speed_up=2.0, clock=now)
        for _ in range(at_once):
            clock.begin()
        now.now += 6.0
        for _ in range(at_once):
            clock.finish_item()
            clock.end()
        now.now += 100.0  # idle
        assert clock.item_s == pytest.approx(3.0)
        assert clock.speed == 0.0


def test_more_than_a_batch_is_as_fast_as_a_batch() -> None:
    clock = StageClock(4)
    for _ in range(9):
        clock.begin()
    assert clock.speed == 1.0


class TestedGenerator(VokenGenerator):
    __test__ = False

    def __init__(self, engine: Any) -> None:
        self.engine, self.clock, self._writing = engine, StageClock(4), []


class TestedDecoder(DiffusionDecoder):
    __test__ = False

    def __init__(self, engine: Any) -> None:
        self.engine, self.clock, self.filter = engine, StageClock(4), None


class RunningFake(FakeGenerator):
    num_running = 1


def test_a_generator_reports_what_its_stories_will_ask_for() -> None:
    async def main() -> None:
        generator = TestedGenerator(RunningFake())
        events = generator.generate(StoryRequest(prompt=("A fox",), pages=3))
        left = []
        async for event in events:
            if isinstance(event, Vokens):
                left.append((await generator.record_autoscaling_stats())["pictures_left"])
        assert left == [2, 1, 0]
        silent = generator.generate(StoryRequest(prompt=("Hi",), pages=2, mode="reply", pictures="none"))
        await anext(silent)
        stats = await generator.record_autoscaling_stats()
        assert (stats["pages_left"], stats["pictures_left"]) == (2, 0)
        await silent.aclose()

    asyncio.run(main())


class Talker(RunningFake):
    async def generate(self, request: StoryRequest) -> AsyncGenerator[GeneratorEvent, None]:
        yield TextDelta(page=1, text="Hello.")
        yield Usage(prompt_tokens=1, completion_tokens=2)


def test_a_reply_without_a_picture_is_an_item() -> None:
    """Its time would else be that of the pages of other stories, and one of them would ask for many replicas."""

    async def main() -> None:
        generator, now = TestedGenerator(Talker()), Clocked()
        generator.clock = StageClock(1, clock=now)
        for _ in range(50):
            async for _ in generator.generate(StoryRequest(prompt=("Hi",), pages=1, mode="reply", pictures="none")):
                now.now += 1.0
        assert (await generator.record_autoscaling_stats())["page_s"] == pytest.approx(2.0)

    asyncio.run(main())


def test_forty_clients_that_vanish_leave_no_counts_behind() -> None:
    """The calls are closed at a random point of each story, as Serve closes what nobody reads."""

    async def main() -> None:
        generator, decoder = TestedGenerator(RunningFake()), TestedDecoder(FakeDecoder())
        for number in range(40):
            story = generator.generate(StoryRequest(prompt=("A fox",), pages=4, seed=number))
            picture = decoder.decode(DrawRequest(vokens=VOKENS, seed=number, settings=DrawSettings(steps=3)))
            for _ in range(1 + number % 3):
                await anext(story)
                await anext(picture)
            assert (await generator.record_autoscaling_stats())["pages_left"] > 0
            assert (await decoder.record_autoscaling_stats())["busy"] > 0
            await story.aclose()
            await picture.aclose()
        stats = await generator.record_autoscaling_stats() | await decoder.record_autoscaling_stats()
        assert {name: stats[name] for name in ("pages_left", "pictures_left", "speed", "busy", "waiting")} == {
            "pages_left": 0,
            "pictures_left": 0,
            "speed": 0.0,
            "busy": 0.0,
            "waiting": 0,
        }
        idle = context(GENERATOR_ID, await generator.record_autoscaling_stats())
        rest = context(DECODER_ID, await decoder.record_autoscaling_stats(), target=8)
        assert ask(StoryPolicy(), idle, rest) == (1, 1)

    asyncio.run(main())
