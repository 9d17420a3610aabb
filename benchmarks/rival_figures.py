"""Items of a rival's answers -> its metrics with 95 % intervals, and those of several seeds as one.

The intervals are percentiles of a bootstrap that draws items with replacement. Several seeds have the mean of theirs,
and reach from the lowest bound of a seed to the highest: that holds what items do and what seeds do.

Shape letters: N items, R resamples, D features.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minigpt5.errors import BaseModelNotFound
from minigpt5.evaluation.text import bleu, load_wordnet, meteor

RESAMPLES = 1_000
SLOW_RESAMPLES = 100
"""Of metrics that are of all items together."""
RATIOS = (
    *(f"caption_{name}" for name in ("who", "what", "side", "place", "time", "all")),
    *("lpips", "story_named", "story_referred", "draw_precision", "draw_recall", "rouge_l"),
)
"""Metrics that are a sum over a sum: items are [value, weight], or values of weight 1."""
METRICS = (*RATIOS, "efficientnet_distance", "bleu_1", "bleu_2", "meteor")

Figure = dict[str, float] | None


def figures(items: dict[str, Any]) -> dict[str, Figure]:
    """Every metric of METRICS; None where the system does not do it, or nothing was there to be counted."""
    found: dict[str, Figure] = dict.fromkeys(METRICS)
    found |= {name: _of_ratio(_weighted(items[name])) for name in RATIOS if name in items}
    if "features_drawn" in items:
        drawn_ND, true_ND = np.array(items["features_drawn"]), np.array(items["features_true"])
        found["efficientnet_distance"] = _of_all(
            len(drawn_ND), lambda places: distance(drawn_ND[places], true_ND[places])
        )
    if "said" in items:
        said, true = items["said"], items["references"]
        for order in (1, 2):
            found[f"bleu_{order}"] = _of_all(
                len(said),
                lambda places, order=order: bleu(
                    [said[place] for place in places], [true[place] for place in places], order=order
                ),
            )
        found["meteor"] = _meteor(said, true)
    return found


def over_seeds(of_seeds: Sequence[dict[str, Figure]]) -> dict[str, Figure]:
    """One row of several; a metric that only some seeds have is of those."""
    found: dict[str, Figure] = dict.fromkeys(of_seeds[0])
    for name in found:
        if values := [figure for metrics in of_seeds if (figure := metrics[name])]:
            mean = statistics.mean(value["mean"] for value in values)
            lowest, highest = min(value["low"] for value in values), max(value["high"] for value in values)
            found[name] = {"mean": round(mean, 4), "low": lowest, "high": highest}
    return found


def distance(drawn_ND: np.ndarray, true_ND: np.ndarray) -> float:
    """The Frechet distance of minigpt5/evaluation/frechet.py for far fewer items than features: the trace of the root
    of both covariances' product is the sum of singular values of the items' products, N x N."""
    means = drawn_ND.mean(axis=0) - true_ND.mean(axis=0)
    one_ND, other_ND = ((values - values.mean(axis=0)) / (len(values) - 1) ** 0.5 for values in (drawn_ND, true_ND))
    together = np.linalg.svd(one_ND @ other_ND.T, compute_uv=False).sum()
    return float(means @ means + (one_ND**2).sum() + (other_ND**2).sum() - 2 * together)


def _weighted(values: list[Any]) -> np.ndarray:
    """(N, 2)."""
    array = np.array(values, float)
    return array if array.ndim == 2 else np.stack([array, np.ones_like(array)], axis=1)


def _of_ratio(items_N2: np.ndarray) -> Figure:
    value, weight = items_N2.sum(axis=0)
    if not weight:
        return None
    rng, num_items = np.random.default_rng(0), len(items_N2)
    sums_R2 = np.stack([items_N2[rng.integers(num_items, size=num_items)].sum(axis=0) for _ in range(RESAMPLES)])
    sums_R2 = sums_R2[sums_R2[:, 1] > 0]
    return _figure(float(value / weight), sums_R2[:, 0] / sums_R2[:, 1])


def _of_all(num: int, statistic: Callable[[np.ndarray], float]) -> Figure:
    """A statistic of all items. Doubles bias it, so the interval is the spread of the resamples, laid about the value
    (minigpt5/evaluation/bootstrap.py)."""
    rng, value = np.random.default_rng(0), statistic(np.arange(num))
    values_R = np.array([statistic(rng.integers(num, size=num)) for _ in range(SLOW_RESAMPLES)])
    return _figure(value, values_R - values_R.mean() + value)


def _meteor(said: Sequence[str], true: Sequence[str]) -> Figure:
    """None where there is no WordNet."""
    try:
        wordnet = load_wordnet()
    except BaseModelNotFound:
        return None
    return _of_ratio(_weighted([meteor([one], [other], wordnet) for one, other in zip(said, true, strict=True)]))


def _figure(mean: float, values: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return {"mean": round(mean, 4), "low": round(float(low), 4), "high": round(float(high), 4)}
