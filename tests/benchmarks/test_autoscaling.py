"""The simulated cluster, against what is known of queues, and the figures of the bench."""

from __future__ import annotations

import json
import random
import statistics

import pytest
from ray.serve.config import AutoscalingConfig

from benchmarks.autoscaling import GOALS, LOADS, RESULTS, compare_with_live, steady
from benchmarks.autoscaling_live import LIVE
from benchmarks.cluster_model import Arrival, Cluster, default_policy, simulate
from deployments.autoscaling.policy import DECODER, GENERATOR, StoryPolicy
from deployments.autoscaling.stages import Profile, Stage

PROFILE = Profile(text=Stage(alone_s=1.0, full_s=1.0, batch=4), picture=Stage(alone_s=4.0, full_s=4.0, batch=2))


def cluster(profile: Profile = PROFILE, **decoder: float) -> Cluster:
    return Cluster(
        profile=profile,
        generator=AutoscalingConfig(min_replicas=1, max_replicas=1),
        decoder=AutoscalingConfig.model_validate({"min_replicas": 1, "max_replicas": 1, **decoder}),
        generator_start_s=5.0,
        decoder_start_s=5.0,
    )


def test_a_lone_story_takes_its_stages() -> None:
    run = simulate([Arrival(at_s=10.0, pages=3)], cluster(), None)
    assert run.first_picture_s == [pytest.approx(5.0)]


def test_a_batch_shares_a_replica_as_its_stage_says() -> None:
    """Two pictures at once take twice as long each, and the one that remains is fast again."""
    profile = Profile(text=Stage(alone_s=1e-6, full_s=1e-6, batch=1), picture=Stage(alone_s=4.0, full_s=8.0, batch=2))
    run = simulate([Arrival(at_s=0.0, pages=1), Arrival(at_s=2.0, pages=1)], cluster(profile), None)
    # Half of the first is done alone, the rest takes 4 s; then half of the second is left.
    assert run.first_picture_s == pytest.approx([6.0, 6.0], abs=0.01)


def test_waits_are_those_of_one_server() -> None:
    """M/D/1 at 60 % of its time: the mean wait is 0.75 of a service."""
    profile = Profile(text=Stage(alone_s=1e-6, full_s=1e-6, batch=1), picture=Stage(alone_s=4.0, full_s=4.0, batch=1))
    chance, at_s, arrivals = random.Random(0), 0.0, []
    for _ in range(5000):
        arrivals.append(Arrival(at_s=(at_s := at_s + chance.expovariate(0.15)), pages=1))
    seconds = statistics.mean(simulate(arrivals, cluster(profile), None).first_picture_s)
    assert seconds == pytest.approx(4.0 + 4.0 * 0.75, rel=0.1)


@pytest.mark.parametrize("policy", [StoryPolicy(page_s=0.25, picture_s=2.0), default_policy], ids=["ours", "default"])
def test_replicas_come_and_go_within_their_bounds(policy: object) -> None:
    scaling = {"max_replicas": 4, "upscale_delay_s": 2.0, "downscale_delay_s": 20.0, "look_back_period_s": 11.0}
    arrivals = [Arrival(at_s=5.0, pages=16)] * 8
    run = simulate(arrivals, cluster(**scaling), policy, seconds=600.0)  # type: ignore[arg-type]
    decoders = [seen["decoders"] for seen in run.series]
    assert max(decoders) == 4 and decoders[-1] == 1
    changes = sum(before != after for before, after in zip(decoders, decoders[1:], strict=False))
    assert changes <= 6, "it flaps"
    assert run.replica_s[DECODER] > run.replica_s[GENERATOR] == pytest.approx(len(decoders), abs=1)


def test_ours_starts_decoders_before_the_default_policy_does() -> None:
    scaling = {"max_replicas": 4, "upscale_delay_s": 2.0, "look_back_period_s": 11.0}
    arrivals = [Arrival(at_s=5.0, pages=16)] * 8

    def second_decoder_s(policy: object) -> float:
        run = simulate(arrivals, cluster(**scaling), policy)  # type: ignore[arg-type]
        return next(seen["at_s"] for seen in run.series if seen["decoders"] > 1)

    assert second_decoder_s(StoryPolicy(page_s=0.25, picture_s=2.0)) <= second_decoder_s(default_policy)


def test_an_application_without_replicas_wakes_up() -> None:
    asleep = AutoscalingConfig(min_replicas=0, max_replicas=2)
    both = Cluster(profile=PROFILE, generator=asleep, decoder=asleep, generator_start_s=5.0, decoder_start_s=6.0)
    run = simulate([Arrival(at_s=20.0, pages=2)], both, StoryPolicy())
    # The decoder starts beside the generator, and not after the first page.
    assert 5.0 + 1.0 + 4.0 <= run.first_picture_s[0] <= 6.0 + 4.0 + 3.0


def test_the_same_seed_is_the_same_run() -> None:
    arrivals = LOADS["steady"].arrivals(1)[:50]
    first, second = (simulate(arrivals, cluster(max_replicas=3), StoryPolicy(), seed=5) for _ in range(2))
    assert first.first_picture_s == second.first_picture_s and first.series == second.series
    assert steady(0.1, 100, pages=2, seed=1) == steady(0.1, 100, pages=2, seed=1)


def test_the_figures_are_what_the_simulator_says_today() -> None:
    """The stored figures are of this code: the live run is simulated again."""
    found = json.loads(RESULTS.read_text())
    assert set(found["ratios"]) == set(GOALS)
    live = compare_with_live(json.loads(LIVE.read_text())["figures"])
    for name, figures in live.items():
        assert figures == pytest.approx(found["figures"]["live"][name], rel=1e-6), name
