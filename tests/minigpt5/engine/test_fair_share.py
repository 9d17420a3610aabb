"""Time is divided equally among keys, and the oldest of a key come first."""

from __future__ import annotations

from collections import Counter

import pytest

from minigpt5.engine.fair_share import FairShare, Occupancy

Item = tuple[str, int, float]
"""Key, age, cost."""


def choose(fair: FairShare, asking: list[Item]) -> list[Item]:
    return fair.choose(asking, key=lambda item: item[0], cost=lambda item: item[2])


def items(key: str, num: int, *, cost: float = 2) -> list[Item]:
    return [(key, age, cost) for age in range(num)]


def test_one_key_has_all_places_and_its_oldest_come_first() -> None:
    assert choose(FairShare(16, min_places=2), items("a", 20)) == items("a", 8)


def test_how_full_the_steps_were() -> None:
    fair = FairShare(16, min_places=2)
    for asking in (items("a", 8), items("a", 2), []):
        choose(fair, asking)
    assert fair.occupancy == Occupancy(num_steps=2, num_rows=20, max_rows=16)


def test_one_picture_beside_many_of_another_key_has_half_of_each_step() -> None:
    fair = FairShare(16, min_places=2)
    for _ in range(10):
        assert Counter(key for key, _, _ in choose(fair, items("a", 16) + items("b", 1))) == {"a": 1, "b": 1}


def test_a_step_that_grows_slowly_takes_more_of_the_many() -> None:
    fair = FairShare(16, min_places=4)
    chosen = choose(fair, items("a", 16, cost=1) + items("b", 1, cost=1))
    assert Counter(key for key, _, _ in chosen) == {"a": 4, "b": 1}


def test_dear_and_cheap_items_get_the_same_time() -> None:
    fair = FairShare(16, min_places=1)
    served: Counter[str] = Counter()
    for _ in range(40):
        for key, _, cost in choose(fair, items("guided", 5, cost=2) + items("plain", 1, cost=1)):
            served[key] += int(cost)
    assert served["guided"] == pytest.approx(served["plain"], abs=2)


@pytest.mark.parametrize("num_keys", [3, 8, 20, 50])
def test_no_key_starves_and_no_step_is_overfull(num_keys: int) -> None:
    fair = FairShare(16, min_places=2)
    asking = [item for key in range(num_keys) for item in items(str(key), 3)]
    served: Counter[str] = Counter()
    num_steps = 4 * num_keys
    for _ in range(num_steps):
        chosen = choose(fair, asking)
        assert sum(cost for _, _, cost in chosen) <= 16
        served.update(key for key, _, _ in chosen)
    assert len(served) == num_keys
    assert min(served.values()) >= 0.8 * max(served.values())


def test_something_too_dear_for_a_step_is_done_all_the_same() -> None:
    assert choose(FairShare(1, min_places=1), items("a", 2)) == items("a", 1)
    assert choose(FairShare(1, min_places=1), []) == []
