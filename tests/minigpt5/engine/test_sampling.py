from __future__ import annotations

import numpy as np
import pytest

from minigpt5.engine.sampling import Choice, sample_token
from minigpt5.types import Sampling

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def draw(sampling: Sampling, position: int, seen: tuple[int, ...] = ()) -> int:
    return choose(LOGITS, sampling, position, seen).token


def choose(logits: np.ndarray, sampling: Sampling, position: int = 0, seen: tuple[int, ...] = ()) -> Choice:
    return sample_token(logits, sampling, seed=1, page=1, position=position, seen=list(seen))


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


@pytest.mark.parametrize("top_p", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_leaving_unlikely_tokens_out_of_sorting_changes_no_choice(top_p: float, spread: float) -> None:
    sampling = Sampling(temperature=0.7, top_p=top_p)
    for position in range(20):
        logits = (np.random.default_rng(position).normal(size=3000) * spread).astype(np.float32)
        scaled = (logits.astype(np.float64) - logits.max()) / 0.7
        probabilities = np.exp(scaled) / np.exp(scaled).sum()
        order = np.argsort(-probabilities, kind="stable")
        kept = np.cumsum(probabilities[order])[: int((np.cumsum(probabilities[order]) < top_p).sum()) + 1]
        drawn = np.random.default_rng([1, 1, position]).random() * kept[-1]
        assert choose(logits, sampling, position).token == order[(kept <= drawn).sum()]


def test_a_greedy_margin_is_the_best_logits_lead() -> None:
    logits = np.array([1.0, 3.0, 2.5], np.float32)
    assert choose(logits, Sampling(temperature=0)).margin == pytest.approx(0.5)


@pytest.mark.parametrize("sampling", [Sampling(temperature=1, top_p=1), Sampling(temperature=1, top_p=0.7)])
def test_a_sampled_choice_stands_while_logits_move_by_less_than_its_margin(sampling: Sampling) -> None:
    rng = np.random.default_rng(0)
    num_moved = 0
    for position in range(300):
        logits = rng.normal(size=12).astype(np.float32) * 2
        choice = choose(logits, sampling, position)
        for size in (0.1, 0.4):
            other = choose(logits + rng.uniform(-1, 1, 12).astype(np.float32) * size, sampling, position)
            num_moved += other.token != choice.token
            # Probabilities move by at most twice what logits do, the borders between them likewise.
            assert other.token == choice.token or choice.margin < 4 * size
    assert num_moved


def test_two_tokens_of_one_probability_have_no_margin() -> None:
    assert choose(np.zeros(4, np.float32), Sampling(temperature=1, top_p=0.9)).margin == 0
