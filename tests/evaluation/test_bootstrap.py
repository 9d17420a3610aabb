"""Intervals by hand: of means by rows, and of statistics of sets."""

from __future__ import annotations

import numpy as np
import pytest

from minigpt5.evaluation.bootstrap import RESAMPLES, mean_interval, set_interval


def test_the_mean_is_over_values_or_over_rows() -> None:
    values = {"a": [1.0, 1.0, 1.0], "b": [0.0]}
    found = mean_interval(values)
    assert (found.n, found.rows, found.mean) == (4, 2, 0.75)
    # Two rows are drawn: "a" twice, "b" twice, or both; means 1, 0 and 0.75.
    assert (found.low, found.high) == (0.0, 1.0)
    assert mean_interval(values, by_row=True).mean == 0.5


def test_values_of_one_row_move_together() -> None:
    rng = np.random.default_rng(0)
    shares = rng.random(40)
    together = {str(number): [float(share)] * 10 for number, share in enumerate(shares)}
    apart = {f"{number}/{index}": [float(share)] for number, share in enumerate(shares) for index in range(10)}
    wide, narrow = mean_interval(together), mean_interval(apart)
    assert wide.low is not None and wide.high is not None and narrow.low is not None and narrow.high is not None
    assert wide.mean == pytest.approx(narrow.mean)
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(10**0.5, rel=0.2)
    standard_error = shares.std() / 40**0.5
    assert (wide.high - wide.low) == pytest.approx(2 * 1.96 * standard_error, rel=0.15)
    assert RESAMPLES == 1000


def test_one_row_alone_has_no_interval() -> None:
    found = mean_interval({"a": [0.2, 0.4]})
    assert (found.mean, found.low, found.high) == (pytest.approx(0.3), None, None)
    assert set_interval({"a": [1.0]}, max, resamples=5).low is None


def test_a_biased_statistic_has_its_spread_about_its_value() -> None:
    """The number of different values: every resample has fewer."""
    rows = {str(number): [number] for number in range(50)}
    found = set_interval(rows, lambda values: float(len(set(values))), resamples=200)
    assert found.mean == 50 and found.low is not None and found.high is not None
    assert found.low < 50 < found.high < 56


def test_resamples_without_a_value_count_for_nothing() -> None:
    rows = {"a": [1.0], "b": [2.0]}
    found = set_interval(rows, lambda values: max(values) if 2.0 in values else float("nan"), resamples=50)
    assert (found.low, found.high) == (2.0, 2.0)


def test_intervals_are_the_same_again() -> None:
    values = {str(number): [number**0.5] for number in range(20)}
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1) != mean_interval(values, seed=2)
