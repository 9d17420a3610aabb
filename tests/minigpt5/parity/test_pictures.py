"""The command that compares a diffusion model with diffusers' own pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from examples.own_model.tiny_bases import make_qwen3
from minigpt5 import new
from minigpt5.model.folder import save_diffusion
from minigpt5.parity import __main__ as parity
from minigpt5.parity import pictures
from tests.helpers.pipelines import stable_diffusion_xl
from tests.helpers.tiny import tiny_config, tiny_diffusion


def test_a_folder_of_diffusers_is_drawn_in_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stable_diffusion_xl.make(tmp_path / "xl")
    latents = tmp_path / "latents.safetensors"
    assert parity.main([str(tmp_path / "xl"), "--steps", "2", "--save", str(latents)]) == 0
    said = capsys.readouterr().out
    assert "euler-ancestral" in said and "40 x 24" in said
    assert load_file(latents)["latents"].shape == (1, 4, 8, 8)


def test_a_deviation_is_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minigpt5.model.decoders.stable_diffusion_xl import StableDiffusionXL

    predict = StableDiffusionXL.predict
    monkeypatch.setattr(StableDiffusionXL, "predict", lambda *args, **named: 1.01 * predict(*args, **named))
    stable_diffusion_xl.make(tmp_path / "xl")
    assert parity.main([str(tmp_path / "xl"), "--steps", "2"]) == 1
    assert "above 0.0001" in capsys.readouterr().out


def test_a_model_folder_is_compared_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_qwen3(tmp_path / "qwen3")
    stable_diffusion_xl.make(tmp_path / "xl")
    bases = ["--language", str(tmp_path / "qwen3"), "--diffusion", str(tmp_path / "xl"), "--context", "512"]
    assert new.main([*bases, "--out", str(tmp_path / "made")], show=lambda text: None) == 0
    assert parity.main([str(tmp_path / "made"), "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "StableDiffusionXL, 2 steps" in said and "vokens" in said


def test_a_folder_with_its_own_decoder_is_drawn_from_a_random_condition(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_diffusion(tiny_diffusion(tiny_config()), tmp_path / "decoder")
    assert pictures.compare(tmp_path / "decoder", steps=2)
    assert "StableDiffusion, 2 steps" in capsys.readouterr().out


def test_a_trained_decoder_without_its_text_encoders_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stable_diffusion_xl.make(tmp_path / "xl")
    for place in (tmp_path / "xl").glob("text_encoder*"):
        shutil.rmtree(place)
    assert parity.main([str(tmp_path / "xl"), "--steps", "2"]) == 1
    assert "has no text encoders, which the pipeline of StableDiffusionXL needs" in capsys.readouterr().err
