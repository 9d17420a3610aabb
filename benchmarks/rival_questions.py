"""What every rival is asked, and what its answers are per item: the same held-out rows for all.

Captions of held-out pairs that say every fact; pages of held-out stories after their true earlier pages, texts and
pictures; and the second speaker's turns of held-out dialogues. Figures of items: rival_figures.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.pixels import png_of
from benchmarks.quality import Asked, ask
from benchmarks.referring import KINDS, NUM_PAGES, AskedPage, count_shown
from benchmarks.referring import SEED as STORY_SEED
from minigpt5.evaluation.frechet import EfficientNetFeatures, extract
from minigpt5.evaluation.perceptual import Lpips
from minigpt5.evaluation.systems.face import AnswerPart, Question, System
from minigpt5.evaluation.text import rouge_l
from minigpt5.evaluation.world import facts_shown
from minigpt5.model.pixels import to_tensor
from minigpt5.storybook.dialogues import dialogue_at
from minigpt5.storybook.scenes import IMAGE_PX, draw_scene
from minigpt5.storybook.scorer import Scorer
from minigpt5.storybook.stories import story_at
from minigpt5.types import SDE_DPM_SOLVER, DrawSettings, InputImage, PromptPart, Role, Sampling

DRAW = DrawSettings(steps=8, guidance_scale=3.0, scheduler=SDE_DPM_SOLVER, width=IMAGE_PX, height=IMAGE_PX)
"""With the denoiser itself: the distilled one has no null condition, which an ablation is about."""
SAMPLING = Sampling(temperature=0.0, max_page_tokens=48)
DIALOGUE_SEED = 2110
FACTS = ("who", "what", "side", "place", "time", "all")


@dataclass(frozen=True, kw_only=True)
class Nums:
    """How many rows of each kind."""

    captions: int = 64
    stories: int = 16
    dialogues: int = 16


@dataclass(frozen=True, kw_only=True)
class AskedTurn:
    """A turn of a dialogue that is asked for."""

    question: Question
    reference: str
    has_picture: bool


Items = dict[str, Any]
"""Name -> a value for each item, which rival_figures.py reads. What a system does not do is not there."""


def measure(system: System, scorer: Scorer, nums: Nums, *, sheet: Path | None = None) -> Items:
    """Ask a system all that it answers. `sheet`: a PNG of the first pictures that it draws, below the true ones."""
    items: Items = {}
    if "picture" in system.kinds:
        asked = ask(nums.captions, held_out_pairs=True)
        drawn = _pictures(system, [_caption(one) for one in asked])
        items |= caption_items(drawn, asked, scorer)
        pages = asked_pages(nums.stories)
        shown = _pictures(system, [page_question(page) for page in pages])
        items |= story_items(shown, pages, scorer)
        if sheet:
            true = [np.stack([draw_scene(one.scene) for one in asked[:8]])]
            true += [np.stack([draw_scene(page.story.pages[page.number].scene) for page in pages[:8]])]
            save_sheet(sheet, [true[0], drawn[:8], true[1], shown[:8]])
    if "reply" in system.kinds:
        turns = asked_turns(nums.dialogues)
        answers = system.answer([turn.question for turn in turns])
        items |= dialogue_items(answers, turns, draws="picture" in system.kinds)
    return items


def _caption(one: Asked) -> Question:
    return Question(context=(one.caption,), wants="picture", seed=one.seed, sampling=SAMPLING, draw=DRAW)


def asked_pages(num: int) -> list[AskedPage]:
    """All pages but the first of `num` held-out stories."""
    stories = [
        story_at(index, seed=STORY_SEED, split="heldout", num_pages=NUM_PAGES, held_out_pairs=True)
        for index in range(num)
    ]
    return [AskedPage(story=story, other=story, number=number) for story in stories for number in range(1, NUM_PAGES)]


def page_question(page: AskedPage) -> Question:
    """A page's picture, after the texts and true pictures of those before it."""
    context: list[PromptPart] = []
    for past in page.story.pages[: page.number]:
        context += [past.text, InputImage(data=png_of(draw_scene(past.scene)))]
    return Question(
        context=(*context, page.text), wants="picture", is_page=True, seed=page.number, sampling=SAMPLING, draw=DRAW
    )


def asked_turns(num: int) -> list[AskedTurn]:
    """The turns of the one who answers in `num` held-out dialogues, each after the true ones before it."""
    found = []
    for index in range(num):
        context: list[PromptPart] = []
        for number, turn in enumerate(dialogue_at(index, seed=DIALOGUE_SEED, split="heldout", held_out_pairs=True)):
            if number % 2:
                question = Question(context=tuple(context), wants="reply", seed=index, sampling=SAMPLING, draw=DRAW)
                found.append(AskedTurn(question=question, reference=turn.text, has_picture=turn.scene is not None))
            context += [Role(name="assistant" if number % 2 else "user"), turn.text]
            context += [InputImage(data=png_of(draw_scene(turn.scene)))] if turn.scene else []
    return found


def _pictures(system: System, questions: Sequence[Question]) -> np.ndarray:
    """One picture for each question: (B, Y, X, 3) uint8."""
    answers = system.answer(questions)
    return np.stack([np.asarray(part) for parts in answers for part in parts if isinstance(part, Image.Image)])


def caption_items(drawn: np.ndarray, asked: Sequence[Asked], scorer: Scorer) -> Items:
    """Facts shown, distance to the true scene, and both pictures' features."""
    true = np.stack([draw_scene(one.scene) for one in asked])
    right = facts_shown(drawn, [one.facts for one in asked], scorer)
    network = EfficientNetFeatures()
    return {
        **{f"caption_{name}": right[name].astype(float).tolist() for name in FACTS},
        "lpips": Lpips()(to_tensor(drawn), to_tensor(true)).double().tolist(),
        "features_drawn": extract(list(drawn), network).tolist(),
        "features_true": extract(list(true), network).tolist(),
    }


def story_items(shown: np.ndarray, pages: Sequence[AskedPage], scorer: Scorer) -> Items:
    """By story, [right, asked] of the facts that pages name, and of those that they only refer to."""
    counts_KSF2 = count_shown(pages, scorer.score(shown))
    by_kind = dict(zip(KINDS, counts_KSF2.sum(axis=2).tolist(), strict=True))
    return {"story_named": by_kind["named"], "story_referred": by_kind["referred_to"]}


def dialogue_items(answers: Sequence[tuple[AnswerPart, ...]], turns: Sequence[AskedTurn], *, draws: bool) -> Items:
    """Texts beside the true ones, and for what draws [right, all] of the pictures that it drew and of those wanted."""
    said = [" ".join(part for part in parts if isinstance(part, str)) for parts in answers]
    true = [turn.reference for turn in turns]
    items: Items = {
        "said": said,
        "references": true,
        "rouge_l": [rouge_l([one], [other]) if one else 0.0 for one, other in zip(said, true, strict=True)],
    }
    if draws:
        drew = [any(isinstance(part, Image.Image) for part in parts) for parts in answers]
        right = [one and turn.has_picture for one, turn in zip(drew, turns, strict=True)]
        items["draw_precision"] = [[int(hit), int(one)] for hit, one in zip(right, drew, strict=True)]
        items["draw_recall"] = [[int(hit), int(turn.has_picture)] for hit, turn in zip(right, turns, strict=True)]
    return items


def save_sheet(path: Path, rows: Sequence[np.ndarray]) -> None:
    """Rows of pictures (B, Y, X, 3) as one PNG."""
    width = max(len(row) for row in rows)
    padded = [np.pad(row, ((0, width - len(row)), (0, 0), (0, 0), (0, 0)), constant_values=255) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in padded])).save(path)
