"""Metrics of rivals, by hand and beside the metrics of minigpt5/evaluation/."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.rival_figures import METRICS, distance, figures, over_seeds
from minigpt5.evaluation.frechet import frechet_distance


def test_a_ratio_is_of_all_items() -> None:
    found = figures({"story_referred": [[1, 2], [3, 3]], "lpips": [0.25, 0.75]})
    assert set(found) == set(METRICS)
    assert found["story_referred"] == {"mean": 0.8, "low": 0.5, "high": 1.0}
    assert found["lpips"] == {"mean": 0.5, "low": 0.25, "high": 0.75}
    assert found["bleu_1"] is None and found["caption_who"] is None


def test_several_seeds_have_their_mean_and_reach_as_far_as_any() -> None:
    one, other = {"mean": 0.2, "low": 0.1, "high": 0.3}, {"mean": 0.6, "low": 0.5, "high": 0.9}
    found = over_seeds(
        [{"lpips": one, "meteor": None, "bleu_1": None}, {"lpips": other, "meteor": one, "bleu_1": None}]
    )
    assert found == {"lpips": {"mean": 0.4, "low": 0.1, "high": 0.9}, "meteor": one, "bleu_1": None}
    assert over_seeds([{"lpips": one}]) == {"lpips": one}


def test_no_interval_where_all_items_are_alike() -> None:
    assert figures({"caption_who": [1.0] * 5})["caption_who"] == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_nothing_drawn_has_no_precision() -> None:
    found = figures({"draw_precision": [[0, 0], [0, 0]], "draw_recall": [[0, 1], [0, 0]]})
    assert found["draw_precision"] is None
    assert found["draw_recall"]["mean"] == 0.0  # type: ignore[index]


def test_the_distance_is_frechets() -> None:
    rng = np.random.default_rng(0)
    drawn_ND, true_ND = rng.normal(size=(12, 40)), 0.5 + rng.normal(size=(12, 40)) * 2
    expected = frechet_distance(torch.from_numpy(drawn_ND), torch.from_numpy(true_ND))
    assert distance(drawn_ND, true_ND) == pytest.approx(expected, rel=1e-4)


def test_bleu_of_equal_texts_is_one() -> None:
    texts = ["the fox found a red house", "an owl slept in the dark tent"]
    found = figures({"said": texts, "references": texts})
    assert found["bleu_2"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
