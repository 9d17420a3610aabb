"""`python -m minigpt5.parity`: tiny random models of the real classes against their own library."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.own_model.tiny_bases import make_qwen3, make_stable_diffusion
from minigpt5 import new
from minigpt5.parity.__main__ import main
from minigpt5.parity.text import TOLERANCE, compare_vokens, report
from tests.helpers.tiny_vision_language import make_vision_language


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    places = {name: tmp_path_factory.mktemp(name) for name in ("language", "diffusion")}
    make_qwen3(places["language"])
    make_stable_diffusion(places["diffusion"])
    return places


def test_a_language_model_is_compared_with_transformers(
    bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(bases["language"])]) == 0
    said = capsys.readouterr().out
    assert "(qwen3)" in said
    for words in ("states  ", "logits  ", "states in parts  "):
        line = next(line for line in said.splitlines() if line.strip().startswith(words.strip()))
        assert float(line.split("deviate by ")[1].split()[0]) < 1e-5
    assert said.count("equal (32 tokens)") == 2


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl"])
def test_the_text_half_of_a_vision_language_model_is_compared(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_vision_language(kind, tmp_path / "base")
    assert main([str(tmp_path / "base")]) == 0
    said = capsys.readouterr().out
    assert f"({kind})" in said and said.count("greedy text       equal") == 2


def test_vokens_of_a_model_folder_are_compared_with_those_of_training(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    new.make_folder(folder, language=str(bases["language"]), diffusion=str(bases["diffusion"]), context_tokens=1024)
    assert compare_vokens(folder)
    assert float(capsys.readouterr().out.split("deviate by ")[1].split()[0]) < 1e-5


def test_more_than_the_bound_is_said_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert report("states", TOLERANCE)
    assert "more than" not in capsys.readouterr().out
    assert not report("states", 2 * TOLERANCE)
    assert "deviate by 2.0e-04 of the largest, more than 1e-04" in capsys.readouterr().out
    assert not report("states", 1e-6, float("nan"))
    assert not report("states", float("nan"), 1e-6)


def test_what_is_no_model_is_refused_in_one_line(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    for folder, words in (
        (tmp_path, "has no model_index.json of diffusers"),
        (bases["diffusion"] / "vae", "has no model_index.json"),
        (bases["diffusion"] / "text_encoder", "is no causal language model of transformers"),
    ):
        assert main([str(folder)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1, error
