"""Do pictures show what their pages only refer to ("it", "there", a name), because earlier pages said it?

On given held-out stories, the facts of each page after the first are those that its text names and those that only
the pages before it know. Drawn four ways: from the vokens; from the vokens of the same page after another story's
beginning, which must show nothing of what the page refers to; and as a system of two stages would, through the
diffusion model's own text encoder, from the page's text alone and with as many earlier pages as fit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.drawing import own_size
from benchmarks.shares import of_groups, share_of_groups
from minigpt5.engine.denoising import denoise
from minigpt5.model.pixels import to_pixels
from minigpt5.pipeline import MiniGPT5
from minigpt5.storybook.captions import Facts, facts_in
from minigpt5.storybook.scorer import Scorer
from minigpt5.storybook.stories import StoryText, story_at
from minigpt5.types import StoryRequest, Vokens

SEED = 8
"""Seed of the held-out stories: not those that the model is asked to write itself."""
NUM_PAGES = 4
FACTS = ("who", "what", "place", "time")
KINDS = ("named", "referred_to")
VOKENS = "vokens"
BASELINES = "page_through_text_encoder", "page_and_earlier_ones_through_text_encoder"
WAYS = (VOKENS, "vokens_after_another_beginning", *BASELINES)
BATCH_SIZE = 24


@dataclass(frozen=True, kw_only=True)
class AskedPage:
    """A page to draw, with what it is drawn after."""

    story: StoryText
    other: StoryText
    """The story whose beginning takes the place of this story's."""
    number: int
    """From 0."""

    @property
    def text(self) -> str:
        return self.story.pages[self.number].text

    @property
    def facts(self) -> Facts:
        return self.story.pages[self.number].facts

    def beginning(self, story: StoryText) -> list[str]:
        return [page.text for page in story.pages[: self.number]]

    def kind(self, fact: str) -> str:
        return KINDS[getattr(facts_in(self.text), fact) != getattr(self.facts, fact)]


def reference(
    model: MiniGPT5,
    scorer: Scorer,
    text_encoder: nn.Module,
    num: int,
    *,
    ways: Collection[str] = WAYS,
    first_seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """By way of drawing: the share of facts that the pictures of `num` stories show, of those named and of those
    referred to, and the second over the first; and the lead over BASELINES. `num` is 2 or more: a story needs another
    one's beginning. `ways` are of WAYS, with the vokens; pictures have noise of `first_seed` and the seeds after it."""
    stories = [
        story_at(index, seed=SEED, split="heldout", num_pages=NUM_PAGES, held_out_pairs=True) for index in range(num)
    ]
    pages = [
        AskedPage(story=story, other=stories[index - 1], number=number)
        for index, story in enumerate(stories)
        for number in range(1, NUM_PAGES)
    ]
    conditions = {
        VOKENS: lambda page: _condition(model, page, page.story),
        "vokens_after_another_beginning": lambda page: _condition(model, page, page.other),
        "page_through_text_encoder": lambda page: text_encoder([page.text])[0],
        "page_and_earlier_ones_through_text_encoder": lambda page: text_encoder([_as_fits(page, text_encoder)])[0],
    }
    found: dict[str, dict[str, Any]] = {}
    counts = {}
    for way in ways:
        condition = conditions[way]
        null_1QD = model.decoder.null_1QD if way.startswith("vokens") else text_encoder([""])
        answers = scorer.score(_draw(model, [condition(page) for page in pages], null_1QD, first_seed))
        counts[way] = count_shown(pages, answers)
        found[way] = _shares(counts[way])
    leads = {way: _lead(counts[VOKENS], counts[way]) for way in BASELINES if way in ways}
    found["points_of_referred_facts_above"] = leads
    return found


def _condition(model: MiniGPT5, page: AskedPage, story: StoryText) -> torch.Tensor:
    """What the UNet reads of the page's vokens, after the beginning of `story`."""
    given = (*page.beginning(story), page.text)
    request = StoryRequest(prompt=(story.prompt,), pages=len(given), given=given)

    async def last_vokens() -> Vokens:
        events = [event async for event in model.generator.generate(request)]
        return [event for event in events if isinstance(event, Vokens)][-1]

    return model.decoder.condition(asyncio.run(last_vokens()))


def _as_fits(page: AskedPage, text_encoder: nn.Module) -> str:
    """The page's text after as many whole pages before it as the text encoder reads with it."""
    texts = [*page.beginning(page.story), page.text]
    fitting = page.text
    for first in range(page.number - 1, -1, -1):
        longer = " ".join(texts[first:])
        if len(text_encoder.tokenizer(longer)["input_ids"]) > text_encoder.num_positions:
            break
        fitting = longer
    return fitting


@torch.no_grad()
def _draw(model: MiniGPT5, conditions: Sequence[torch.Tensor], null_1QD: torch.Tensor, first_seed: int) -> np.ndarray:
    """(B, Y, X, 3) uint8, each page with a seed of its own."""
    drawn = []
    for start in range(0, len(conditions), BATCH_SIZE):
        batch_BQD = torch.stack(list(conditions[start : start + BATCH_SIZE]))
        drawn.append(
            denoise(
                model.decoder.diffusion,
                batch_BQD,
                null_1QD,
                seeds=[first_seed + start + number for number in range(len(batch_BQD))],
                draw=own_size(model),
                guidance_rescale=model.config.guidance_rescale,
            )
        )
    return to_pixels(torch.cat(drawn))


def count_shown(pages: Sequence[AskedPage], answers: Sequence[Facts]) -> np.ndarray:
    """By kind, story and fact, how many are right and how many were asked: (2, S, F, 2)."""
    stories = list(dict.fromkeys(id(page.story) for page in pages))
    counts_KSF2 = np.zeros((len(KINDS), len(stories), len(FACTS), 2), int)
    for page, answer in zip(pages, answers, strict=True):
        for number, fact in enumerate(FACTS):
            if (value := getattr(page.facts, fact)) is not None:
                place = KINDS.index(page.kind(fact)), stories.index(id(page.story)), number
                counts_KSF2[place] += getattr(answer, fact) == value, 1
    return counts_KSF2


def _shares(counts_KSF2: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, counts_SF2 in zip(KINDS, counts_KSF2, strict=True):
        of_facts = {**dict(zip(FACTS, counts_SF2.swapaxes(0, 1), strict=True)), "all": counts_SF2.sum(1)}
        found[kind] = {fact: share_of_groups(*counts_S2.T) for fact, counts_S2 in of_facts.items() if counts_S2.any()}
    named_S2, referred_S2 = counts_KSF2.sum(2)

    def ratio(counts: np.ndarray) -> np.ndarray:
        named_right, named, referred_right, referred = np.moveaxis(counts, -1, 0)
        return (referred_right / referred) / (named_right / named)

    return {**found, "referred_over_named": of_groups(ratio, np.concatenate([named_S2, referred_S2], axis=1))}


def _lead(counts_KSF2: np.ndarray, other_KSF2: np.ndarray) -> dict[str, float] | None:
    """Points of the facts that pages refer to, over another way of drawing the same pages."""
    right_S2, other_S2 = (counts[KINDS.index("referred_to")].sum(1) for counts in (counts_KSF2, other_KSF2))

    def points(counts: np.ndarray) -> np.ndarray:
        right, num, other_right = np.moveaxis(counts, -1, 0)
        return 100 * (right - other_right) / num

    return of_groups(points, np.concatenate([right_S2, other_S2[:, :1]], axis=1))
