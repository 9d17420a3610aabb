"""The table of metrics names functions that exist, and the documentation lists it; the picture world's accuracies."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest

from minigpt5.evaluation.metrics import METRICS
from minigpt5.evaluation.world import fact_accuracy
from minigpt5.storybook.captions import Facts
from minigpt5.storybook.scenes import draw_scene, scene_at
from minigpt5.storybook.scorer import load_scorer

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_has_a_function_and_stands_on_the_page(name: str) -> None:
    module, function = METRICS[name].function.split(".")
    assert callable(getattr(importlib.import_module(f"minigpt5.evaluation.{module}"), function))
    section = PAGE.read_text().partition("\n## Protocols")[0]
    rows = [line for line in section.splitlines() if line.startswith(f"| `{name}` ")]
    assert len(rows) == 1 and METRICS[name].title in rows[0] and f"`{METRICS[name].function}`" in rows[0]


def test_published_forms_are_labelled() -> None:
    assert {name for name, metric in METRICS.items() if metric.published} == {
        name for name in METRICS if name.endswith("_published")
    }


def test_only_metrics_on_inception_and_clip_bear_their_names() -> None:
    for metric in METRICS.values():
        assert ("FID" in metric.title or "Inception" in metric.title) == ("Inception" in metric.needs)
        assert ("CLIP" in metric.title) <= ("CLIP" in metric.needs)


def test_accuracy_of_facts_is_the_share_of_pictures_that_show_them() -> None:
    scenes = [scene_at(index, seed=3, split="validation") for index in range(8)]
    pixels, facts = np.stack([draw_scene(scene) for scene in scenes]), [Facts.of(scene) for scene in scenes]
    scorer = load_scorer()
    asked = [*facts[:6], *(dataclasses.replace(one, place="elsewhere") for one in facts[6:])]
    true, found = fact_accuracy(pixels, facts, scorer), fact_accuracy(pixels, asked, scorer)
    assert true["place"] == 1 and found["place"] == 6 / 8
    assert found["who"] == true["who"] and found["all"] <= 6 / 8
