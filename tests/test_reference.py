"""Our classes give the published system's numbers, and the comparison would notice if they did not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests import reference

FOLDER = Path(__file__).parent / "data" / "reference"
"""Arrays that the published code gave, with tiny random weights."""


@pytest.fixture(scope="module")
def report() -> dict[str, dict[str, dict[str, float]]]:
    return reference.compare(FOLDER)


def test_every_quantity_is_within_its_tolerance(report: dict[str, dict[str, dict[str, float]]]) -> None:
    assert set(report["stage1"]) == set(reference.TOLERANCES)
    assert set(report["stage2"]) == set(reference.TOLERANCES) - {"caption_loss"}
    assert reference.is_within(report), report


def test_a_changed_weight_is_noticed(tmp_path: Path) -> None:
    stage = reference.Stage(FOLDER, 1, tmp_path)
    with torch.no_grad():
        stage.mapper.fc[0].weight[0, 0] += 0.1
    found = stage.deviations()
    assert found["condition"] > reference.TOLERANCES["condition"]
    assert found["voken_hidden"] < reference.TOLERANCES["voken_hidden"]


def test_what_is_not_a_number_is_beyond_any_tolerance() -> None:
    assert reference.relative(torch.tensor([math.nan]), torch.ones(1)) == math.inf
    assert not reference.is_within({"stage1": {"loss": {"deviation": math.inf, "tolerance": 1.0}}})
