"""Bootstrap intervals of means and of statistics of whole sets.

Rows are drawn with replacement, each with all of its values: the pages of a story are not independent, and an interval
that took them to be so would be too narrow.

Shapes: G rows, S resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

LEVEL = 0.95
RESAMPLES = 1000
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its 95 % interval, which is None where one row alone, or no resample, has a value."""

    n: int
    """Values, of as many samples."""
    rows: int
    mean: float
    low: float | None
    high: float | None


def mean_interval(values: Mapping[str, Sequence[float]], *, by_row: bool = False, seed: int = 0) -> Interval:
    """The mean of values by row. `by_row`: each row's mean counts once, however many values it has."""
    sums_G = np.array([np.mean(one) if by_row else np.sum(one) for one in values.values()])
    counts_G = np.array([1.0 if by_row else len(one) for one in values.values()])
    mean = float(sums_G.sum() / counts_G.sum())
    low = high = None
    if len(sums_G) > 1:
        weights_SG = _weights(len(sums_G), RESAMPLES, seed)
        low, high = _ends((weights_SG @ sums_G) / (weights_SG @ counts_G))
    return Interval(n=sum(map(len, values.values())), rows=len(sums_G), mean=mean, low=low, high=high)


def set_interval(
    rows: Mapping[str, Sequence[T]], statistic: Callable[[list[T]], float], *, resamples: int, seed: int = 0
) -> Interval:
    """A statistic of all values together, such as a Frechet distance.

    Drawing with replacement biases such a distance upwards, for a set with doubles has less spread. So the interval is
    the spread of the resamples about their own mean, laid about the value: how much the value would change with other
    rows, and no correction of its own bias at small n. A resample that the statistic is NaN of counts for nothing.
    """
    groups = list(rows.values())
    everything = [value for group in groups for value in group]
    value = statistic(everything)
    low = high = None
    if len(groups) > 1:
        drawn = []
        for weights_G in _weights(len(groups), resamples, seed).astype(int):
            times = zip(groups, weights_G, strict=True)
            drawn.append(statistic([one for group, number in times for _ in range(number) for one in group]))
        spread_S = np.array(drawn)
        spread_S = spread_S[~np.isnan(spread_S)]
        if len(spread_S):
            low, high = _ends(spread_S - spread_S.mean() + value)
    return Interval(n=len(everything), rows=len(groups), mean=value, low=low, high=high)


def _weights(num_groups: int, resamples: int, seed: int) -> np.ndarray:
    """How often each row is drawn: (S, G)."""
    draw = np.random.default_rng(seed)
    return draw.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=resamples).astype(float)


def _ends(values_S: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
