"""Facts -> the sentences by which people ask for a picture: a small grammar of English.

A sentence is a *core* (who, what and the side) in a *frame* (place and time around it), perhaps in a *request*, and
each of them is of a family. Of each kind a fifth of the families is held out: nobody trains on them, and a sentence of
an unseen phrasing has at least one of them.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from minigpt5.storybook.captions import Facts, with_article
from minigpt5.storybook.words import (
    ADJECTIVES,
    IRREGULAR_PLURALS,
    NAMES,
    PLACE_NOUNS,
    TIME_ADJECTIVES,
    TIME_NOUNS,
    WHEN,
    WHERE,
    pick,
)

Phrasing = Literal["seen", "unseen"]
Kind = Literal["sided", "pair", "alone", "placed", "timed", "both", "request"]

# {who} stands on the {side} of {what}, which is on the {other} side; {first} is the left one of the two.
FAMILIES: dict[Kind, dict[str, tuple[str, ...]]] = {
    "sided": {
        "who, to the side of": ("{who} to the {side} of {what}", "{who} standing {side} of {what}"),
        "what, to the side of": ("{what} to the {other} of {who}", "{what} that is {other} of {who}"),
        "both sides": ("{who} on the {side} and {what} on the {other}", "{who} on the {side}, {what} on the {other}"),
        "both sides, what first": ("{what} on the {other} and {who} on the {side}",),
        "side first": ("on the {side} {who}, on the {other} {what}", "on the {side} there is {who}, {other} {what}"),
        "its side": ("{what} with {who} on its {side}", "{what}, and on its {side} {who}"),
        "the side of it": ("{what} with {who} to the {side} of it", "{what}, and {who} to the {side} of it"),
        "the other side": (
            "{who} on the {side} side and {what} on the other side",
            "{who} {side}, {what} on the other side",
        ),
        "side of, who last": ("to the {side} of {what} {who}", "to the {side} of {what} there is {who}"),
        "beside, on the side": ("{who} beside {what}, on the {side}", "{who} next to {what}, on its {side} side"),
        "labels": ("{side}: {who}, {other}: {what}", "{side} {who}; {other} {what}"),
        "from left to right": ("from left to right {first} and {second}", "from left to right: {first}, {second}"),
        # Held out:
        "stands on the side of it": (
            "{what}. {Who} stands on the {side} of it",
            "{what}. {Who} is to the {side} of it",
        ),
        "side in brackets": ("{who} ({side}) and {what} ({other})",),
        "halves": (
            "the {side} half has {who}, the {other} half {what}",
            "{who} in the {side} half, {what} in the {other}",
        ),
    },
    "pair": {
        "and": ("{who} and {what}", "{what} and {who}"),
        "with": ("{who} with {what}", "{what} with {who}"),
        "next to": ("{who} next to {what}", "{what} next to {who}"),
        "beside": ("{who} beside {what}", "{what} beside {who}"),
        "near": ("{who} near {what}", "{who} close to {what}"),
        "beside it": ("{what} with {who} beside it", "{who} and beside it {what}"),
        "has": ("{who} that has {what}", "{who} who owns {what}"),
        "standing by": ("{who} standing by {what}", "{who} sitting by {what}"),
        # Held out:
        "together": ("{what} together with {who}", "{who} together with {what}"),
        "alongside": ("{who} alongside {what}",),
    },
    "alone": {
        "name": ("{who}",),
        "there is": ("there is {who}",),
        "standing": ("{who} standing there",),
        "all alone": ("{who}, all alone",),
        # Held out:
        "nobody but": ("nobody but {who}",),
    },
    "placed": {
        "after": ("{core} {where}", "{core}, {where}"),
        "before": ("{where}, {core}", "{where} {core}"),
        "noun with": ("{a_place} with {core}", "{a_place} and {core}"),
        "background": ("{core}, {place} in the background", "{core} with {a_place} behind"),
        "in brackets": ("{core} ({place})",),
        "place scene": ("{place} scene with {core}", "{place} scene: {core}"),
        # Held out:
        "colon": ("{place}: {core}", "{where}: {core}"),
    },
    "timed": {
        "after": ("{core} {when}", "{core}, {when}"),
        "before": ("{when}, {core}", "{when} {core}"),
        "it is": ("{core}. It is {time}", "it is {time}. {Core}"),
        "adjective": ("{a_lit} scene with {core}", "{a_lit} picture of {core}"),
        "in brackets": ("{core} ({time})",),
        # Held out:
        "dash": ("{core} - {time}", "{time} - {core}"),
    },
    "both": {
        "after": ("{core} {where} {when}", "{core} {when} {where}", "{core}, {where}, {when}"),
        "place before": ("{where}, {core} {when}", "{where} {core}, {when}"),
        "time before": ("{when}, {core} {where}", "{when} {core} {where}"),
        "both before": ("{where} {when}, {core}", "{when} {where}, {core}"),
        "adjective and noun": ("{a_lit} {place} with {core}", "{a_lit} {place} and {core}"),
        "background": ("{core} {when}, {place} in the background", "{core}, {lit} {place} in the background"),
        "it is": ("{core} {where}. It is {time}", "it is {time} {where}. {Core}"),
        "colon": ("{where} {when}: {core}", "{when} {where}: {core}"),
        "in brackets": ("{core} ({place}, {time})", "{core} ({time}, {place})"),
        "heading": ("{lit} {place}: {core}", "{lit} {place}. {Core}"),
        "short sentences": ("{place}. {Time}. {Core}", "{time}. {Place}. {Core}"),
        "place scene": ("{place} scene with {core}, {time}", "{time}: {place} scene with {core}"),
        # Held out:
        "list": ("{place}, {time}, {core}", "{core}; {place}; {time}"),
        "setting": ("{core}. The place: {place}. The time: {time}",),
    },
    "request": {
        "picture of": ("a picture of {text}", "a drawing of {text}", "an image of {text}", "an illustration of {text}"),
        "draw me": ("draw me {text}", "draw {text}", "please draw {text}"),
        "can you": ("can you show {text}?", "could you draw {text}?", "can you paint {text} for me?"),
        "show me": ("show me {text}", "please show me {text}"),
        "we see": ("we see {text}", "here we see {text}"),
        "I want": ("I want to see {text}", "I want a picture of {text}"),
        "look like": ("what does {text} look like?",),
        # Held out:
        "would like": ("I would like a drawing of {text}", "I'd love to see {text}"),
        "give me": ("give me {text}", "make me an image with {text}"),
    },
}
HELD_OUT: dict[Kind, tuple[str, ...]] = {
    "sided": ("stands on the side of it", "side in brackets", "halves"),
    "pair": ("together", "alongside"),
    "alone": ("nobody but",),
    "placed": ("colon",),
    "timed": ("dash",),
    "both": ("list", "setting"),
    "request": ("would like", "give me"),
}
QUESTIONS: dict[Phrasing, tuple[str, ...]] = {
    "seen": (
        "Describe this image.",
        "What is in it?",
        "What do you see?",
        "What is in this picture?",
        "Tell me what this picture shows.",
        "Can you describe the picture?",
        "What does this image show?",
        "Please describe what you see.",
    ),
    "unseen": ("What can be seen here?", "Say in one sentence what the picture is of."),
}
"""Ways to ask for a description; nobody trains on the unseen ones."""
REQUESTS, TYPING_ERRORS, LOWER_CASE, BARE, PLURAL, ADJECTIVE = 0.4, 0.05, 0.4, 0.1, 0.03, 0.4
"""Shares of sentences, and of names."""


def families(kind: Kind, phrasing: Phrasing) -> list[str]:
    """Names of the families of a kind that are trained on, or that are not."""
    return [name for name in FAMILIES[kind] if (name in HELD_OUT[kind]) == (phrasing == "unseen")]


def phrase(
    facts: Facts, rng: np.random.Generator, phrasing: Phrasing = "seen", *, typing_errors: float = TYPING_ERRORS
) -> str:
    """One of the ways to say `facts`, whose `who` has to be known. Of an unseen phrasing one part, drawn by chance, is
    of a held-out family; the others are of any. `typing_errors`: the share of sentences with one."""
    if facts.who is None:
        raise ValueError("facts have no who, which every phrasing names")
    kinds: list[Kind] = ["alone" if facts.what is None else "sided" if facts.side else "pair"]
    if facts.place or facts.time:
        kinds.append("both" if facts.place and facts.time else "placed" if facts.place else "timed")
    unseen = pick([*kinds, "request"], rng) if phrasing == "unseen" else None
    asks = unseen == "request" or rng.random() < REQUESTS
    words, text = _words(facts, rng), ""
    for kind in kinds:
        patterns = _patterns(kind, phrasing, unseen)
        nouns = [pattern for pattern in patterns if _is_noun(pattern)]
        asks = asks and bool(nouns)
        text = pick(nouns if asks else patterns, rng).format(core=text, Core=_raised(text), **words)
    if asks:
        text = pick(_patterns("request", phrasing, unseen), rng).format(text=text)
    return _as_typed(text, rng, typing_errors)


def _patterns(kind: Kind, phrasing: Phrasing, unseen: Kind | None) -> list[str]:
    names = list(FAMILIES[kind]) if unseen not in (None, kind) else families(kind, phrasing)
    return [pattern for name in names for pattern in FAMILIES[kind][name]]


def _is_noun(pattern: str) -> bool:
    """Whether a pattern makes one thing to be asked for, and no sentence of its own."""
    return pattern.startswith(("{who}", "{what}", "{core}", "{a_")) and not {".", ":", ";", "-"} & set(pattern)


def _words(facts: Facts, rng: np.random.Generator) -> dict[str, str]:
    """What the slots of a pattern are filled with."""
    assert facts.who
    who = _thing(facts.who, rng)
    words = {"who": who, "Who": _raised(who)}
    if facts.what:
        words["what"] = what = _thing(facts.what, rng)
        if facts.side:
            words |= {"side": facts.side, "other": "right" if facts.side == "left" else "left"}
            words["first"], words["second"] = (who, what) if facts.side == "left" else (what, who)
    if facts.place:
        place = pick(PLACE_NOUNS[facts.place], rng)
        words |= {"where": pick(WHERE[facts.place], rng), "place": place, "a_place": with_article(place)}
        words["Place"] = _raised(place)
    if facts.time:
        lit = pick(TIME_ADJECTIVES[facts.time], rng)
        words |= {"when": pick(WHEN[facts.time], rng), "time": pick(TIME_NOUNS[facts.time], rng)}
        words |= {"lit": lit, "a_lit": with_article(lit), "Time": _raised(words["time"])}
    return words


def _thing(key: str, rng: np.random.Generator) -> str:
    """A name with what stands before it."""
    name = pick(NAMES[key], rng)
    adjective = f"{pick(ADJECTIVES, rng)} " if rng.random() < ADJECTIVE else ""
    drawn = rng.random()
    if drawn < PLURAL:
        return f"{adjective}{plural(name)}"
    if drawn < PLURAL + BARE:
        return f"{adjective}{name}"
    if drawn < PLURAL + 2 * BARE:
        return f"the {adjective}{name}"
    return with_article(name, adjective)


def plural(name: str) -> str:
    """More than one, as people write it."""
    if name in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[name]
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    head, of, rest = name.partition(" of ")
    return f"{head}s{of}{rest}"


def _as_typed(text: str, rng: np.random.Generator, typing_errors: float) -> str:
    """With a full stop and a capital, or in small letters; a few with an error of typing."""
    if rng.random() < typing_errors:
        text = _mistyped(text, rng)
    if rng.random() < LOWER_CASE:
        return text.lower()
    text = _raised(text)
    return text if text[-1] in ".?!" or rng.random() < 0.3 else f"{text}."


def _mistyped(text: str, rng: np.random.Generator) -> str:
    """One error inside of one longer word."""
    words = text.split(" ")
    long = [index for index, word in enumerate(words) if len(word) > 4 and word.isalpha() and word != "right"]
    if not long:
        return text
    index = pick(long, rng)
    word, place = words[index], int(rng.integers(1, len(words[index]) - 2))
    words[index] = {
        0: word[:place] + word[place + 1 :],
        1: word[:place] + word[place] + word[place:],
        2: word[:place] + word[place + 1] + word[place] + word[place + 2 :],
    }[int(rng.integers(3))]
    return " ".join(words)


def _raised(text: str) -> str:
    return text[:1].upper() + text[1:]
