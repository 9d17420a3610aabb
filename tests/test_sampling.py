from __future__ import annotations

import numpy as np

from minigpt5.sampling import sample_token
from minigpt5.types import Sampling

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def draw(sampling: Sampling, position: int, seen: tuple[int, ...] = ()) -> int:
    return sample_token(LOGITS, sampling, seed=1, page=1, position=position, seen=list(seen))


def test_zero_temperature_is_greedy() -> None:
    assert {draw(Sampling(temperature=0), i) for i in range(20)} == {0}


def test_shares_follow_the_probabilities() -> None:
    drawn = [draw(Sampling(temperature=1, top_p=1), i) for i in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    assert set(draw(Sampling(temperature=1, top_p=0.7), i) for i in range(300)) == {0, 1}


def test_the_repetition_penalty_lowers_what_was_seen() -> None:
    greedy = Sampling(temperature=0, repetition_penalty=3.0)
    assert draw(greedy, 0, seen=(0,)) == 1


def test_a_draw_depends_on_seed_page_and_position_alone() -> None:
    sampling = Sampling(temperature=1, top_p=1)
    assert [draw(sampling, i) for i in range(50)] == [draw(sampling, i) for i in range(50)]
