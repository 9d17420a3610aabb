"""The grammar of requests: what it says is what the facts are, and what is held out stays out."""

from __future__ import annotations

import re
import string

import numpy as np
import pytest

from minigpt5.storybook import phrasings
from minigpt5.storybook.captions import PLACE_PHRASES, TIME_PHRASES, Facts, name_of
from minigpt5.storybook.phrasings import FAMILIES, HELD_OUT, families, phrase, plural
from minigpt5.storybook.scenes import CHARACTERS, OBJECTS, scene_at
from minigpt5.storybook.words import NAMES, PLACE_NOUNS, TIME_ADJECTIVES, TIME_NOUNS, WHEN, WHERE

WHOLE = Facts(who="fox", what="house", side="left", place="beach", time="night")


def test_everything_in_the_world_has_words() -> None:
    assert set(NAMES) == {*CHARACTERS, *OBJECTS}
    assert all(names[0] == name_of(key) for key, names in NAMES.items())
    assert {*WHERE} == {*PLACE_NOUNS} == {*PLACE_PHRASES}
    assert {*WHEN} == {*TIME_NOUNS} == {*TIME_ADJECTIVES} == {*TIME_PHRASES}
    assert all(len(set(names)) >= 2 for names in NAMES.values())
    assert all(len(set(ways)) >= 4 for ways in (*WHERE.values(), *WHEN.values()))


def test_no_word_means_two_things() -> None:
    for group in (NAMES, WHERE, PLACE_NOUNS, WHEN, TIME_ADJECTIVES):
        said = [word for words in group.values() for word in words]
        assert len(said) == len(set(said))


def test_a_fifth_of_the_families_is_held_out() -> None:
    known = {kind: set(ways) for kind, ways in FAMILIES.items()}
    assert all(set(names) < known[kind] for kind, names in HELD_OUT.items())
    num = sum(map(len, known.values()))
    assert 0.18 <= sum(map(len, HELD_OUT.values())) / num <= 0.25
    for kind in FAMILIES:
        assert not {*families(kind, "seen")} & {*families(kind, "unseen")}
    patterns = [pattern for ways in FAMILIES.values() for family in ways.values() for pattern in set(family)]
    assert len(patterns) - len(set(patterns)) <= 30, "kinds may share a pattern"


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "request"])
def test_within_a_kind_no_pattern_is_of_two_families(kind: phrasings.Kind) -> None:
    patterns = [pattern for family in FAMILIES[kind].values() for pattern in family]
    assert len(patterns) == len(set(patterns))


def test_a_seen_phrasing_uses_no_held_out_family_and_an_unseen_one_uses_one(monkeypatch: pytest.MonkeyPatch) -> None:
    marked = {
        kind: {name: tuple(f"{pattern}<{kind}/{name}>" for pattern in family) for name, family in ways.items()}
        for kind, ways in FAMILIES.items()
    }
    monkeypatch.setattr(phrasings, "FAMILIES", marked)
    monkeypatch.setattr(phrasings, "_as_typed", lambda text, rng, errors: text)
    rng = np.random.default_rng(0)
    for phrasing in ("seen", "unseen"):
        for _ in range(300):
            text = phrase(WHOLE, rng, phrasing)
            chosen = re.findall(r"<(\w+)/([^>]+)>", text)
            held_out = [name for kind, name in chosen if name in HELD_OUT[kind]]
            assert bool(held_out) == (phrasing == "unseen"), text


def places(text: str, words: tuple[str, ...]) -> list[int]:
    return [text.find(word.lower()) for word in words if word.lower() in text]


@pytest.mark.parametrize("phrasing", ["seen", "unseen"])
def test_all_facts_are_said_and_no_others(phrasing: phrasings.Phrasing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrasings, "PLURAL", 0.0)
    rng = np.random.default_rng(1)
    for index in range(400):
        facts = Facts.of(scene_at(index, seed=5))
        text = phrase(facts, rng, phrasing, typing_errors=0.0).lower()
        assert facts.who and facts.what and facts.place and facts.time
        for key in (facts.who, facts.what):
            assert places(text, NAMES[key]), (text, key)
        assert places(text, (*WHERE[facts.place], *PLACE_NOUNS[facts.place])), text
        assert places(text, (*WHEN[facts.time], *TIME_NOUNS[facts.time], *TIME_ADJECTIVES[facts.time])), text
        assert "left" in text or "right" in text, text
        assert not set(text) & set("{}<>"), text


SIDES = {
    "{who} to the {side} of {what}": "left",
    "{what} to the {other} of {who}": "left",
    "{what} with {who} on its {side}": "left",
    "{what}. {Who} stands on the {side} of it": "left",
    "from left to right {first} and {second}": "left",
}


@pytest.mark.parametrize("pattern", SIDES)
def test_sides_are_meant_as_they_are_said(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrasings, "FAMILIES", {**FAMILIES, "sided": {"one": (pattern,)}})
    for name in ("REQUESTS", "PLURAL", "BARE", "ADJECTIVE", "LOWER_CASE"):
        monkeypatch.setattr(phrasings, name, 0.0)
    monkeypatch.setattr(phrasings, "NAMES", {"fox": ("fox",), "house": ("house",)})
    said = {
        phrase(Facts(who="fox", what="house", side=side), np.random.default_rng(0), typing_errors=0.0).strip(".")
        for side in ("left", "right")
    }
    expected = {
        "{who} to the {side} of {what}": {"A fox to the left of a house", "A fox to the right of a house"},
        "{what} to the {other} of {who}": {"A house to the right of a fox", "A house to the left of a fox"},
        "{what} with {who} on its {side}": {"A house with a fox on its left", "A house with a fox on its right"},
        "{what}. {Who} stands on the {side} of it": {
            "A house. A fox stands on the left of it",
            "A house. A fox stands on the right of it",
        },
        "from left to right {first} and {second}": {
            "From left to right a fox and a house",
            "From left to right a house and a fox",
        },
    }
    assert said == expected[pattern]


@pytest.mark.parametrize(
    "facts",
    [
        Facts(who="fox"),
        Facts(who="fox", what="house"),
        Facts(who="fox", place="snow"),
        Facts(who="fox", what="house", time="rain"),
        Facts(who="fox", side="left", time="rain"),
    ],
)
def test_what_is_not_known_is_not_said(facts: Facts) -> None:
    rng = np.random.default_rng(3)
    for _ in range(100):
        text = phrase(facts, rng).lower()
        if not facts.what:
            assert "left" not in text and "right" not in text
        for group, known in ((WHERE, facts.place), (WHEN, facts.time)):
            assert not [place for place, ways in group.items() if place != known and places(text, ways)], text


def test_facts_without_a_character_are_refused() -> None:
    with pytest.raises(ValueError, match="no who"):
        phrase(Facts(what="house"), np.random.default_rng(0))


def test_typing_errors_are_small() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        wrong = phrasings._mistyped("a rabbit right of a balloon", rng)
        words, before = wrong.split(" "), ["a", "rabbit", "right", "of", "a", "balloon"]
        changed = [(one, other) for one, other in zip(words, before, strict=True) if one != other]
        assert len(changed) <= 1 and "right" in words
        assert all(abs(len(one) - len(other)) <= 1 for one, other in changed)
    assert phrasings._mistyped("a fox", rng) == "a fox"


@pytest.mark.parametrize(
    ("one", "more"), [("fox", "foxes"), ("pony", "ponies"), ("monkey", "monkeys"), ("mouse", "mice"), ("bus", "buses")]
)
def test_plurals(one: str, more: str) -> None:
    assert plural(one) == more


def test_sentences_differ() -> None:
    rng = np.random.default_rng(0)
    said = [phrase(WHOLE, rng) for _ in range(500)]
    assert len(set(said)) > 490
    assert all(text[0] in string.ascii_letters for text in said)
