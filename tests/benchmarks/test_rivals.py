"""Rows of the bench are made once, and go on where they were stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rivals
from benchmarks.rivals import ORDER, SEEDS, SHIPPED, Plan, units_left
from training.checkpoint import Position, save_checkpoint
from training.run_folder import RunFolder
from training.storybook.rivals import RIVALS


class Runs:
    """Stands in for training: writes what a finished run has, or stops at a stage, and counts."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.stops_at = ""

    def __call__(self, arguments: list[str]) -> int:
        stage, out = arguments[0], Path(arguments[arguments.index("--out") + 1])
        assert Path(arguments[arguments.index("--start") + 1]).is_dir()
        if stage == self.stops_at:
            raise KeyboardInterrupt
        self.stages.append(stage)
        save_checkpoint(RunFolder(str(out)), Position(2, 120.0), {}, {})
        (out / "model").mkdir()
        return {"align": 700}.get(stage, 500)


@pytest.fixture(autouse=True)
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "make_start", lambda name, out, *, base, seed: out.mkdir(parents=True))


def test_a_stopped_row_goes_on_after_its_last_whole_stage(tmp_path: Path) -> None:
    plan, runs = Plan(runs=tmp_path, base=tmp_path), Runs()
    runs.stops_at = "learn"
    with pytest.raises(KeyboardInterrupt):
        rivals.train(plan, "minigpt5", 1, runs)
    runs.stops_at = ""
    folder, minutes, peak_mib = rivals.train(plan, "minigpt5", 1, runs)
    assert runs.stages == ["align", "learn"]
    assert (minutes, peak_mib, folder.name) == (4.0, 700, "model")
    assert rivals.train(plan, "minigpt5", 1, runs)[0] == folder and len(runs.stages) == 2


def test_equal_stages_are_run_once_and_different_ones_are_not(tmp_path: Path) -> None:
    plan, runs = Plan(runs=tmp_path, base=tmp_path), Runs()
    for name, stages in (
        ("minigpt5", ["align", "learn"]),
        ("data-10", ["learn"]),
        ("text-only", ["learn"]),
        ("two-stage", []),
        ("vokens-4", ["align", "learn"]),
    ):
        runs.stages = []
        rivals.train(plan, name, 1, runs)
        assert runs.stages == stages, name
    runs.stages = []
    rivals.train(plan, "minigpt5", 2, runs)
    assert runs.stages == ["align", "learn"], "another seed"


def test_units_that_are_in_the_results_are_left_out(tmp_path: Path) -> None:
    plan = Plan(runs=tmp_path, out=tmp_path / "rivals.json")
    everything = units_left(plan, ORDER)
    assert everything[:2] == [("minigpt5", 1), ("gill", 1)]
    assert [one for one in everything if one[1] == 2] == [(name, 2) for name in SEEDS]
    plan.out.write_text(json.dumps({"rows": [{"name": "minigpt5", "seeds": [1, 2]}]}))
    assert units_left(plan, ["minigpt5", "two-stage"]) == [("two-stage", 1), ("minigpt5", 3)]


def test_every_rival_has_its_place() -> None:
    assert sorted(ORDER) == sorted([*RIVALS, SHIPPED])


def test_the_shipped_model_is_measured_as_it_is(tmp_path: Path) -> None:
    plan, runs = Plan(runs=tmp_path, base=tmp_path), Runs()
    folder, minutes, _ = rivals.train(plan, SHIPPED, 1, runs)
    assert rivals.make_system(plan, SHIPPED, 1, folder) == plan.base and not minutes and not runs.stages


def unit(seed: int, value: float) -> dict[str, Any]:
    metrics = {"lpips": {"mean": value, "low": value - 0.1, "high": value + 0.1}, "bleu_1": None}
    return {"seed": seed, "minutes": 10.0 * seed, "peak_mib": 5, "metrics": metrics}


def test_a_row_is_of_all_its_seeds(tmp_path: Path) -> None:
    plan = Plan(runs=tmp_path, out=tmp_path / "rivals.json")
    rivals.write_row(plan, "gill", unit(1, 0.5))
    (row,) = rivals.read_rows(plan.out)
    assert row == {"name": "gill", "seeds": [1], **{name: unit(1, 0.5)[name] for name in rivals.UNIT}}
    for seed, value in ((3, 0.8), (2, 0.9), (2, 0.2)):  # the second one again
        rivals.write_row(plan, "gill", unit(seed, value))
    (row,) = rivals.read_rows(plan.out)
    assert (row["seeds"], row["minutes"]) == ([1, 2, 3], 20.0)
    assert row["metrics"]["lpips"] == {"mean": 0.5, "low": pytest.approx(0.1), "high": pytest.approx(0.9)}
    assert row["metrics"]["bleu_1"] is None
    assert row["of_seeds"] == [unit(1, 0.5), unit(2, 0.2), unit(3, 0.8)]


def test_a_start_that_another_bench_made_meanwhile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_start(name: str, out: Path, *, base: Path, seed: int) -> None:
        out.mkdir(parents=True)
        other = out.with_name(out.name.split(".")[0])
        other.mkdir()
        (other / "config.json").write_text("{}")

    monkeypatch.setattr(rivals, "make_start", make_start)
    plan, runs = Plan(runs=tmp_path, base=tmp_path), Runs()
    rivals.train(plan, "minigpt5", 1, runs)
    assert runs.stages == ["align", "learn"] and not list(tmp_path.glob("*.partial-*"))
