"""The quality gate: what it lets pass, and what not."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import gate
from benchmarks.gate import Figure, Nums, noise, to_text, worse
from minigpt5.config import default_model_folder
from minigpt5.model.base_models import resolve
from minigpt5.model.folder_config import load_config
from minigpt5.model.text_encoder import load_text_encoder
from minigpt5.pipeline import MiniGPT5
from minigpt5.storybook.scorer import load_scorer

TINY = Nums(captions=8, stories=1, references=2, scenes=2)


def test_noise_is_the_spread_over_rounds_and_at_least_one_answer() -> None:
    rounds = [{"who": Figure(value=value, num=100), "all": Figure(value=1.0, num=50)} for value in (0.90, 0.94, 0.92)]
    known = noise(rounds)
    assert known["who"]["mean"] == pytest.approx(0.92)
    assert known["who"]["deviation"] == pytest.approx(0.02)
    assert known["who"]["least"] == pytest.approx(0.86)
    assert known["who"]["values"] == [0.90, 0.94, 0.92]
    assert known["all"]["least"] == pytest.approx(0.97), "one answer of fifty passes, two do not"


@pytest.mark.parametrize(
    ("value", "num", "failed"),
    [
        (0.87, 100, []),
        (0.85, 100, ["who"]),
        (0.87, 60, []),
        (1.0, 1, ["who"]),  # of one answer, where a hundred are known
        (math.nan, 100, ["who"]),
    ],
)
def test_only_what_is_worse_than_the_noise_fails(value: float, num: int, failed: list[str]) -> None:
    known = {"who": {"mean": 0.92, "deviation": 0.02, "least": 0.86, "num": 100}}
    figures = {"who": Figure(value=value, num=num)}
    assert worse(figures, known) == failed
    assert ("WORSE" in to_text(figures, known)) == bool(failed)


def test_the_noise_is_that_of_the_shipped_weights() -> None:
    """That of weaker ones would let these become as weak."""
    noted = json.loads(gate.RESULTS.read_text())["fingerprint"]
    assert noted == load_config(default_model_folder()).fingerprint, "run python -m benchmarks.gate --noise 3"


def test_figures_without_noise_are_named() -> None:
    with pytest.raises(ValueError, match="differ in side: run python -m benchmarks.gate --noise"):
        worse({"side": Figure(value=1.0, num=1)}, {})


@pytest.mark.parametrize("rounds", ["1", "-1"])
def test_one_round_has_no_spread(rounds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gate.main([f"--noise={rounds}"])
    assert f"--noise is {rounds} but must be 2 or more" in capsys.readouterr().err


@pytest.mark.slow
def test_a_round_repeats_itself_and_a_damaged_model_fails() -> None:
    model, scorer = MiniGPT5.from_pretrained("models/storybook"), load_scorer()
    text_encoder = load_text_encoder(resolve(model.config.text_encoder), model.config)
    known = json.loads(gate.RESULTS.read_text())["figures"]
    figures = gate.measure(model, scorer, text_encoder, TINY)
    assert set(figures) == set(known), "the noise of every figure is known"
    again = gate.measure(model, scorer, text_encoder, TINY)
    assert figures == again, "a round repeats itself"
    with torch.no_grad():
        for parameter in model.decoder.mapper.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    damaged = gate.measure(model, scorer, text_encoder, TINY)
    assert worse(damaged, known)
