"""Rows of the bench are made once, and go on where they were stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rivals
from benchmarks.rivals import ORDER, SEEDS, SHIPPED, Plan, units_left
from minigpt5.codec import to_json
from minigpt5.config import storybook
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


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(runs=tmp_path / "runs", base=base_of("one", tmp_path / "base"), out=tmp_path / "rivals.json")


def base_of(fingerprint: str, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_json(replace(storybook(), fingerprint=fingerprint))))
    return folder


@pytest.fixture(autouse=True)
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "make_start", lambda name, out, *, base, seed: out.mkdir(parents=True))


def test_a_stopped_row_goes_on_after_its_last_whole_stage(plan: Plan) -> None:
    runs = Runs()
    runs.stops_at = "learn"
    with pytest.raises(KeyboardInterrupt):
        rivals.train(plan, "minigpt5", 1, runs)
    runs.stops_at = ""
    folder, minutes, peak_mib = rivals.train(plan, "minigpt5", 1, runs)
    assert runs.stages == ["align", "learn"]
    assert (minutes, peak_mib, folder.name) == (4.0, 700, "model")
    assert rivals.train(plan, "minigpt5", 1, runs)[0] == folder and len(runs.stages) == 2


def test_equal_stages_are_run_once_and_different_ones_are_not(plan: Plan) -> None:
    runs = Runs()
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


def test_units_that_are_in_the_results_are_left_out(plan: Plan) -> None:
    everything = units_left(plan, ORDER)
    assert everything[:2] == [("minigpt5", 1), ("gill", 1)]
    assert [one for one in everything if one[1] == 2] == [(name, 2) for name in SEEDS]
    plan.out.write_text(json.dumps({"rows": [{"name": "minigpt5", "seeds": [1, 2]}]}))
    assert units_left(plan, ["minigpt5", "two-stage"]) == [("two-stage", 1), ("minigpt5", 3)]


def test_every_rival_has_its_place() -> None:
    assert sorted(ORDER) == sorted([*RIVALS, SHIPPED])


def test_the_shipped_model_is_measured_as_it_is(plan: Plan) -> None:
    runs = Runs()
    folder, minutes, _ = rivals.train(plan, SHIPPED, 1, runs)
    assert rivals.make_system(plan, SHIPPED, 1, folder) == plan.base and not minutes and not runs.stages


def unit(seed: int, value: float) -> dict[str, Any]:
    metrics = {"lpips": {"mean": value, "low": value - 0.1, "high": value + 0.1}, "bleu_1": None}
    return {"seed": seed, "minutes": 10.0 * seed, "peak_mib": 5, "metrics": metrics}


def test_a_row_is_of_all_its_seeds(plan: Plan) -> None:
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


def test_a_start_that_another_bench_made_meanwhile_is_taken(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_start(name: str, out: Path, *, base: Path, seed: int) -> None:
        out.mkdir(parents=True)
        other = out.with_name(out.name.split(".")[0])
        other.mkdir()
        (other / "config.json").write_text("{}")

    monkeypatch.setattr(rivals, "make_start", make_start)
    runs = Runs()
    rivals.train(plan, "minigpt5", 1, runs)
    assert runs.stages == ["align", "learn"] and not list(plan.runs.glob("*.partial-*"))


def test_another_base_is_another_run(plan: Plan, tmp_path: Path) -> None:
    runs = Runs()
    first, _, _ = rivals.train(plan, "divter", 1, runs)
    other, _, _ = rivals.train(replace(plan, base=base_of("other", tmp_path / "other")), "divter", 1, runs)
    assert first != other and runs.stages == ["learn", "learn"]


def test_what_is_measured_is_what_was_trained_last(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other settings, and after a copy that was cut off."""

    def save_system(folder: Path, system: str, model: Path, *, decoder: Path | None) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(str(model))
        if cuts:
            raise KeyboardInterrupt

    monkeypatch.setattr(rivals, "save_system", save_system)
    runs, cuts = Runs(), True
    trained, _, _ = rivals.train(plan, "divter", 1, runs)
    with pytest.raises(KeyboardInterrupt):
        rivals.make_system(plan, "divter", 1, trained)
    cuts = False
    folder = rivals.make_system(plan, "divter", 1, trained)
    assert (folder / "config.json").read_text() == str(trained) and not list(folder.parent.glob("*.partial-*"))
    longer, _, _ = rivals.train(replace(plan, settings=("steps=3",)), "divter", 1, runs)
    assert (rivals.make_system(plan, "divter", 1, longer) / "config.json").read_text() == str(longer) != str(trained)


def test_a_quick_run_leaves_the_results_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rivals, "load_wordnet", lambda: None)
    seen: list[Plan] = []
    monkeypatch.setattr(rivals, "unit", lambda plan, name, seed: seen.append(plan))
    rivals.main(["--quick", "--rows", "full"])
    rivals.main(["--rows", "full"])
    quick, whole = seen
    assert (quick.out, quick.runs) == (tmp_path / "runs/rivals-quick/rivals.json", tmp_path / "runs/rivals-quick")
    assert (whole.out, whole.runs) == (rivals.RESULTS, tmp_path / "runs/rivals")
    with pytest.raises(SystemExit):
        rivals.main(["--quick", "--rows", "full", "--out", str(tmp_path / rivals.RESULTS)])
    assert "is for whole runs" in capsys.readouterr().err
