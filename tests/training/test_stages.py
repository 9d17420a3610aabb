"""Every stage on Ray Train, one on the other's weights, from nothing to a model folder that writes and draws."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from minigpt5 import MiniGPT5
from minigpt5.types import DISTILLED, DrawSettings

COMMON = ["steps=2", "log_every=1"]
"""Presets as they are, shortened."""


def train(stage: str, runs: Path, *options: str) -> Path:
    command = [
        sys.executable,
        "-m",
        "training.train",
        stage,
        "--preset",
        "storybook",
        "--runs",
        str(runs),
        *options,
        *COMMON,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{stage}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    folder = runs / stage
    assert (folder / "log.jsonl").read_text().strip()
    assert (folder / "sheet.png").is_file() == (stage != "vision"), "its examples draw no picture"
    return folder / "model"


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(3600)
def test_from_nothing_to_a_model(tmp_path: Path) -> None:
    for stage in ("vae", "unet", "distill", "decoder", "sharpen", "vision", "align", "learn", "refine"):
        folder = train(stage, tmp_path)
    again = train("refine", tmp_path / "again", "--start", str(folder), "--decoder", str(tmp_path / "unet" / "model"))
    for finished in (folder, again):
        model = MiniGPT5.from_pretrained(finished)
        story = model.write("A fox who finds a balloon", pages=1, seed=1)
        assert story.pages[0].text and story.pages[0].picture
        picture = model.draw(model.vokens("a fox in the snow"), seed=1, settings=DrawSettings(steps=2))
        assert picture.png.startswith(b"\x89PNG")
    assert MiniGPT5.from_pretrained(folder).config.default_draw.scheduler == DISTILLED
    assert MiniGPT5.from_pretrained(again).config.draw_distilled is None, "it was distilled from another UNet"
