"""Right answers and questions -> a share that says how sure it is."""

from __future__ import annotations

import math


def share(num_right: int, num: int) -> dict[str, float]:
    """A share with its Wilson 95 % interval."""
    z, p = 1.959964, num_right / num
    middle = (p + z * z / (2 * num)) / (1 + z * z / num)
    reach = z * math.sqrt(p * (1 - p) / num + z * z / (4 * num * num)) / (1 + z * z / num)
    low, high = max(0.0, middle - reach), min(1.0, middle + reach)
    return {"share": round(p, 4), "low": round(low, 4), "high": round(high, 4), "num": num}
