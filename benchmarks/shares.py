"""Right answers and questions -> a share that says how sure it is; values -> a mean that does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Z_95 = 1.959964
RESAMPLES = 2_000


def share(num_right: float, num: float) -> dict[str, float]:
    """A share with its Wilson 95 % interval."""
    z, p = Z_95, num_right / num
    middle = (p + z * z / (2 * num)) / (1 + z * z / num)
    reach = z * math.sqrt(p * (1 - p) / num + z * z / (4 * num * num)) / (1 + z * z / num)
    low, high = max(0.0, middle - reach), min(1.0, middle + reach)
    return {"share": round(p, 4), "low": round(low, 4), "high": round(high, 4), "num": num}


def share_of_groups(right_G: np.ndarray, num_G: np.ndarray) -> dict[str, float]:
    """A share of answers that come in groups, as a story's pages do, and are right or wrong together: the interval is
    that of as many independent answers as say as much (Kish, 1965). Where all are alike, a group counts as one."""
    right_G, num_G = right_G[num_G > 0], num_G[num_G > 0]
    num, num_groups = int(num_G.sum()), len(num_G)
    p, effective = float(right_G.sum()) / num, float(num_groups)
    if 0 < p < 1 and num_groups > 1:
        variance = float(((right_G - p * num_G) ** 2).sum()) / num**2 * num_groups / (num_groups - 1)
        effective = min(num, p * (1 - p) / variance) if variance else num
    return {**share(p * effective, effective), "num": num}


def points_lost(base_B: np.ndarray, drawn_B: np.ndarray) -> dict[str, float]:
    """How many points fewer of the pairs are right in the second one than in the first, with the 95 % interval of
    Agresti and Min (2005), who add half a pair to each cell: no difference at all is not certainty."""
    lost, won, num = int((base_B & ~drawn_B).sum()), int((~base_B & drawn_B).sum()), len(base_B)
    middle = (lost - won) / (num + 2)
    reach = Z_95 * math.sqrt(((lost + won + 1) / (num + 2) - middle**2) / (num + 2))
    low, high = 100 * (middle - reach), 100 * (middle + reach)
    return {"mean": round(100 * (lost - won) / num, 4), "low": round(low, 4), "high": round(high, 4), "num": num}


def of_groups(statistic: Callable[[np.ndarray], np.ndarray], counts_GC: np.ndarray) -> dict[str, float] | None:
    """Compute a statistic (..., C) -> (...) of counts that are summed over groups, with a 95 % interval by
    resampling groups; None where it is not defined."""
    num = len(counts_GC)
    chosen_RG = np.random.default_rng(0).integers(num, size=(RESAMPLES, num))
    with np.errstate(divide="ignore", invalid="ignore"):
        value, values_R = float(statistic(counts_GC.sum(0))), statistic(counts_GC[chosen_RG].sum(1))
    if not math.isfinite(value):
        return None
    low, high = np.quantile(values_R[np.isfinite(values_R)], (0.025, 0.975))
    return {"mean": round(value, 4), "low": round(float(low), 4), "high": round(float(high), 4), "num": num}


def mean(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Average at least two values, with the normal 95 % interval."""
    numbers = np.asarray(values, float)
    middle, num = float(numbers.mean()), len(numbers)
    reach = Z_95 * float(numbers.std(ddof=1)) / math.sqrt(num)
    return {"mean": round(middle, 4), "low": round(middle - reach, 4), "high": round(middle + reach, 4), "num": num}
