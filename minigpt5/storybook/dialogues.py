"""A number -> a talk of two in the picture world: four to eight turns, and a picture only where it is called for.

The third of the published data sets, MMDialog, is of that kind: most turns are words alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from minigpt5.storybook.captions import PLACE_PHRASES, TIME_PHRASES, Facts, name_of, with_article
from minigpt5.storybook.scenes import Scene, Split, scene_at
from minigpt5.storybook.words import pick

GREETINGS = ("Hello! How was your day?", "Hi there, what did you do today?", "Good to see you. Any news?")
SEEN = ("I saw {who} {where}!", "You will not believe it: there was {who} {where}.", "I met {who} {where} {when}.")
CURIOUS = ("Really? Was it alone?", "Oh, nice. What was it doing?", "How lovely! Tell me more.")
WITH = ("No, it had {what} with it.", "It was sitting next to {what}.", "There was {what} beside it, {when}.")
WISHES = ("Can you show me?", "I would love to see that.", "Do you have a picture of it?", "Please draw it for me.")
SHOWN = ("Here it is.", "Look, this is what it looked like.", "Of course, like this:", "Here you are.")
THANKS = ("How beautiful, thank you!", "I like it very much.", "That is the best thing I have seen today.")
CLOSINGS = ("You are welcome.", "I am glad that you like it.", "See you tomorrow!", "Let us go there together.")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one of the two says; `scene` is the picture that goes with it."""

    text: str
    scene: Scene | None = None
    facts: Facts | None = None
    """What is known of the picture."""


def dialogue_at(
    index: int, *, seed: int, split: Split = "train", held_out_pairs: bool | None = False
) -> tuple[Turn, ...]:
    """Dialogue number `index`: a pure function of its arguments, like `scene_at`. Turns take turns, from the one who
    asks."""
    scene = scene_at(index, seed=seed, split=split, held_out_pairs=held_out_pairs)
    rng = np.random.default_rng([scene.seed, 2])

    def say(choices: Sequence[str]) -> str:
        words = pick(choices, rng).format(
            who=with_article(name_of(scene.who)),
            what=with_article(name_of(scene.what)),
            where=PLACE_PHRASES[scene.place][rng.integers(3)],
            when=TIME_PHRASES[scene.time][rng.integers(3)],
        )
        return words[0].upper() + words[1:]

    turns = [Turn(text=say(GREETINGS)), Turn(text=f"{say(SEEN)} It was {say(['{when}']).lower()}.")]
    if rng.random() < 0.75:
        turns += [Turn(text=say(CURIOUS)), Turn(text=say(WITH))]
    told = " ".join(turn.text for turn in turns)
    facts = Facts(who=scene.who, place=scene.place, time=scene.time)
    facts = replace(facts, what=scene.what) if name_of(scene.what) in told else facts
    if rng.random() < 0.8:
        turns += [Turn(text=say(WISHES)), Turn(text=say(SHOWN), scene=scene, facts=facts)]
    if len(turns) < 4 or rng.random() < 0.6:
        turns += [Turn(text=say(THANKS)), Turn(text=say(CLOSINGS))]
    return tuple(turns)
