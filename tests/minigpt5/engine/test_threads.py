"""Teams of threads belong to engines."""

import asyncio

import pytest
import torch

from minigpt5.config import default_model_folder
from minigpt5.engine.decoder import DiffusionDecoder
from minigpt5.engine.generator import VokenGenerator
from minigpt5.engine.threads import Team, share, single_thread
from minigpt5.model.folder import load_decoder_model
from minigpt5.types import Sampling, StoryRequest


def test_the_number_of_threads_comes_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError), single_thread():
        assert torch.get_num_threads() == 1
        raise ValueError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("num_cores", "expected"), [(1, (1, 1)), (2, (1, 2)), (4, (1, 4)), (16, (5, 12))])
def test_two_teams_fit_the_cores(num_cores: int, expected: tuple[int, int]) -> None:
    assert share(num_cores) == expected


def test_who_loads_an_engine_has_no_team(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        "minigpt5.model.folder.load_decoder_model",
        lambda folder, load=load_decoder_model, **options: (seen.append(torch.get_num_threads()), load(folder))[1],
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        decoder = DiffusionDecoder.from_pretrained(default_model_folder(), num_threads=3)
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)
    assert decoder._team.max_threads == 3


def test_a_generator_leaves_cores_that_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = VokenGenerator.from_pretrained(default_model_folder(), num_threads=2)
    seen, step = list[int](), generator._step
    monkeypatch.setattr(generator, "_step", lambda jobs: (seen.append(torch.get_num_threads()), step(jobs))[1])
    generator._team.num = 1  # as beside a busy process
    monkeypatch.setattr(generator._team, "_decide", lambda *times: None)

    async def write() -> None:
        sampling = Sampling(min_page_tokens=2, max_page_tokens=2)
        async for _ in generator.generate(StoryRequest(prompt=("A fox",), pages=1, sampling=sampling)):
            pass

    asyncio.run(write())
    assert set(seen) == {1} and generator._team.max_threads == 2


@pytest.mark.parametrize(
    ("num", "thread", "process", "idle", "expected"),
    [
        (2, 1.0, 2.0, 0.0, 2),  # alone
        (2, 1.0, 1.6, 0.3, 2),  # alone, its helper asleep at times
        (2, 0.67, 1.33, 0.0, 1),  # beside a busy process
        (2, 1.0, 1.5, 0.0, 1),  # the same, its helper waiting for a core
        (1, 1.0, 1.0, 0.0, 1),  # the busy process goes on
        (1, 1.0, 1.0, 1.0, 2),  # it has ended
        (2, 0.67, 2.0, 0.0, 1),  # beside a busy thread of the same process
        (1, 1.0, 2.0, 0.0, 1),  # which goes on
    ],
)
def test_a_team_is_as_large_as_it_finds_cores(
    num: int, thread: float, process: float, idle: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([(0.0, 0.0, 0.0, 0.0), (1.0, thread, process, idle)])
    team = Team(2, read=lambda: next(times))
    team.num, team.num_cores = num, 2
    before = torch.get_num_threads()
    with team.working():
        assert torch.get_num_threads() == num
    torch.set_num_threads(before)
    assert team.num == expected


def test_a_team_of_one_is_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Team(1).working():
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
