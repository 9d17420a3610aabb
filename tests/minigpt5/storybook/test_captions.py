"""Captions say the facts they are given, in many ways, and can be read back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from minigpt5.storybook import captions
from minigpt5.storybook.captions import KEY_OF, PLACE_PHRASES, TIME_PHRASES, Facts
from minigpt5.storybook.scenes import CHARACTERS, OBJECTS, scene_at

FACTS = Facts(who="fox", what="red-apple", side="right", place="beach", time="night")


def random_facts(num: int) -> list[tuple[Facts, np.random.Generator]]:
    drawn = []
    for index in range(num):
        rng = np.random.default_rng(index)
        drawn.append((captions.draw_facts(scene_at(index, seed=1, held_out_pairs=None), rng), rng))
    return drawn


def test_a_caption_is_read_back_as_it_was_meant() -> None:
    for facts, rng in random_facts(800):
        caption = captions.write_caption(facts, rng)
        assert captions.facts_in(caption) == replace(facts, side=None), caption


def test_the_canonical_caption_is_read_back_too() -> None:
    for facts, _ in random_facts(500):
        caption = captions.canonical_caption(facts)
        assert captions.facts_in(caption) == replace(facts, side=None), caption


def test_a_caption_says_the_side_only_where_it_is_given() -> None:
    for facts, rng in random_facts(500):
        caption = captions.write_caption(facts, rng).lower()
        assert ("left" in caption or "right" in caption) == (facts.side is not None), caption


def test_the_canonical_caption_names_the_side_and_then_the_character() -> None:
    assert captions.canonical_caption(FACTS) == "right: a fox, an apple, on the beach, at night"
    only = Facts(who="unicorn")
    assert captions.canonical_caption(only) == "somewhere: a unicorn"


def test_one_scene_has_many_captions() -> None:
    rng = np.random.default_rng(0)
    assert len({captions.write_caption(FACTS, rng) for _ in range(200)}) > 120


def test_half_of_the_captions_say_everything() -> None:
    complete = [None not in (f.what, f.side, f.place, f.time) for f, _ in random_facts(1000)]
    assert 0.5 < np.mean(complete) < 0.65
    assert all(facts.who for facts, _ in random_facts(200))


@pytest.mark.parametrize("key", [*CHARACTERS, *OBJECTS])
def test_every_name_is_the_name_of_one_thing(key: str) -> None:
    name = captions.name_of(key)
    assert KEY_OF[name] == key
    found = captions.facts_in(f"Look at {captions.with_article(name)}!")
    assert (found.who or found.what) == key and None in (found.who, found.what)


@pytest.mark.parametrize(("phrases", "field"), [(PLACE_PHRASES, "place"), (TIME_PHRASES, "time")])
def test_every_phrase_names_its_own_place_or_time_and_nothing_else(phrases: dict, field: str) -> None:
    for key, ways in phrases.items():
        for phrase in ways:
            assert captions.facts_in(phrase) == Facts(**{field: key}), phrase


def test_names_inside_other_words_are_not_found() -> None:
    assert captions.facts_in("A balloon, a sunflower, a snowman and a catalogue.") == Facts(
        who="snowman", what="balloon"
    )
    assert captions.facts_in("An owl left for a while.") == Facts(who="owl")
    assert captions.facts_in("") == Facts()
