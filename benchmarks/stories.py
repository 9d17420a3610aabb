"""Stories that the model writes itself from held-out prompts: what their pictures show, and how their texts are.

A parser of the world's language keeps cast, place and time so far, and the scorer says whether each page's picture
shows them. A text follows its prompt where some page has its character and its object. A sentence is copied where it
stands word for word in one of NUM_TRAINING_STORIES stories of the kind that the model has learnt from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.pixels import pixels_of
from benchmarks.shares import share, share_of_groups
from minigpt5.pipeline import MiniGPT5
from minigpt5.storybook.captions import Facts
from minigpt5.storybook.scorer import Scorer
from minigpt5.storybook.stories import StoryText, page_facts, story_at
from minigpt5.types import Story

SEED = 2310
NUM_PAGES = 4
NUM_TRAINING_STORIES = 5000
SHOWN_PX = 128
NUM_SHOWN = 5
"""Stories shown, of the best and of the worst."""
FACTS = ("who", "what", "place", "time")


@dataclass(frozen=True, kw_only=True)
class Told:
    """One story, with what it was to be."""

    asked: StoryText
    story: Story
    known: tuple[Facts, ...]
    """By each page's end."""
    shown: tuple[Facts | None, ...]
    """By each page's picture; None where it has none."""

    @property
    def wrong(self) -> list[str]:
        """What pictures do not show: page, fact, what it was to be and what is seen."""
        return [
            f"page {number}: {fact} {getattr(known, fact)}, seen {getattr(shown, fact)}"
            for number, (known, shown) in enumerate(zip(self.known, self.shown, strict=True), start=1)
            for fact in FACTS
            if shown and getattr(known, fact) is not None and getattr(shown, fact) != getattr(known, fact)
        ]

    @property
    def sentences(self) -> list[str]:
        return [sentence for page in self.story.pages for sentence in sentences_of(page.text)]


def tell(model: MiniGPT5, scorer: Scorer, num: int, *, first_seed: int = 0) -> list[Told]:
    """`num` stories of the model, each from the prompt of a held-out story with a held-out pair, one seed each."""
    told = []
    for index in range(num):
        asked = story_at(index, seed=SEED, split="heldout", num_pages=NUM_PAGES, held_out_pairs=True)
        story = model.write(asked.prompt, pages=NUM_PAGES, seed=first_seed + index, progress=False)
        pictures = [pixels_of(page.picture.png) for page in story.pages if page.picture]
        seen = iter(scorer.score(np.stack(pictures)) if pictures else ())
        known = page_facts([page.text for page in story.pages], asked.prompt)
        shown = tuple(next(seen) if page.picture else None for page in story.pages)
        told.append(Told(asked=asked, story=story, known=tuple(known), shown=shown))
    return told


def summary(told: Sequence[Told]) -> dict[str, object]:
    pictures = {}
    for fact in FACTS:
        answers = [
            [
                getattr(known, fact) == getattr(shown, fact)
                for known, shown in zip(one.known, one.shown, strict=True)
                if shown is not None and getattr(known, fact) is not None
            ]
            for one in told
        ]
        if any(answers):
            pictures[fact] = share_of_groups(np.array(list(map(sum, answers))), np.array(list(map(len, answers))))
    words = [re.findall(r"[\w']+", page.text.lower()) for one in told for page in one.story.pages]
    fours = [tuple(text[start : start + 4]) for text in words for start in range(len(text) - 3)]
    sentences = [sentence for one in told for sentence in one.sentences]
    known_sentences = training_sentences()
    return {
        "pictures": pictures,
        "stories_with_the_prompts_cast": share(sum(map(_follows_prompt, told)), len(told)),
        "stories_with_all_pages_and_pictures": share(
            sum(len(one.story.pages) == NUM_PAGES and None not in one.shown for one in told), len(told)
        ),
        "distinct_4_grams": share(len(set(fours)), len(fours)) if fours else None,
        "sentences_copied": share(sum(one in known_sentences for one in sentences), len(sentences))
        if sentences
        else None,
    }


def _follows_prompt(one: Told) -> bool:
    cast = one.asked.pages[0].facts
    found = page_facts([page.text for page in one.story.pages])
    return any((facts.who, facts.what) == (cast.who, cast.what) for facts in found)


def sentences_of(text: str) -> list[str]:
    return [sentence.strip() for sentence in re.split(r"(?<=[.!?])\s+", text) if sentence.strip()]


def training_sentences() -> set[str]:
    """Collect the sentences of NUM_TRAINING_STORIES stories such as the model has learnt from."""
    stories = (story_at(index, seed=1) for index in range(NUM_TRAINING_STORIES))
    return {sentence for story in stories for page in story.pages for sentence in sentences_of(page.text)}


def small(pixels: np.ndarray) -> np.ndarray:
    """A picture made smaller, to SHOWN_PX."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((SHOWN_PX, SHOWN_PX), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def save_books(told: Sequence[Told], folder: Path) -> None:
    """All texts as `books.json`, best first; as `books.png` the pictures of the best NUM_SHOWN, then of the worst."""
    ranked = sorted(told, key=lambda one: len(one.wrong))
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": one.asked.prompt, "pages": [page.text for page in one.story.pages], "wrong": one.wrong}
        for one in ranked
    ]
    (folder / "books.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    drawn = [one for one in ranked if any(one.shown)]
    chosen = [*drawn[:NUM_SHOWN], *drawn[NUM_SHOWN:][-NUM_SHOWN:]]
    if not chosen:
        return
    strips = [
        np.concatenate([small(pixels_of(page.picture.png)) for page in one.story.pages if page.picture], axis=1)
        for one in chosen
    ]
    width = max(strip.shape[1] for strip in strips)
    padded = [np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0)), constant_values=255) for strip in strips]
    Image.fromarray(np.concatenate(padded)).save(folder / "books.png")
