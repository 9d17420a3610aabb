"""A run folder resumes its own run, and no other that the same folder is named for."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from batch_jobs.prepare import Part, write_part
from examples.own_model.tiny_bases import make_bases
from minigpt5 import new
from minigpt5.errors import TrainingError
from minigpt5.model.folder_config import load_config
from training import presets
from training.checkpoint import RUN, Position, RunIdentity, check_identity, newest_step, save_checkpoint
from training.data.batches import StageData, examples_per_step
from training.run_folder import RunFolder
from training.storybook.examples import StorybookExamples
from training.storybook.presets import STORYBOOK
from training.train import digest_rows, identify, main
from training.weight_sources import WeightSources

IDENTITY = RunIdentity(
    stage="align", start="3f2a", decoder="", data="/rows (6 rows)", data_digest="9be1", seed=1, examples_per_step=16
)
QUICK = ["batch_size=2", "gradient_accumulation_steps=1", "num_threads=1", "warmup_steps=0", "log_every=1"]
QUICK += ["validation_batches=0", "checkpoint_every_s=0", "draws_samples=false", "whitens=false", "standardises=false"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder."""
    folder = tmp_path_factory.mktemp("identity")
    bases = make_bases(folder / "bases")
    places = {name: str(bases[name]) for name in ("language", "diffusion", "vision")}
    new.make_folder(folder / "made", **places, context_tokens=512)
    return folder / "made"


def make_rows(folder: Path, *, seed: int) -> Path:
    write_part(
        Part(number=0, file="", start=0, count=8), layout="storybook:caption", uri="", output=str(folder), seed=seed
    )
    return folder


def test_another_run_is_refused_in_the_same_folder_and_the_same_one_resumes(
    tmp_path: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, others = make_rows(tmp_path / "rows", seed=3), make_rows(tmp_path / "others", seed=4)
    out = tmp_path / "out"

    def align(data: Path, start: Path, *settings: str) -> int:
        places = ["--data", str(data), "--start", str(start), "--out", str(out), "--runs", str(tmp_path / "runs")]
        return main(["align", *places, "--workers", "0", *QUICK, *settings])

    assert align(rows, made, "steps=1") == 0
    log = (out / "log.jsonl").read_bytes()
    shutil.copytree(out / "model", tmp_path / "trained")
    assert align(others, made, "steps=2") == 1
    said = capsys.readouterr().err
    assert f"data was '{rows} (" in said and f"and is '{others} (" in said and "Name another folder with --out" in said
    assert align(rows, tmp_path / "trained", "steps=2") == 1
    fingerprints = [load_config(folder).fingerprint for folder in (made, tmp_path / "trained")]
    assert "start was '{}' and is '{}'".format(*fingerprints) in capsys.readouterr().err
    assert align(rows, made, "steps=2", "batch_size=4") == 1
    assert "examples_per_step was 2 and is 4" in capsys.readouterr().err
    assert (out / "log.jsonl").read_bytes() == log and newest_step(RunFolder(out)) == 1, "nothing was trained"

    moved = Path(shutil.move(rows, tmp_path / "moved"))
    assert align(moved, made, "steps=2", "mapper_learning_rate=1e-3", "weight_decay=0.1", "log_every=2") == 0
    assert newest_step(RunFolder(out)) == 2
    assert json.loads((out / RUN).read_text())["data"].startswith(str(moved))


def test_a_picture_world_run_is_known_by_its_settings(tmp_path: Path) -> None:
    vae, learn = (STORYBOOK[stage] for stage in ("vae", "learn"))
    sources = WeightSources(runs=tmp_path)
    found = identify(vae, sources, None, StageData(training=StorybookExamples(vae), validation=None))
    assert (found.data, found.start, found.seed, found.examples_per_step) == ("the picture world", "", 1, 16)
    with pytest.raises(TrainingError, match="there is no model"):
        identify(learn, sources, None, StageData(training=StorybookExamples(learn), validation=None))


@pytest.mark.parametrize(
    ("field", "value"), [("stage", "learn"), ("decoder", "/unet"), ("data_digest", "0"), ("start", "0")]
)
def test_each_field_is_compared_where_there_is_a_checkpoint(tmp_path: Path, field: str, value: str) -> None:
    folder = RunFolder(tmp_path)
    other = dataclasses.replace(IDENTITY, **{field: value})
    check_identity(folder, other)
    check_identity(folder, IDENTITY)  # nothing was trained: the folder is free
    save_checkpoint(folder, Position(1), {"trained": {}, "optimizer": {}}, {})
    check_identity(folder, dataclasses.replace(IDENTITY, data="/moved (6 rows)"))
    with pytest.raises(TrainingError, match="holds another run"):
        check_identity(folder, other)


def test_a_run_of_an_earlier_version_resumes_and_is_known_from_then_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    save_checkpoint(folder, Position(1), {"trained": {}, "optimizer": {}}, {})
    check_identity(folder, IDENTITY)
    with pytest.raises(TrainingError, match="seed was 1 and is 2"):
        check_identity(folder, dataclasses.replace(IDENTITY, seed=2))


def test_rows_that_are_moved_are_the_same(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "rows", seed=3)
    digest = digest_rows(str(rows))
    assert digest_rows(shutil.copytree(rows, tmp_path / "copied")) == digest
    assert digest_rows(str(make_rows(tmp_path / "others", seed=4))) != digest


def test_workers_may_change_where_a_step_has_as_many_examples() -> None:
    align = presets.PUBLISHED["align"]
    two = presets.override(align, ["per_gpu_batch_size=4", "gradient_accumulation_steps=2"])
    four = presets.override(align, ["per_gpu_batch_size=4", "gradient_accumulation_steps=1"])
    assert examples_per_step(presets.for_workers(two, 2)) == examples_per_step(presets.for_workers(four, 4))
