"""Planning: the formulas, the profile of a running server, and both commands."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from deployments import plan as planner
from deployments import profile as profiler
from deployments.autoscaling.stages import Profile, Stage
from deployments.plan import erlang_c, plan, plan_picture, plan_text
from minigpt5.errors import SettingsError
from tests.helpers.fakes import FakeGenerator
from tests.helpers.processes import find_free_port
from tests.helpers.served import Listening, Served

PROFILE = Profile(
    text=Stage(alone_s=3.0, full_s=3.0, batch=4, cv=0.1), picture=Stage(alone_s=2.0, full_s=4.0, batch=4, cv=0.0)
)


def test_erlang_c_is_the_sum_of_the_textbook() -> None:
    for servers, offered in ((1, 0.5), (3, 2.0), (10, 8.5)):
        last = offered**servers / math.factorial(servers) * servers / (servers - offered)
        before = sum(offered**number / math.factorial(number) for number in range(servers))
        assert erlang_c(servers, offered) == pytest.approx(last / (before + last))


def test_one_server_waits_as_pollaczek_and_khinchine_say() -> None:
    stage = Stage(alone_s=2.0, full_s=2.0, batch=1, cv=0.5)
    found = plan_picture(stage, 0.3, max_use=0.7, pages=1, text_s=1.0)
    assert found.replicas == 1
    assert found.wait_s == pytest.approx(0.3 * 2.0**2 * (1 + 0.5**2) / (2 * (1 - 0.6)))


def test_pages_of_one_story_wait_for_each_other() -> None:
    waits = [
        plan_picture(PROFILE.picture, 0.6, max_use=0.7, pages=pages, text_s=3.0).wait_s for pages in (1, 2, 99, 999)
    ]
    assert waits[0] < waits[1] < waits[2] == waits[3]


def test_an_item_that_shares_a_replica_takes_longer() -> None:
    """Processor sharing, where n at once take n times as long: the mean is that of M/M/1."""
    stage = Stage(alone_s=1.0, full_s=64.0, batch=64)
    assert plan_text(stage, 0.5, max_use=0.7).seconds == pytest.approx(1.0 / (1 - 0.5), rel=1e-6)


def test_a_stage_is_as_slow_as_it_was_measured() -> None:
    stage = PROFILE.picture
    assert [stage.latency_s(num) for num in (1, 2, 4, 99)] == pytest.approx([2.0, 2.0 * math.sqrt(2), 4.0, 4.0])
    assert (stage.item_s, stage.speed_up) == (1.0, pytest.approx(math.sqrt(2)))


def test_replicas_are_as_few_as_keep_below_the_use() -> None:
    found = plan(PROFILE, stories_per_hour=900, pages=4, max_use=0.7, generator_gpus=2.0)
    assert (found.text.replicas, found.picture.replicas) == (2, 2)
    assert found.text.use == pytest.approx(0.375) and found.picture.use == pytest.approx(0.5)
    assert found.gpus == 6 and found.gpu_s_per_page == pytest.approx(6.0)
    assert found.first_picture_s >= PROFILE.text.alone_s + PROFILE.picture.alone_s


def test_a_stage_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no stage"):
        Stage(alone_s=0.0, full_s=1.0, batch=1)
    (tmp_path / "wrong.json").write_text('{"text": {}}')
    with pytest.raises(SettingsError, match=r"wrong\.json is no profile"):
        Profile.load(tmp_path / "wrong.json")


def test_the_command_prints_its_plan_and_its_assumptions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PROFILE.save(tmp_path / "measured.json")
    assert Profile.load(tmp_path / "measured.json") == PROFILE
    arguments = ["--stories-per-hour", "900", "--pages", "4", "--profile", str(tmp_path / "measured.json")]
    assert planner.main(arguments) == 0
    said = capsys.readouterr().out
    for words in ("2 replicas", "GPUs", "GPU-seconds a page", "time to first picture", "Poisson", "Allen and Cunneen"):
        assert words in said
    assert planner.main([*arguments[:-1], str(tmp_path / "none.json")]) == 1
    assert "deployments.profile" in capsys.readouterr().err


def test_the_profile_of_a_server_has_its_seconds(tmp_path: Path) -> None:
    """A page of the fake generator is four words of 20 ms each; its pictures take no time."""
    served = Served(tmp_path / "stories", generator=FakeGenerator(delay_s=0.02), max_running=8)
    port, output = find_free_port(), tmp_path / "measured.json"
    listening = Listening(served, port)
    try:
        batches = ["--text-batch", "3", "--picture-batch", "2", "--pages", "2"]
        assert profiler.main([f"http://127.0.0.1:{port}", *batches, "--output", str(output)]) == 0
    finally:
        listening.stop()
    found = Profile.load(output)
    assert (found.text.batch, found.picture.batch) == (3, 2)
    assert 0.08 <= found.text.alone_s < 2.0 and found.picture.alone_s < 2.0
    assert served.store.list_ids() == []


def test_a_story_that_fails_ends_the_profile_and_is_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = Served(tmp_path / "stories", generator=FakeGenerator(fails_on_page=2), max_running=8)
    port, output = find_free_port(), tmp_path / "measured.json"
    listening = Listening(served, port)
    try:
        assert profiler.main([f"http://127.0.0.1:{port}", "--pages", "2", "--output", str(output)]) == 1
    finally:
        listening.stop()
    assert "has no times (" in capsys.readouterr().err
    assert not output.exists() and served.store.list_ids() == []
