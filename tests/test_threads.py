"""Teams of threads belong to engines."""

import threading

import pytest
import torch

from minigpt5.config import default_model_folder
from minigpt5.decoder import DiffusionDecoder
from minigpt5.model_folder import load_decoder_parts
from minigpt5.threads import share, single_thread


def test_the_number_of_threads_comes_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError), single_thread():
        assert torch.get_num_threads() == 1
        raise ValueError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("num_cores", "expected"), [(1, (1, 1)), (2, (1, 2)), (4, (1, 4)), (16, (5, 12))])
def test_two_teams_fit_the_cores(num_cores: int, expected: tuple[int, int]) -> None:
    assert share(num_cores) == expected


def test_an_engine_has_a_team_and_who_loads_it_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        "minigpt5.model_folder.load_decoder_parts",
        lambda folder, load=load_decoder_parts: (seen.append(torch.get_num_threads()), load(folder))[1],
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        decoder = DiffusionDecoder.from_pretrained(default_model_folder(), num_threads=3)
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)
    thread = threading.Thread(target=lambda: (decoder._loop._begin(), seen.append(torch.get_num_threads())))
    thread.start()
    thread.join()
    assert seen == [1, 3]
    torch.set_num_threads(before)
