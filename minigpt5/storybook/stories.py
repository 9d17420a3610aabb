"""A number -> a picture story of the world, page by page, with the scene and the facts of every page.

`page_facts` is the inverse: it reads pages and returns cast, place and time, to score written stories.
The sentences that it is written in are in sentences.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from minigpt5.storybook.captions import PLACE_PHRASES, TIME_PHRASES, Facts, facts_in, name_of, with_article
from minigpt5.storybook.scenes import PLACES, Scene, Split, scene_at
from minigpt5.storybook.sentences import (
    ADJECTIVES,
    BEGINNINGS,
    CARRYING,
    ENDS,
    JOURNEYS,
    LONG_WISHES,
    MOVES,
    NAMES,
    PLACE_NAMES,
    PLOTS,
    PROMPTS,
    RESTS,
    SHORT_WISHES,
    SIDES,
    TIME_LEADS,
    WISHES,
)
from minigpt5.storybook.words import pick

PAGE_WORDS = (8, 30)
_NUM_PAGES = {4: 0.6, 5: 0.14, 6: 0.12, 7: 0.07, 8: 0.07}


@dataclass(frozen=True, kw_only=True)
class StoryPage:
    """One page: its text, its picture's scene, and all that is known once the page is read."""

    text: str
    scene: Scene
    facts: Facts
    """Who, what, place and time so far; the side only where this page's text says it."""


@dataclass(frozen=True, kw_only=True)
class StoryText:
    """A story and what a user would type to get it.

    Example: story_at(7, seed=0).pages[1].text is
    "In the rain, the butterfly heard a strange noise and hid behind it."
    """

    prompt: str
    pages: tuple[StoryPage, ...]


def story_at(
    index: int,
    *,
    seed: int,
    split: Split = "train",
    num_pages: int | None = None,
    held_out_pairs: bool | None = False,
) -> StoryText:
    """Story number `index` of 1 to 8 pages: a pure function of its arguments, like `scene_at`."""
    if num_pages is not None and not 1 <= num_pages <= 8:
        raise ValueError(f"num_pages is {num_pages} but must be from 1 to 8, or None to draw it")
    first = scene_at(index, seed=seed, split=split, held_out_pairs=held_out_pairs)
    rng = np.random.default_rng([first.seed, 1])
    if num_pages is None:
        num_pages = int(rng.choice(list(_NUM_PAGES), p=list(_NUM_PAGES.values())))
    scenes = _scenes(first, num_pages, rng)
    voice = _Voice.draw(first, rng)
    plot = pick(PLOTS, rng)
    wish = pick(WISHES, rng)
    pages = []
    for number, (role, scene) in enumerate(zip(_roles(num_pages), scenes, strict=True)):
        while True:
            before = scenes[number - 1] if number else None
            text, said_side = _write_page(role, scene, before, voice, plot, wish, rng)
            if PAGE_WORDS[0] <= len(text.split()) <= PAGE_WORDS[1]:
                break
        facts = Facts.of(scene)
        pages.append(StoryPage(text=text, scene=scene, facts=facts if said_side else replace(facts, side=None)))
    return StoryText(prompt=_write_prompt(first, rng), pages=tuple(pages))


def page_facts(pages: Sequence[str], prompt: str = "") -> list[Facts]:
    """What each page of a story in the world's language shows, with cast, place and time kept from before it.

    A page that names the character so far, by its kind or its name, keeps it; naming only another changes it.
    """
    known, name = replace(facts_in(prompt), side=None), None
    found = []
    for number, text in enumerate(pages):
        named, lower = facts_in(text), text.lower()
        says_who = _says(lower, known.who) or (name is not None and re.search(rf"\b{name}\b", lower) is not None)
        known = Facts(
            who=known.who if number and says_who else named.who or known.who,
            what=known.what if number and _says(lower, known.what) else named.what or known.what,
            place=named.place or known.place,
            time=named.time or known.time,
        )
        if given := _GIVEN_NAME.search(text):
            name = given.group(1).lower()
        side = _SIDE.search(lower)
        found.append(replace(known, side=side.group(1) if side else None))
    return found


_GIVEN_NAME = re.compile(r"\b(?:named|called) ([A-Z]\w+)")
_SIDE = re.compile(r"\b(?:on|to) the (left|right)\b")
"""The first side of a text is the character's."""


def _says(lower: str, key: str | None) -> bool:
    return key is not None and re.search(rf"\b{re.escape(name_of(key))}s?\b", lower) is not None


def _roles(num_pages: int) -> list[str]:
    """What each page does for the story; short stories wish on their first page."""
    middle = {
        1: [],
        2: [],
        3: ["obstacle"],
        4: ["obstacle", "turn"],
        5: ["wish", "obstacle", "turn"],
        6: ["wish", "journey", "obstacle", "turn"],
        7: ["wish", "journey", "obstacle", "rest", "turn"],
        8: ["wish", "journey", "journey", "obstacle", "rest", "turn"],
    }[num_pages]
    return ["begin", *middle, "end"][:num_pages]


_NEXT_TIMES = {
    "day": ("sunset", "sunset", "night", "rain"),
    "sunset": ("night", "night", "day", "rain"),
    "night": ("day", "day", "rain", "sunset"),
    "rain": ("day", "sunset", "night"),
}


def _scenes(first: Scene, num_pages: int, rng: np.random.Generator) -> list[Scene]:
    """The same cast throughout; from three pages on, place and time change at least once each."""
    while True:
        scenes = [first]
        while len(scenes) < num_pages:
            place, time = scenes[-1].place, scenes[-1].time
            if rng.random() < 0.45:
                place = pick([other for other in PLACES if other != place], rng)
            if rng.random() < 0.45:
                time = pick(_NEXT_TIMES[time], rng)
            side: Literal["left", "right"] = "left" if rng.random() < 0.5 else "right"
            scenes.append(replace(first, place=place, time=time, side=side, seed=int(rng.integers(2**31))))
        if num_pages < 3 or (len({s.place for s in scenes}) > 1 and len({s.time for s in scenes}) > 1):
            return scenes


@dataclass(kw_only=True)
class _Voice:
    """How one story speaks of its cast."""

    name: str
    pronouns: tuple[str, str, str]
    """he, him, his"""
    kind: str
    introduced: str
    thing: str
    carrying: tuple[str, str]
    """carried {O}, carry {O}"""
    said: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def draw(cls, scene: Scene, rng: np.random.Generator) -> _Voice:
        gender = pick(("he", "he", "she", "she", "it"), rng)
        gender = {"princess": "she", "snowman": "he"}.get(scene.who, gender)
        names = NAMES["he"] + NAMES["she"] if gender == "it" else NAMES[gender]
        return cls(
            name=pick(names, rng),
            pronouns={"he": ("he", "him", "his"), "she": ("she", "her", "her"), "it": ("it", "it", "its")}[gender],
            kind=name_of(scene.who),
            introduced=with_article(name_of(scene.who), pick(ADJECTIVES, rng)),
            thing=name_of(scene.what),
            carrying=pick(CARRYING.get(scene.what, CARRYING["small"]), rng),
        )

    def speak(self, template: str, rng: np.random.Generator) -> str:
        """Fill a page's template from left to right; a character that was named before becomes a pronoun."""
        self.said = {}
        text = template.replace("{carried}", self.carrying[0]).replace("{carry}", self.carrying[1])
        text = re.sub(r"\{(\w+)\}", lambda match: self._word(match.group(1), rng), text)
        return re.sub(r"(^|[.!?] )(\w)", lambda match: match.group(1) + match.group(2).upper(), text)

    def _word(self, slot: str, rng: np.random.Generator) -> str:
        he, him, his = self.pronouns
        if slot in ("A", "who", "N"):
            self.said["O" if slot == "A" else "S"] = True
            return {"A": with_article(self.thing), "who": self.introduced, "N": self.name}[slot]
        if slot in ("o", "h"):
            return him if slot == "o" else his
        if slot in ("S", "M"):
            pronoun = he if slot == "S" else him
            again = self.said.setdefault("S", False)
            self.said["S"] = True
            return pronoun if again else pick((*[self.name] * 3, pronoun, pronoun, f"the {self.kind}"), rng)
        again = self.said.setdefault("O", False)
        self.said["O"] = True
        if he == "it":  # one "it" is enough
            return pick((f"the {self.thing}", f"the {self.thing}", "its treasure"), rng)
        if again:
            return pick(("it", "it", f"the {self.thing}"), rng)
        return pick((f"the {self.thing}", f"the {self.thing}", "it", "it", f"{his} treasure"), rng)


def _write_page(
    role: str,
    scene: Scene,
    before: Scene | None,
    voice: _Voice,
    plot: Mapping[str, Sequence[str]],
    wish: Mapping[str, Sequence[str]],
    rng: np.random.Generator,
) -> tuple[str, bool]:
    """The text of a page, and whether it says the side."""
    if before is None:
        template = pick(BEGINNINGS, rng).format_map(_Kept(where=_where(scene, rng), when=_when(scene, rng)))
        if role == "begin" and rng.random() < 0.85:
            template += f" {pick(SHORT_WISHES, rng).replace('{wish}', pick(wish['to'], rng))}"
    else:
        if role == "wish":
            sentence = pick(LONG_WISHES, rng).replace("{wish}", pick(wish["to"], rng))
        elif role == "end":
            sentence = pick(wish["end"] if rng.random() < 0.6 else ENDS, rng)
        else:
            sentence = pick({"journey": JOURNEYS, "rest": RESTS, **plot}[role], rng)
        template = _lead(scene, before, rng) + sentence
    says_side = rng.random() < 0.2
    if says_side:
        other = "right" if scene.side == "left" else "left"
        template += " " + pick(SIDES, rng).replace("{side}", scene.side).replace("{other}", other)
    return voice.speak(template, rng), says_side


class _Kept(dict):
    """A mapping for str.format_map that leaves the slots it does not know."""

    def __missing__(self, slot: str) -> str:
        return "{" + slot + "}"


def _lead(scene: Scene, before: Scene, rng: np.random.Generator) -> str:
    """What opens a later page: the new time and place, or a look at the old ones, or nothing."""
    leads = [lead for lead in TIME_LEADS[scene.time] if before.time == "rain" or "again" not in lead]
    time = pick(leads, rng) + ", " if scene.time != before.time else ""
    if scene.place != before.place:
        return time + pick(MOVES, rng).replace("{to}", pick(PLACE_NAMES[scene.place], rng)) + ". "
    if time:
        return time
    return pick(("", "", "there, ", "there ", f"{_where(scene, rng)}, ", f"{_when(scene, rng)}, "), rng)


def _where(scene: Scene, rng: np.random.Generator) -> str:
    return pick(PLACE_PHRASES[scene.place], rng)


def _when(scene: Scene, rng: np.random.Generator) -> str:
    return pick(TIME_PHRASES[scene.time], rng)


def _write_prompt(scene: Scene, rng: np.random.Generator) -> str:
    who = with_article(name_of(scene.who), pick(ADJECTIVES, rng))
    text = pick(PROMPTS, rng).format(who=who, what=with_article(name_of(scene.what)))
    if rng.random() < 0.3:
        text += " " + _where(scene, rng)
    if rng.random() < 0.15:
        text += " " + _when(scene, rng)
    return text[0].upper() + text[1:] + ("." if rng.random() < 0.3 and text[-1] != "?" else "")
