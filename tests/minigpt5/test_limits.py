"""Limits by device, and the size of a KV store on a GPU."""

from __future__ import annotations

import pytest

from minigpt5.limits import KV_CACHE_SHARE, ON_CPU, ON_GPU, default_limits, kv_cache_bytes

GIB = 2**30


def test_defaults_depend_on_the_device_and_what_is_given_stands() -> None:
    assert default_limits("cpu") == ON_CPU
    assert default_limits("cuda") == default_limits("cuda:1") == ON_GPU
    found = default_limits("cuda", num_slots=7, max_batch=None, kv_cache_gib=2.5)
    assert (found.num_slots, found.max_batch, found.kv_cache_gib) == (7, ON_GPU.max_batch, 2.5)
    assert ON_GPU.max_batch >= 64 and ON_GPU.part_tokens >= 512


@pytest.mark.parametrize(
    ("gpu_share", "free", "used", "expected"),
    [
        (1.0, 60, 18, KV_CACHE_SHARE * 60),
        (0.5, 60, 18, KV_CACHE_SHARE * (40 - 18)),
        (0.5, 10, 18, KV_CACHE_SHARE * 10),
        (0.2, 60, 18, 0),
    ],
)
def test_a_store_takes_a_share_of_what_is_free_and_of_its_part_of_the_gpu(
    gpu_share: float, free: int, used: int, expected: float
) -> None:
    limits = default_limits("cuda", gpu_share=gpu_share)
    found = kv_cache_bytes(limits, free_bytes=free * GIB, total_bytes=80 * GIB, used_bytes=used * GIB)
    assert found == pytest.approx(expected * GIB, abs=1)


def test_a_size_that_is_given_is_taken_whatever_is_free() -> None:
    limits = default_limits("cuda", kv_cache_gib=1.5)
    assert kv_cache_bytes(limits, free_bytes=0, total_bytes=0, used_bytes=0) == 1.5 * GIB
