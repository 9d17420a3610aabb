"""How many requests and tokens of the generator share a step, and the memory of their keys and values.

The defaults depend on the device: a CPU's step takes longer with every token, a GPU's waits for weights whatever it
reads. `deployments/application.py` has a setting for each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a generator."""

    num_slots: int = 24
    """Requests under way at once."""
    max_batch: int = 16
    """Requests that take part in a step."""
    short_read_tokens: int = 64
    """Tokens that are read at once: a written token, a picture's vokens, most prompts."""
    part_tokens: int = 4
    """A longer prompt is read in parts while others write: of so many tokens, or as many as requests write."""
    long_read_tokens: int = 512
    """Tokens of a step while nobody writes."""
    kv_cache_gib: float | None = None
    """Size of the KV store, which requests share in blocks. None: on a CPU each slot has room for the whole context,
    which takes memory as it is filled; on a GPU it is `KV_CACHE_SHARE` of the memory that is free once the weights are
    there."""
    gpu_share: float = 1.0
    """Part of a GPU that is this generator's: below 1 others compute there too."""


ON_CPU = Limits()
ON_GPU = Limits(num_slots=96, max_batch=64, part_tokens=512, long_read_tokens=2048)
"""By the sizes of other engines; nobody has measured it."""
BLOCK = 32
"""Positions of a block of the KV store."""
KV_CACHE_SHARE = 0.8
"""The rest is for activations."""


def default_limits(device: str, **given: float | None) -> Limits:
    """The limits of a device ("cpu", "cuda", "cuda:1"), with those in their place that are given and not None."""
    limits = ON_CPU if device == "cpu" else ON_GPU
    known = {name: value for name, value in given.items() if value is not None}
    return replace(limits, **known)  # type: ignore[arg-type]  # the settings that they come from are whole where these are


def kv_cache_bytes(limits: Limits, *, free_bytes: int, total_bytes: int, used_bytes: int) -> int:
    """Size of a KV store on a GPU with so many bytes free, in all, and used by this process."""
    if limits.kv_cache_gib is not None:
        return int(limits.kv_cache_gib * 2**30)
    return max(0, int(KV_CACHE_SHARE * min(free_bytes, limits.gpu_share * total_bytes - used_bytes)))
