"""What the published system takes of a GPU: computed from shapes on the meta device, as no GPU has run it."""

from __future__ import annotations

import functools

import pytest

from minigpt5.limits import BLOCK, ON_GPU
from minigpt5.model import sizes
from minigpt5.model.sizes import CARDS, build, cache_bytes_per_token, counts, kv_blocks, serving_gb, weight_bytes


@functools.cache
def counted() -> dict[str, int]:
    return counts(build())


def test_weights_on_a_gpu_are_those_that_are_loaded() -> None:
    parts = build()
    language = 2 * (sizes.count(parts.language) + sizes.count(parts.voken_embeddings))
    sees = 4 * (sizes.count(parts.vision.encoder) + sizes.count(parts.vision.qformer))
    draws = 2 * (sizes.count(parts.unet) + sizes.count(parts.vae)) + 4 * sizes.count(parts.mapper)
    assert weight_bytes(counted()) == {"VokenGenerator": language + sees, "DiffusionDecoder": draws}
    assert language == pytest.approx(13.5e9, rel=0.01)


@pytest.mark.parametrize(("card", "num_requests"), [("24 GB", 5), ("40 GB", 18), ("80 GB", 50)])
def test_a_card_holds_weights_store_and_activations(card: str, num_requests: int) -> None:
    """Requests as long as the context, which the store has room for."""
    store = kv_blocks(counted(), card_bytes=CARDS[card]) * BLOCK * cache_bytes_per_token()
    for name, parts in serving_gb(counted(), card_bytes=CARDS[card], pictures=8).items():
        assert sum(parts.values()) < CARDS[card] / 1e9, name
    assert store // (2048 * cache_bytes_per_token()) == num_requests
    # 24 whole slots of a full context would take 26 GB in bfloat16, and 51 in float32.
    assert store < ON_GPU.num_slots * 2048 * cache_bytes_per_token()


def test_a_token_of_the_published_model_takes_half_a_mebibyte() -> None:
    assert cache_bytes_per_token() == 2**19
