from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from minigpt5.engine.sampling import NOT_DRAWN, Choice, TokenDraw, draw_token, draw_tokens, sample_token
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


# On the device of the logits


def new_draw(
    position: int, *, seen: tuple[int, ...] = (), closed: tuple[int, ...] = (), **changes: object
) -> TokenDraw:
    sampling = Sampling(**{"temperature": 1.0, "top_p": 1.0, **changes})  # type: ignore[arg-type]
    return TokenDraw(sampling=sampling, seed=5, page=2, position=position, seen=list(seen), closed=list(closed))


def draw_rows(draws: list[TokenDraw], logits_T: np.ndarray = LOGITS, *, first_voken: int = 3) -> list[int]:
    """All rows have the same logits."""
    logits_RT = torch.from_numpy(logits_T).expand(len(draws), -1)
    return draw_tokens(logits_RT, draws, first_voken=first_voken)


VARIED = [
    {},
    {"temperature": 0},
    {"temperature": 0.3, "top_p": 0.9},
    {"top_p": 0.5},
    {"top_p": 1e-9},
    {"repetition_penalty": 1.4},
    {"temperature": 0, "repetition_penalty": 3.0},
    {"temperature": 2.5, "top_p": 0.99, "repetition_penalty": 0.8},
]


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_rows_of_every_kind_get_the_tokens_that_the_cpu_gives_them(spread: float) -> None:
    rng = np.random.default_rng(0)
    logits_RT = (rng.normal(size=(400, 900)) * spread).astype(np.float32)
    draws = []
    for row in range(400):
        seen, closed = (tuple(rng.integers(0, 890, size=size).tolist()) for size in (row % 30, row % 5))
        draw = new_draw(row, seen=seen, closed=closed, **VARIED[row % len(VARIED)])
        draws.append(dataclasses.replace(draw, is_rushed=row % 50 == 7))
    expected = [draw_token(logits_T, draw, first_voken=890) for logits_T, draw in zip(logits_RT, draws, strict=True)]
    found = draw_tokens(torch.from_numpy(logits_RT), draws, first_voken=890)
    firm = [row for row, choice in enumerate(expected) if choice.margin > 1e-9]
    assert len(firm) > 340  # where probabilities are alike, top_p of 1 leaves some choices open
    assert [found[row] for row in firm] == [expected[row].token for row in firm]
    assert max(found) <= 890 and not any(token in draw.closed for token, draw in zip(found, draws, strict=True))


def test_a_row_draws_the_same_alone_and_in_any_company() -> None:
    draws = [new_draw(position, top_p=0.9) for position in range(200)]
    together = draw_rows(draws)
    assert [draw_rows([draw])[0] for draw in draws] == together
    assert draw_rows(draws[::-1]) == together[::-1]


@pytest.mark.parametrize(("top_p", "shares"), [(1.0, [0.5, 0.3, 0.15, 0.05]), (0.7, [0.625, 0.375, 0, 0])])
def test_shares_of_rows_pass_a_chi_square_test(top_p: float, shares: list[float]) -> None:
    num = 8000
    drawn = np.bincount(draw_rows([new_draw(position, top_p=top_p) for position in range(num)]), minlength=4)
    expected = num * np.array(shares)
    is_drawn = expected > 0
    assert not drawn[~is_drawn].any()
    chi_square = ((drawn - expected)[is_drawn] ** 2 / expected[is_drawn]).sum()
    assert chi_square < {4: 16.27, 2: 10.83}[int(is_drawn.sum())]  # exceeded by one in a thousand


def test_greedy_rows_take_the_first_of_the_best() -> None:
    logits = np.array([1, 4, 4, 0, 9], np.float32)
    assert draw_rows([new_draw(position, temperature=0) for position in range(3)], logits) == [1, 1, 1]


def test_closed_tokens_and_later_vokens_never_follow() -> None:
    logits = np.array([0, 5, 1, 9, 20], np.float32)
    draws = [new_draw(position, closed=(1, 3)) for position in range(300)]
    assert set(draw_rows(draws, logits)) == {0, 2}
    assert set(draw_rows([new_draw(position) for position in range(300)], logits)) == {1, 3}


@pytest.mark.parametrize("fault", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_broken_logits_is_not_drawn_and_its_neighbour_is(fault: float, temperature: float) -> None:
    logits_RT = np.stack([LOGITS, LOGITS])
    logits_RT[0, 1] = fault
    draws = [new_draw(position, temperature=temperature) for position in range(2)]
    with pytest.raises(FloatingPointError, match="not finite"):
        draw_token(logits_RT[0], draws[0], first_voken=3)
    expected = draw_token(logits_RT[1], draws[1], first_voken=3).token
    assert draw_tokens(torch.from_numpy(logits_RT), draws, first_voken=3) == [NOT_DRAWN, expected]


def test_rows_leave_the_logits_as_they_are() -> None:
    logits_RT = torch.from_numpy(LOGITS.copy())[None]
    draw_tokens(logits_RT, [new_draw(0, closed=(0,))], first_voken=2)
    np.testing.assert_array_equal(logits_RT[0], LOGITS)
