"""A run that is stopped and resumed ends where the uninterrupted one does."""

from __future__ import annotations

import dataclasses
import math
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minigpt5.errors import TrainingError
from training import checkpoint, data, loop, presets
from training.data import StorybookRows
from training.parts import Parts
from training.run_folder import RunFolder
from training.stage_vae import VaeStage

TINY = dataclasses.replace(
    presets.STORYBOOK["vae"],
    steps=4,
    batch_size=2,
    warmup_steps=2,
    log_every=1,
    sheet_every_s=1e9,
    checkpoint_every_s=1e9,
)


class Stopped(Exception):
    pass


def train(folder: Path, *, stop_after: int | None = None, preset: presets.Preset = TINY) -> VaeStage:
    stage = VaeStage(preset, Parts(runs=folder))
    stage.draw_sheet = lambda path: None  # type: ignore[method-assign]
    stage.save = lambda folder: None  # type: ignore[method-assign]

    def report(metrics: dict[str, float]) -> None:
        if metrics["step"] == stop_after:
            raise Stopped

    loop.fit(stage, preset, RunFolder(folder), data.local_batches(StorybookRows(preset), preset), report=report)
    return stage


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    every_step = dataclasses.replace(TINY, checkpoint_every_s=0.0)
    with pytest.raises(Stopped):
        train(tmp_path / "parts", stop_after=2, preset=every_step)
    assert checkpoint.newest_step(RunFolder(tmp_path / "parts")) == 2
    resumed = train(tmp_path / "parts")
    for one, other in zip(whole.vae.parameters(), resumed.vae.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_half_written_checkpoint_is_never_resumed_from(tmp_path: Path) -> None:
    partial = tmp_path / "checkpoint-00000009"
    partial.mkdir()
    (partial / "state.pt").write_bytes(b"half")
    assert checkpoint.newest_step(RunFolder(tmp_path)) == 0


def test_a_checkpoint_that_does_not_fit_keeps_the_one_before(tmp_path: Path) -> None:
    state = {"trained": {"weight": torch.zeros(100_000)}, "optimizer": {}}
    folder = RunFolder(tmp_path)
    good = checkpoint.save_checkpoint(folder, checkpoint.Position(1), state, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the kernel refuses to write on, as on a full disk
    try:
        with pytest.raises(TrainingError, match="cannot be written.*checkpoint-00000001 is kept"):
            checkpoint.save_checkpoint(folder, checkpoint.Position(2), state, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == [good]
    assert checkpoint.load_checkpoint(folder, ["weight"], {})[1] == checkpoint.Position(1)


def test_a_loss_that_is_not_finite_stops_with_the_rows(tmp_path: Path) -> None:
    stage = VaeStage(TINY, Parts(runs=tmp_path))
    with torch.no_grad():
        next(stage.vae.parameters()).fill_(math.nan)
    with pytest.raises(TrainingError, match=r"step 0 is not finite: nan, rows \[0, 1\]"):
        loop.fit(stage, TINY, RunFolder(tmp_path), data.local_batches(StorybookRows(TINY), TINY))


def test_the_rate_warms_up_and_decays() -> None:
    preset = dataclasses.replace(TINY, steps=100, warmup_steps=10)
    rates = [loop.learning_rate_factor(step, step / 100, preset) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == max(rates[9:12]) and rates[-1] < 0.02


def test_settings_are_checked() -> None:
    assert presets.override(TINY, ["steps=7", "learning_rate=1e-3"]).learning_rate == 1e-3
    with pytest.raises(ValueError, match="unknown setting 'lr=1'"):
        presets.override(TINY, ["lr=1"])
    with pytest.raises(ValueError, match="zero_stage is 4"):
        presets.override(TINY, ["zero_stage=4"])
    with pytest.raises(ValueError, match="steps is 'many'"):
        presets.override(TINY, ["steps=many"])


def test_rows_are_a_function_of_their_id() -> None:
    for stage in ("vae", "unet", "vision", "align", "learn", "refine"):
        preset = presets.STORYBOOK[stage]
        assert str(data.row_at(preset, 5)) == str(data.row_at(preset, 5))
        assert str(data.row_at(preset, 5)) != str(data.row_at(preset, 6))


@pytest.mark.cluster
def test_two_workers_of_a_local_ray_train_a_stage(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.train", "vae", "--workers", "2", "--runs", str(tmp_path)]
    settings = ["steps=4", "batch_size=4", "num_threads=1", "log_every=2", "warmup_steps=1"]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "vae" / "model" / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    assert (tmp_path / "vae" / "sheet.png").is_file()
    assert checkpoint.newest_step(RunFolder(tmp_path / "vae")) == 4
