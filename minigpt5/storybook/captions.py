"""Scene -> captions in many phrasings, and the words of the world: how each thing, place and time is called."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace

import numpy as np

from minigpt5.storybook.scenes import CHARACTERS, OBJECTS, Scene
from minigpt5.storybook.words import pick

SHORT_NAMES = {
    "rabbit-face": "rabbit",
    "cow-face": "cow",
    "evergreen-tree": "pine tree",
    "palm-tree": "palm tree",
    "red-apple": "apple",
    "automobile": "car",
    "locomotive": "train",
    "wrapped-gift": "gift",
    "birthday-cake": "cake",
    "soccer-ball": "ball",
}
PLACE_PHRASES = {
    "meadow": ("in the meadow", "on the green meadow", "in a grassy meadow"),
    "beach": ("on the beach", "at the beach by the sea", "on a sandy beach"),
    "snow": ("in the snow", "on the white snow", "in deep snow"),
    "forest": ("in the forest", "in a dark green forest", "at the edge of the forest"),
    "road": ("on the road", "by the road", "on a grey road"),
    "desert": ("in the desert", "in the hot desert", "on the desert sand"),
}
TIME_PHRASES = {
    "day": ("on a sunny day", "in the sunshine", "under a blue sky"),
    "sunset": ("at sunset", "in the evening light", "under an orange sunset sky"),
    "night": ("at night", "under the moon", "on a starry night"),
    "rain": ("in the rain", "on a rainy day", "under grey rain clouds"),
}
ADJECTIVES = ("", "", "", "little ", "happy ", "brave ", "curious ", "big ")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a text says of a picture; None: not said."""

    who: str | None = None
    what: str | None = None
    side: str | None = None
    place: str | None = None
    time: str | None = None

    @classmethod
    def of(cls, scene: Scene) -> Facts:
        return cls(who=scene.who, what=scene.what, side=scene.side, place=scene.place, time=scene.time)


FACTS = tuple(field.name for field in fields(Facts))


def name_of(key: str) -> str:
    """A sprite's key -> its everyday name."""
    return SHORT_NAMES.get(key, key.replace("-", " "))


KEY_OF = {name_of(key): key for key in (*CHARACTERS, *OBJECTS)}


def with_article(name: str, adjective: str = "") -> str:
    words = adjective + name
    return f"{'an' if words[0] in 'aeiou' and not words.startswith('uni') else 'a'} {words}"


def canonical_caption(facts: Facts) -> str:
    """The one phrasing in which a picture is described to the diffusion model: side, who, what, place, time.

    The side has a word of its own, the first, where the text encoder's states of "left" and "right" differ most; said
    of both things ("a fox on the left, a house on the right") the two captions are nearly one to it. The order is the
    same for either side: a mapper in doubt about the side would else blend two orders of all words.
    """
    side = facts.side if facts.who else {"left": "right", "right": "left", None: None}[facts.side]
    parts = [with_article(name_of(key)) for key in (facts.who, facts.what) if key is not None]
    if facts.place:
        parts.append(PLACE_PHRASES[facts.place][0])
    if facts.time:
        parts.append(TIME_PHRASES[facts.time][0])
    return f"{side or 'somewhere'}: {', '.join(parts)}"


def draw_facts(scene: Scene, rng: np.random.Generator, *, complete: float = 0.5) -> Facts:
    """All facts of a scene with probability `complete`, else each one dropped by chance; who is always named."""
    facts = Facts.of(scene)
    if rng.random() < complete:
        return facts
    kept = {name: getattr(facts, name) for name in ("what", "side", "place", "time") if rng.random() < 0.6}
    return Facts(who=facts.who, **kept)


def write_caption(facts: Facts, rng: np.random.Generator) -> str:
    """One of many ways to say `facts`."""
    who = with_article(name_of(facts.who), pick(ADJECTIVES, rng)) if facts.who else "someone"
    where = pick(PLACE_PHRASES[facts.place], rng) if facts.place else ""
    when = pick(TIME_PHRASES[facts.time], rng) if facts.time else ""
    other = "right" if facts.side == "left" else "left"
    if facts.what:
        what = with_article(name_of(facts.what))
        if facts.side:
            core = pick(
                (
                    f"{who} to the {facts.side} of {what}",
                    f"{who} on the {facts.side} and {what} on the {other}",
                    f"{what} on the {other} and {who} on the {facts.side}",
                    f"on the {facts.side} {who}, on the {other} {what}",
                    f"{who} on the {facts.side}, {what} on the {other}",
                    f"{what} to the {other} of {who}",
                ),
                rng,
            )
        else:
            together = (f"{who} and {what}", f"{who} with {what}", f"{who} next to {what}", f"{what} beside {who}")
            core = pick(together, rng)
    else:
        core = who + (f" on the {facts.side}" if facts.side else "")
    details = [part for part in (where, when) if part]
    if rng.random() < 0.5:
        details.reverse()
    if details and rng.random() < 0.25:
        text = f"{details[0]}, {core}" + (f" {details[1]}" if len(details) > 1 else "")
    else:
        text = " ".join([core, *details]) if rng.random() < 0.7 else ", ".join([core, *details])
    if rng.random() < 0.15:
        text = pick(("a picture of ", "a drawing of ", "we see "), rng) + text
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:] + "."
    return text


_PLACE_WORDS = {"meadow": "meadow|grass|grassy", "beach": "beach|sea|shore", "snow": "snow|snowy"}
_TIME_WORDS = {
    "day": "sunny|sunshine|blue sky|sun|morning",
    "sunset": "sunset|evening",
    "night": "night|moon|starry|stars",
    "rain": "rain|rainy|raining",
}
PLACE_PATTERNS = {p: re.compile(rf"\b({_PLACE_WORDS.get(p, p)})\b") for p in PLACE_PHRASES}
TIME_PATTERNS = {t: re.compile(rf"\b({words})\b") for t, words in _TIME_WORDS.items()}
_NAME_PATTERN = re.compile(r"\b(" + "|".join(sorted(map(re.escape, KEY_OF), key=len, reverse=True)) + r")s?\b")


def facts_in(text: str) -> Facts:
    """What a text in the world's language names, the first of each kind: who, what, place, time (not the side)."""
    lower = text.lower()
    found = [KEY_OF[match.group(1)] for match in _NAME_PATTERN.finditer(lower)]
    return Facts(
        who=next((key for key in found if key in CHARACTERS), None),
        what=next((key for key in found if key in OBJECTS), None),
        place=_first(PLACE_PATTERNS, lower),
        time=_first(TIME_PATTERNS, lower.replace("sunset", "sunset ")),
    )


def facts_of_canonical(caption: str) -> Facts:
    """The inverse of `canonical_caption`."""
    facts = facts_in(caption)
    side = caption.partition(":")[0]
    if side not in ("left", "right"):
        return facts
    other = "right" if side == "left" else "left"
    return replace(facts, side=side if facts.who else other)


def _first(patterns: dict[str, re.Pattern[str]], text: str) -> str | None:
    hits = {key: match.start() for key, pattern in patterns.items() if (match := pattern.search(text))}
    return min(hits, key=hits.__getitem__) if hits else None
