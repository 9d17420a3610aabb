"""Items of a rival's answers, from one or more seeds -> its metrics with 95 % intervals.

The intervals are percentiles of a bootstrap that draws items, and where there are several also seeds, both with
replacement. Every seed answers the same items, so a resample has the same items of each.

Shape letters: S seeds, N items, R resamples, D features.
"""

from __future__ import annotations

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


def figures(of_seeds: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Every metric of METRICS; None where the system does not do it, or nothing was there to be counted."""
    first = of_seeds[0]
    found: dict[str, Figure] = dict.fromkeys(METRICS)
    for name in RATIOS:
        if name in first:
            found[name] = _of_ratio(np.array([_weighted(items[name]) for items in of_seeds]))
    if "features_drawn" in first:
        pairs = [(np.array(items["features_drawn"]), np.array(items["features_true"])) for items in of_seeds]
        found["efficientnet_distance"] = _of_all(
            len(pairs[0][0]), pairs, lambda pair, places: distance(pair[0][places], pair[1][places])
        )
    if "said" in first:
        texts = [(items["said"], items["references"]) for items in of_seeds]
        num = len(texts[0][0])
        for order in (1, 2):
            found[f"bleu_{order}"] = _of_all(num, texts, lambda pair, places, order=order: _bleu(pair, places, order))
        found["meteor"] = _meteor(texts)
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


def _of_ratio(items_SN2: np.ndarray) -> Figure:
    sums_2 = items_SN2.sum(axis=(0, 1))
    if not sums_2[1]:
        return None
    rng, (num_seeds, num_items) = np.random.default_rng(0), items_SN2.shape[:2]
    values = []
    for _ in range(RESAMPLES):
        seeds, places = rng.integers(num_seeds, size=num_seeds), rng.integers(num_items, size=num_items)
        value, weight = items_SN2[seeds][:, places].sum(axis=(0, 1))
        values += [value / weight] if weight else []
    return _figure(float(sums_2[0] / sums_2[1]), values)


def _of_all(num: int, of_seeds: Sequence[Any], statistic: Callable[[Any, np.ndarray], float]) -> Figure:
    """The mean over seeds of a statistic of all items. Doubles bias it, so the interval is the spread of the resamples,
    laid about the value (minigpt5/evaluation/bootstrap.py)."""
    rng = np.random.default_rng(0)
    values = []
    for _ in range(SLOW_RESAMPLES):
        seeds, places = rng.integers(len(of_seeds), size=len(of_seeds)), rng.integers(num, size=num)
        values.append(float(np.mean([statistic(of_seeds[seed], places) for seed in seeds])))
    value = float(np.mean([statistic(one, np.arange(num)) for one in of_seeds]))
    return _figure(value, [one - float(np.mean(values)) + value for one in values])


def _bleu(texts: tuple[list[str], list[str]], places: np.ndarray, order: int) -> float:
    said, true = texts
    return bleu([said[place] for place in places], [true[place] for place in places], order=order)


def _meteor(texts: Sequence[tuple[list[str], list[str]]]) -> Figure:
    """None where there is no WordNet."""
    try:
        wordnet = load_wordnet()
    except BaseModelNotFound:
        return None
    scores = [[meteor([one], [other], wordnet) for one, other in zip(said, true, strict=True)] for said, true in texts]
    return _of_ratio(np.stack([_weighted(one) for one in scores]))


def _figure(mean: float, values: Sequence[float]) -> dict[str, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return {"mean": round(mean, 4), "low": round(float(low), 4), "high": round(float(high), 4)}
