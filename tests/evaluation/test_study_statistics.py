"""Statistics of a human study against published examples, closed forms and a known coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from minigpt5.evaluation.study.answers import Vote
from minigpt5.evaluation.study.statistics import (
    agreement,
    bradley_terry,
    compare_pairs,
    krippendorff_alpha,
    resample,
    score_runs,
)


def vote(rater: object, item: object, winner: str | None, first: str = "a", second: str = "b") -> Vote:
    return Vote(rater=str(rater), question="image", item=str(item), first=first, second=second, winner=winner)


# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011): his examples A, B and C, and his alphas.
@pytest.mark.parametrize(
    ("observers", "alpha"),
    [
        (["0100000010", "1110010000"], 0.095),
        (["aabbdcccedda", "babbbcccedd" + "d"], 0.692),
        (["123321412...", "1233224125.3", ".3332342251.", "12332441251."], 0.743),
    ],
)
def test_alpha_is_that_of_the_published_examples(observers: list[str], alpha: float) -> None:
    units = [[value for value in unit if value != "."] for unit in zip(*observers, strict=True)]
    found = krippendorff_alpha(units)
    assert found is not None and round(found, 3) == alpha


def test_alpha_is_one_for_equal_answers_and_undefined_without_variation() -> None:
    assert krippendorff_alpha([[1, 1], [2, 2, 2]]) == 1
    assert krippendorff_alpha([[1, 1], [1, 1]]) is None
    assert krippendorff_alpha([[1], [2]]) is None


def test_agreement_is_of_each_pair_and_the_order_of_runs_does_not_change_it() -> None:
    """Ten items of each pair, of which two raters agree on eight."""

    def alphas(pairs: tuple[tuple[str, str], ...]) -> dict[frozenset[str], float | None]:
        votes = [
            vote(rater, item, "a" if item < 8 or rater else other, first, second)
            for first, second in pairs
            for other in {first, second} - {"a"}
            for rater in (0, 1)
            for item in range(10)
        ]
        return {frozenset((one.first, one.second)): one.alpha for one in compare_pairs(votes, np.ones((1, len(votes))))}

    found = alphas((("a", "b"), ("a", "c")))
    expected = 1 - 19 * 4 / (20**2 - 18**2 - 2**2)  # of 20 values two are not "a", each beside one that is
    assert found == {frozenset("ab"): pytest.approx(expected), frozenset("ac"): pytest.approx(expected)}
    assert alphas((("b", "a"), ("a", "c"))) == found


def test_agreement_needs_two_raters_and_two_answers() -> None:
    assert agreement(vote(rater, item, winner) for rater in (1, 2) for item, winner in (("x", "a"), ("y", None))) == 1
    assert agreement(vote(1, item, "a") for item in "xyz") is None


def test_two_runs_have_the_scores_of_the_closed_form() -> None:
    votes = [vote(rater, 1, winner) for rater, winner in enumerate(["a"] * 6 + ["b"] * 2 + [None] * 2)]
    scores = score_runs(votes, ["a", "b"], np.ones((3, 10)))
    assert scores is not None
    odds = math.log((6 + 1 + 0.5) / (2 + 1 + 0.5))  # a tie is half a win each, and half a win is added
    assert scores["a"].value == pytest.approx(odds / 2, abs=1e-7)
    assert scores["b"].value == pytest.approx(-scores["a"].value)
    assert scores["a"].low == pytest.approx(scores["a"].value)


def test_wins_in_the_ratio_of_strengths_give_these_strengths() -> None:
    strengths_R = np.array([1.0, 2.0, 4.0, 0.5])
    wins_RR = 30 * strengths_R[:, None] / (strengths_R[:, None] + strengths_R)
    np.fill_diagonal(wins_RR, 0)
    wins_RR[0, 3] = wins_RR[3, 0] = 0  # not each pair needs to be compared
    expected_R = np.log(strengths_R) - np.log(strengths_R).mean()
    np.testing.assert_allclose(bradley_terry(wins_RR[None])[0], expected_R, atol=1e-6)


def test_clusters_that_hang_by_few_votes_have_their_distance() -> None:
    """Thousands of votes within each of two clusters, and one and a half to half a vote between them."""
    wins_RR = np.zeros((4, 4))
    wins_RR[0, 1] = wins_RR[1, 0] = wins_RR[2, 3] = wins_RR[3, 2] = 5_000
    wins_RR[0, 2], wins_RR[2, 0] = 1.5, 0.5
    scores_R = bradley_terry(wins_RR[None])[0]
    np.testing.assert_allclose(scores_R, np.log(3) / 2 * np.array([1, 1, -1, -1]), atol=1e-8)
    one_sided = np.array([[0, 1e6], [0.5, 0]])
    assert bradley_terry(one_sided[None])[0] @ [1, -1] == pytest.approx(math.log(2e6))


def test_runs_that_no_vote_connects_have_no_common_scale() -> None:
    votes = [vote(1, 1, "a"), vote(1, 1, "c", "c", "d")]
    assert score_runs(votes, ["a", "b", "c", "d"], np.ones((2, 2))) is None


def test_a_run_that_always_won_has_a_finite_score() -> None:
    votes = [vote(rater, item, "a") for rater in range(3) for item in range(3)]
    scores = score_runs(votes, ["a", "b"], resample(votes, num_resamples=50, seed=0))
    assert scores is not None and 0 < scores["a"].low <= scores["a"].high < 5


def test_a_resample_without_a_vote_of_a_question_is_no_even_score() -> None:
    """One of eight raters has answered: most resamples leave out all that was answered."""
    others = [vote(rater, item, "a") for rater in range(1, 8) for item in range(3)]
    votes = [vote(0, item, "a") for item in range(3)]
    weights_SV = resample([*votes, *others], num_resamples=400, seed=0)[:, : len(votes)]
    assert (weights_SV.sum(axis=1) == 0).mean() > 0.3
    scores = score_runs(votes, ["a", "b"], weights_SV)
    assert scores is not None and scores["a"].low > 0 and scores["b"].high < 0


def test_shares_are_counted_and_sum_to_one() -> None:
    votes = [vote(1, item, winner) for item, winner in enumerate(["a", "a", "b", None])]
    [pair] = compare_pairs(votes, resample(votes, num_resamples=200, seed=0))
    assert (pair.wins.value, pair.ties.value, pair.losses.value) == (0.5, 0.25, 0.25)
    assert pair.preference.value == 0.625 and pair.num_votes == 4
    assert 0 <= pair.wins.low < 0.5 < pair.wins.high <= 1


def test_votes_of_one_rater_do_not_count_as_independent() -> None:
    """Ten raters who each have one answer for all of fifty items know as much as ten votes."""
    votes = [vote(rater, item, "a" if rater < 5 else "b") for rater in range(10) for item in range(50)]
    [pair] = compare_pairs(votes, resample(votes, num_resamples=2000, seed=0))
    by_raters = 1.96 * math.sqrt(0.25 / 10)
    assert (pair.wins.high - pair.wins.low) / 2 == pytest.approx(by_raters, rel=0.1)


def test_votes_on_one_item_do_not_count_as_independent() -> None:
    votes = [vote(rater, item, "a" if item < 5 else "b") for rater in range(50) for item in range(10)]
    [pair] = compare_pairs(votes, resample(votes, num_resamples=2000, seed=0))
    assert (pair.wins.high - pair.wins.low) / 2 == pytest.approx(1.96 * math.sqrt(0.25 / 10), rel=0.1)


def test_the_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """One item and 60 raters: a plain bootstrap of a share, whose coverage is near 95 %."""
    draw = np.random.default_rng(3)
    covered = 0
    for study in range(200):
        votes = [vote(rater, 1, "a" if won else "b") for rater, won in enumerate(draw.random(60) < 0.6)]
        [pair] = compare_pairs(votes, resample(votes, num_resamples=300, seed=study))
        covered += pair.wins.low <= 0.6 <= pair.wins.high
    assert 0.90 <= covered / 200 <= 0.985
