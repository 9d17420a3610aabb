"""How people ask, in place of how the world's captions do: phrasing families that are trained on, and unseen ones.

Held-out scenes, all of their facts said by the grammar of minigpt5/storybook/phrasings.py, drawn by the default
request; and scenes that the model describes when it is asked in other words.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.drawing import draw, own_size
from benchmarks.pixels import png_of
from benchmarks.shares import share
from minigpt5.evaluation.world import facts_shown
from minigpt5.pipeline import MiniGPT5
from minigpt5.storybook.captions import Facts, facts_in
from minigpt5.storybook.phrasings import QUESTIONS, Phrasing, phrase
from minigpt5.storybook.scenes import draw_scene, scene_at
from minigpt5.storybook.scorer import Scorer

SEED = 35
DESCRIBED = ("who", "what", "place", "time")
KINDS: tuple[Phrasing, ...] = ("seen", "unseen")


def draw_phrasings(model: MiniGPT5, scorer: Scorer, num: int) -> dict[str, dict[str, dict[str, float]]]:
    """By kind of phrasing: the share of `num` pictures that show each fact, and all of them."""
    found = {}
    for kind in KINDS:
        facts = [Facts.of(scene_at(index, seed=SEED, split="heldout", held_out_pairs=True)) for index in range(num)]
        texts = [phrase(one, np.random.default_rng([SEED, index]), kind) for index, one in enumerate(facts)]
        right = facts_shown(draw(model, texts, own_size(model), seeds=range(num)), facts, scorer)
        found[kind] = {name: share(int(values.sum()), num) for name, values in right.items()}
    return found


def describe_questions(model: MiniGPT5, num: int) -> dict[str, dict[str, dict[str, float]]]:
    """By kind of question: the share of `num` descriptions that name each fact rightly; the questions take turns."""
    found = {}
    for kind in KINDS:
        right = dict.fromkeys(DESCRIBED, 0)
        for index in range(num):
            scene = scene_at(index, seed=SEED, split="heldout", held_out_pairs=True)
            questions = QUESTIONS[kind]
            said = facts_in(model.describe(png_of(draw_scene(scene)), questions[index % len(questions)]))
            for name in DESCRIBED:
                right[name] += getattr(said, name) == getattr(scene, name)
        found[kind] = {name: share(number, num) for name, number in right.items()}
    return found


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """What quality.json says of phrasings in short."""
    drawn, described = figures["phrasings"], figures["questions"]
    facts = ("who", "what", "side", "place", "time")
    return {
        **{f"unseen_phrasings_{name}": drawn["unseen"][name]["share"] for name in facts},
        "seen_all": drawn["seen"]["all"]["share"],
        "describe_unseen_min": min(one["share"] for one in described["unseen"].values()),
    }
