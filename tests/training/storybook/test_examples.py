"""Captions of the picture world's examples: the world's own, and as people ask."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from minigpt5.model.prompt import Template
from minigpt5.model.published_template import PUBLISHED
from minigpt5.objective.example import Example
from minigpt5.storybook.captions import Facts, facts_in, write_caption
from minigpt5.storybook.phrasings import QUESTIONS, phrase
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

    def ask(facts: Facts, rng: np.random.Generator, **options: Any) -> str:
        asked.append(phrase(facts, rng, **options))
        return asked[-1]

    monkeypatch.setattr(examples, "write_caption", write)
    monkeypatch.setattr(examples, "phrase", ask)
    assert captions(align, 40) == own and not asked
    own.clear()
    half = captions(dataclasses.replace(align, phrasing_share=0.5), 40)
    assert sorted(half) == sorted([*own, *asked])
    assert 10 <= len(asked) <= 30


def asked(template: Template, num: int) -> list[tuple[Example, str]]:
    """Questions of a chat, each with its whole text."""
    learn = STORYBOOK["learn"]
    assert isinstance(learn, VokenPreset)
    preset = dataclasses.replace(learn, caption_share=0.0, story_share=0.0, question_share=1.0)
    found = [examples.example_at(preset, position, template) for position in range(num)]
    return [
        (one, "".join(segment.text or f"[{segment.kind}]" for segment in one.segments))
        for one in found
        if isinstance(one, Example)
    ]


def test_questions_of_a_chat_are_descriptions_and_requests() -> None:
    found = asked(PUBLISHED, 60)
    drawn = [(example, text) for example, text in found if example.drawn]
    told = [(example, text) for example, text in found if example.read]
    assert len(drawn) + len(told) == len(found) == 60 and 8 <= len(drawn) <= 30
    for example, text in drawn:
        assert text.startswith("###Human: ") and text.endswith("[draw] ###") and not example.is_caption
        assert len(example.captions) == len(example.contrasts) == 1
    questions = set()
    for example, text in told:
        question = next(one for one in QUESTIONS["seen"] if one in text)
        questions.add(question)
        assert not any(one in text for one in QUESTIONS["unseen"])
        said = "".join(segment.text for segment in example.segments if segment.is_target)
        assert text.endswith(f" ###Assistant:{said}") and said.endswith(" ###")
        canonical = facts_in(example.shown[0])
        assert canonical.who and facts_in(said).who == canonical.who
    assert len(questions) == len(QUESTIONS["seen"])
    orders = {tuple(segment.kind for segment in example.segments) for example, _ in told}
    assert len(orders) == 1  # text, picture, text, answer: the place of the question differs
    assert {text.count("###Human:") for _, text in told} == {1, 2}
