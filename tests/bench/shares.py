"""Right answers and questions -> a share that says how sure it is; values -> a mean that does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959964


def share(num_right: int, num: int) -> dict[str, float]:
    """A share with its Wilson 95 % interval."""
    z, p = Z_95, num_right / num
    middle = (p + z * z / (2 * num)) / (1 + z * z / num)
    reach = z * math.sqrt(p * (1 - p) / num + z * z / (4 * num * num)) / (1 + z * z / num)
    low, high = max(0.0, middle - reach), min(1.0, middle + reach)
    return {"share": round(p, 4), "low": round(low, 4), "high": round(high, 4), "num": num}


def mean(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Of at least two values, with its normal 95 % interval."""
    numbers = np.asarray(values, float)
    middle, num = float(numbers.mean()), len(numbers)
    reach = Z_95 * float(numbers.std(ddof=1)) / math.sqrt(num)
    return {"mean": round(middle, 4), "low": round(middle - reach, 4), "high": round(middle + reach, 4), "num": num}
