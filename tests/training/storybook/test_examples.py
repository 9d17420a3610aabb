"""Captions of the picture world's examples: the world's own, and as people ask."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from minigpt5.objective.example import Example
from minigpt5.storybook.captions import Facts, write_caption
from minigpt5.storybook.phrasings import phrase
from training.presets import VokenPreset
from training.storybook import examples
from training.storybook.presets import STORYBOOK


def captions(preset: VokenPreset, num: int) -> list[str]:
    found = [examples.example_at(preset, position) for position in range(num)]
    return [example.segments[0].text for example in found if isinstance(example, Example)]


def test_a_share_of_captions_is_said_as_people_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    align = STORYBOOK["align"]
    assert isinstance(align, VokenPreset)
    own, asked = [], []

    def write(facts: Facts, rng: np.random.Generator) -> str:
        own.append(write_caption(facts, rng))
        return own[-1]

    def ask(facts: Facts, rng: np.random.Generator) -> str:
        asked.append(phrase(facts, rng))
        return asked[-1]

    monkeypatch.setattr(examples, "write_caption", write)
    monkeypatch.setattr(examples, "phrase", ask)
    assert captions(align, 40) == own and not asked
    own.clear()
    half = captions(dataclasses.replace(align, phrasing_share=0.5), 40)
    assert sorted(half) == sorted([*own, *asked])
    assert 10 <= len(asked) <= 30
