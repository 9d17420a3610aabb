"""Votes -> win rates, Bradley-Terry scores and Krippendorff's alpha, with bootstrap intervals.

Shapes: V votes, S resamples, R runs. The bootstrap draws raters and items with replacement, both at once, and weighs a
vote by how often its rater and its item were drawn (Owen, "The pigeonhole bootstrap", 2007): votes of one rater, and
votes on one item, are not independent, and an interval that took them to be so would be too narrow.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minigpt5.evaluation.study.answers import Vote

NUM_RESAMPLES = 2000
MIN_RESAMPLES = 100
"""Fewer say nothing of the ends of an interval."""
LEVEL = 0.95
"""Share of the intervals."""
HALF_WIN = 0.5
"""Added to both sides of each pair that was compared (Anscombe's correction): a run that won each time has a finite
score."""
TOLERANCE = 1e-9
MAX_STEPS = 200

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """Shares of one pair's votes on one question. `preference` counts a tie as half a win of the first."""

    question: str
    first: str
    second: str
    num_votes: int
    wins: Estimate
    ties: Estimate
    losses: Estimate
    preference: Estimate
    alpha: float | None
    """Agreement of the raters about these votes; None where it is not defined."""


def resample(votes: Sequence[Vote], *, num_resamples: int, seed: int) -> Floats:
    """Weights (S, V) of the votes in each resample."""
    draw = np.random.default_rng(seed)
    weights_SV = np.ones((num_resamples, len(votes)))
    for labels in ([vote.rater for vote in votes], [vote.item for vote in votes]):
        groups, index_V = np.unique(labels, return_inverse=True)
        counts_SG = draw.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=num_resamples)
        weights_SV *= counts_SG[:, index_V]
    return weights_SV


def compare_pairs(votes: Sequence[Vote], weights_SV: Floats) -> list[PairResult]:
    """Win rates of each question and pair, in the order of the votes' questions and pairs."""
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for number, vote in enumerate(votes):
        groups[vote.question, vote.first, vote.second].append(number)
    results = []
    for (question, first, second), numbers in groups.items():
        winners = [votes[number].winner for number in numbers]
        won_V, lost_V = (np.array([winner == run for winner in winners], float) for run in (first, second))
        tied_V = 1 - won_V - lost_V
        of_pair_SV = weights_SV[:, numbers]
        results.append(
            PairResult(
                question=question,
                first=first,
                second=second,
                num_votes=len(numbers),
                wins=_share(won_V, of_pair_SV),
                ties=_share(tied_V, of_pair_SV),
                losses=_share(lost_V, of_pair_SV),
                preference=_share(won_V + tied_V / 2, of_pair_SV),
                alpha=agreement([votes[number] for number in numbers]),
            )
        )
    return results


def score_runs(votes: Sequence[Vote], runs: Sequence[str], weights_SV: Floats) -> dict[str, Estimate] | None:
    """Bradley-Terry scores of one question: natural logarithms of strengths, with mean 0. A tie is half a win each.

    None where the votes do not connect all runs, so that no scale holds them all.
    """
    index = {run: number for number, run in enumerate(runs)}
    first_V, second_V = (
        np.array([index[run] for run in side])
        for side in zip(*((vote.first, vote.second) for vote in votes), strict=True)
    )
    share_V = np.array([0.5 if vote.winner is None else float(vote.winner == vote.first) for vote in votes])
    compared_RR = np.zeros((len(runs), len(runs)))
    compared_RR[first_V, second_V] = compared_RR[second_V, first_V] = 1
    if not np.linalg.matrix_power(compared_RR + np.eye(len(runs)), len(runs)).all():
        return None

    def fit(weights_SV: Floats) -> Floats:
        wins_SRR = np.zeros((len(weights_SV), len(runs), len(runs)))
        rows_S1 = np.arange(len(weights_SV))[:, None]
        np.add.at(wins_SRR, (rows_S1, first_V, second_V), weights_SV * share_V)
        np.add.at(wins_SRR, (rows_S1, second_V, first_V), weights_SV * (1 - share_V))
        return bradley_terry(wins_SRR + HALF_WIN * compared_RR)

    weights_SV = weights_SV[weights_SV.sum(axis=1) > 0]  # a resample without a vote of this question says nothing
    scores_R, resampled_SR = fit(np.ones((1, len(votes))))[0], fit(weights_SV)
    return {run: _estimate(float(scores_R[number]), resampled_SR[:, number]) for run, number in index.items()}


def bradley_terry(wins_SRR: Floats) -> Floats:
    """Scores (S, R) from wins of a run (rows) over another (columns): the maximum of the likelihood (Bradley and Terry,
    1952), by Newton's method on its logarithm, which is concave.

    Each run must have won and lost, or the scores have no end.
    """
    games_SRR = wins_SRR + wins_SRR.transpose(0, 2, 1)
    scores_SR = np.zeros(wins_SRR.shape[:2])
    for _ in range(MAX_STEPS):
        chance_SRR = 1 / (1 + np.exp(scores_SR[:, None, :] - scores_SR[:, :, None]))
        slope_SR = (wins_SRR - games_SRR * chance_SRR).sum(axis=2)
        weight_SRR = games_SRR * chance_SRR * (1 - chance_SRR)
        # All scores may move together, which changes nothing: the added ones hold their sum.
        curve_SRR = np.eye(len(scores_SR[0])) * weight_SRR.sum(axis=2)[:, :, None] - weight_SRR + 1
        step_SR = np.linalg.solve(curve_SRR, slope_SR[:, :, None])[:, :, 0]
        largest_S1 = np.abs(step_SR).max(axis=1, keepdims=True)
        scores_SR = scores_SR + step_SR / np.maximum(1, largest_S1)  # further than 1 it may overshoot
        if largest_S1.max() < TOLERANCE:
            break
    return scores_SR - scores_SR.mean(axis=1, keepdims=True)


def agreement(votes: Iterable[Vote]) -> float | None:
    """Krippendorff's alpha of the votes of one question and pair: a unit is an item, a value is the winner or a tie."""
    units: dict[str, list[Hashable]] = defaultdict(list)
    for vote in votes:
        units[vote.item].append(vote.winner)
    return krippendorff_alpha(list(units.values()))


def krippendorff_alpha(units: Sequence[Sequence[Hashable]]) -> float | None:
    """Nominal alpha of the values that raters gave to each unit (Krippendorff, "Computing Krippendorff's
    Alpha-Reliability", 2011). Units with one value say nothing about agreement.

    None where no unit has two values, or all values are equal: alpha is not defined then.
    """
    pairable = [unit for unit in units if len(unit) > 1]
    totals = Counter(value for unit in pairable for value in unit)
    num_values = totals.total()
    expected = num_values**2 - sum(count**2 for count in totals.values())
    if not expected:
        return None
    observed = sum(
        (len(unit) ** 2 - sum(count**2 for count in Counter(unit).values())) / (len(unit) - 1) for unit in pairable
    )
    return 1 - (num_values - 1) * observed / expected


def _share(hit_V: Floats, weights_SV: Floats) -> Estimate:
    """Estimate a weighted mean. A resample that drew none of these votes has none, and counts for nothing."""
    drawn_SV = weights_SV[weights_SV.sum(axis=1) > 0]
    return _estimate(float(hit_V.mean()), drawn_SV @ hit_V / drawn_SV.sum(axis=1))


def _estimate(value: float, resampled_S: Floats) -> Estimate:
    low, high = np.quantile(resampled_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value=value, low=float(low), high=float(high))
