"""The picture world's training examples: a stage and a position -> an example, a pure function of the seed.

Shape letters: Y X rows and columns of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minigpt5.model.prompt import Task, Template
from minigpt5.model.published_template import PUBLISHED
from minigpt5.objective.example import Example
from minigpt5.published.data import Turn, mmdialog_samples, sample_segments
from minigpt5.storybook.captions import Facts, canonical_caption, draw_facts, write_caption
from minigpt5.storybook.dialogues import SHOWN, dialogue_at
from minigpt5.storybook.phrasings import QUESTIONS, phrase
from minigpt5.storybook.scenes import (
    CHARACTERS,
    IMAGE_PX,
    OBJECTS,
    PLACES,
    TIMES,
    Scene,
    draw_scene,
    is_held_out,
    scene_at,
    sprite_boxes,
)
from minigpt5.storybook.stories import story_at
from minigpt5.storybook.words import pick
from minigpt5.types import InputImage, PromptPart, Role
from training.data.written import write_out
from training.presets import DistillPreset, Preset, VisionPreset, VokenPreset
from training.storybook.presets import (
    DecoderPreset,
    RetrievePreset,
    SharpenPreset,
    UnetPreset,
    UpscalePreset,
    VaePreset,
)
from training.storybook.sprites import SPRITE_WEIGHT, error_weight, sprites_of

REQUESTS = 0.3
"""Share of requests for a picture among the questions of a chat; the others ask what a picture shows."""
TAUGHT_TYPING_ERRORS = 0.15
"""Share of captions with a typing error: three times as many as people make, so that they are learnt too."""
FACT_VALUES = {"who": CHARACTERS, "what": OBJECTS, "side": ("left", "right"), "place": PLACES, "time": TIMES}


@dataclass(frozen=True, kw_only=True, eq=False)
class Crop:
    """A part of a scene, four times of five with a sprite in it."""

    pixels: np.ndarray
    """(crop, crop, 3), uint8."""
    weight: np.ndarray
    """(1, crop, crop): how much an error counts at each pixel."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionedScene:
    """A whole scene with a caption that says some of its facts."""

    pixels: np.ndarray
    """(Y, X, 3), uint8."""
    caption: str
    canonical: str
    """The same facts in the canonical phrasing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionedCrops:
    """A captioned scene, and where two crops of it begin."""

    pixels: np.ndarray
    """(Y, X, 3), uint8."""
    caption: str
    weight: np.ndarray
    """(1, Y, X): how much an error counts at each pixel."""
    corners: list[tuple[int, int]]
    """Row and column of each crop."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightedScene:
    """A scene with a caption that says all of its facts."""

    scene: Scene
    caption: str
    pixels: np.ndarray
    """(Y, X, 3), uint8."""
    weight: np.ndarray
    """(1, Y, X): how much an error counts at each pixel."""
    masks: np.ndarray
    """(2, Y, X): where the sprites are."""


@dataclass(frozen=True)
class StorybookExamples:
    """The picture world, endlessly: every position has an example of its own, but for a preset's `num_examples`."""

    preset: Preset
    template: Template = PUBLISHED
    reads_pictures: bool = True

    def example_at(self, position: int) -> tuple[int, Any]:
        if isinstance(self.preset, VokenPreset) and self.preset.num_examples:
            position %= self.preset.num_examples
        example = example_at(self.preset, position, self.template)
        if isinstance(self.preset, VokenPreset) and isinstance(example, Example):
            example = write_out(example, self.preset.draws_by, reads_pictures=self.reads_pictures)
        return position, example


def example_at(
    preset: Preset, position: int, template: Template = PUBLISHED
) -> Crop | CaptionedScene | CaptionedCrops | WeightedScene | Example:
    """The example of a preset's stage at a position."""
    seed, rng = preset.seed, np.random.default_rng([preset.seed, position])
    match preset:
        case VaePreset():
            return _crop(seed, position, preset.crop_px, rng)
        case DecoderPreset():
            return _captioned_crops(preset, position, rng)
        case SharpenPreset() | UpscalePreset():
            return _weighted_scene(preset, position, rng)
        case UnetPreset():
            if preset.page_share and rng.random() < preset.page_share:
                return _told_scene(seed, position, rng)
            return _captioned_scene(seed, position, preset.canonical_share, rng)
        case RetrievePreset():
            return _caption(seed, position, rng, template)
        case DistillPreset():
            scene = _captioned_scene(seed, position, preset.canonical_share, rng)
            return Example(segments=[], read=[], drawn=[scene.pixels], captions=[scene.caption])
        case VisionPreset():
            return _description(seed, position, rng, template)
        case VokenPreset():
            choice = rng.random()
            if preset.stage == "align" or choice < preset.caption_share:
                return _caption(seed, position, rng, template, phrasing_share=preset.phrasing_share)
            until = preset.caption_share
            for share, make in (
                (preset.story_share, _story),
                (preset.dialogue_share, _turn),
                (preset.question_share, _question),
            ):
                until += share
                if choice < until:
                    return make(seed, position, rng, template)
            return _page(seed, position, rng, template)
    raise ValueError(f"stage {preset.stage} has no examples of the picture world: name a data set with --data")


def _crop(seed: int, position: int, crop_px: int, rng: np.random.Generator) -> Crop:
    scene = scene_at(position, seed=seed)
    y, x = _corner(scene, crop_px, rng)
    window = np.s_[y : y + crop_px, x : x + crop_px]
    return Crop(pixels=draw_scene(scene)[window], weight=_weight(scene)[(slice(None), *window)])


def _weighted_scene(preset: SharpenPreset | UpscalePreset, position: int, rng: np.random.Generator) -> WeightedScene:
    scene = scene_at(position, seed=preset.seed)
    facts = Facts.of(scene)
    is_canonical = rng.random() < preset.canonical_share
    return WeightedScene(
        scene=scene,
        caption=canonical_caption(facts) if is_canonical else write_caption(facts, rng),
        pixels=draw_scene(scene),
        weight=_weight(scene),
        masks=np.stack([sprite.mask() for sprite in sprites_of(scene)]),
    )


def _captioned_crops(preset: DecoderPreset, position: int, rng: np.random.Generator) -> CaptionedCrops:
    whole = _captioned_scene(preset.seed, position, preset.canonical_share, rng)
    scene = scene_at(position, seed=preset.seed)
    return CaptionedCrops(
        pixels=whole.pixels,
        caption=whole.caption,
        weight=_weight(scene),
        corners=[_corner(scene, preset.crop_px, rng) for _ in range(2)],
    )


def _corner(scene: Scene, crop_px: int, rng: np.random.Generator) -> tuple[int, int]:
    """Example and column where a crop begins."""
    boxes = list(sprite_boxes(scene).values())
    if rng.random() < 0.8:
        left, top, right, bottom = boxes[rng.integers(2)]
        x = (left + right - crop_px) // 2 + int(rng.integers(-16, 17))
        y = (top + bottom - crop_px) // 2 + int(rng.integers(-16, 17))
    else:
        x, y = (int(v) for v in rng.integers(0, IMAGE_PX - crop_px + 1, 2))
    y, x = (min(max(v, 0), IMAGE_PX - crop_px) for v in (y, x))
    return y, x


def _weight(scene: Scene) -> np.ndarray:
    return error_weight(sprites_of(scene), around=SPRITE_WEIGHT)


def _captioned_scene(seed: int, position: int, canonical_share: float, rng: np.random.Generator) -> CaptionedScene:
    scene = scene_at(position, seed=seed)
    facts = draw_facts(scene, rng)
    canonical = canonical_caption(facts)
    caption = canonical if rng.random() < canonical_share else write_caption(facts, rng)
    return CaptionedScene(pixels=draw_scene(scene), caption=caption, canonical=canonical)


def _told_scene(seed: int, position: int, rng: np.random.Generator) -> CaptionedScene:
    """A page of a story, whose text is the caption."""
    story = story_at(position, seed=seed)
    page = pick(story.pages, rng)
    return CaptionedScene(pixels=draw_scene(page.scene), caption=page.text, canonical=canonical_caption(page.facts))


def _description(seed: int, position: int, rng: np.random.Generator, template: Template) -> Example:
    scene = scene_at(position, seed=seed)
    facts = Facts.of(scene)
    return Example(
        segments=template.describe(write_caption(facts, rng)),
        read=[draw_scene(scene)],
        shown=[canonical_caption(facts)],
        drawn=[],
        captions=[],
    )


def _caption(
    seed: int, position: int, rng: np.random.Generator, template: Template, *, phrasing_share: float = 0.0
) -> Example:
    scene = scene_at(position, seed=seed)
    facts = draw_facts(scene, rng)
    is_asked = phrasing_share > 0 and rng.random() < phrasing_share
    return Example(
        segments=template.caption(_asked(facts, rng) if is_asked else write_caption(facts, rng)),
        read=[],
        drawn=[draw_scene(scene)],
        captions=[canonical_caption(facts)],
        contrasts=[_contrasts(facts, rng)],
        is_caption=True,
    )


def _asked(facts: Facts, rng: np.random.Generator) -> str:
    return phrase(facts, rng, typing_errors=TAUGHT_TYPING_ERRORS)


def _story(seed: int, position: int, rng: np.random.Generator, template: Template) -> Example:
    story = story_at(position, seed=seed)
    return Example(
        segments=template.story([story.prompt], len(story.pages), [page.text for page in story.pages]),
        prompt=story.prompt,
        read=[],
        drawn=[draw_scene(page.scene) for page in story.pages],
        captions=[canonical_caption(page.facts) for page in story.pages],
        contrasts=[_contrasts(page.facts, rng) for page in story.pages],
    )


def _contrasts(facts: Facts, rng: np.random.Generator) -> list[str]:
    """The canonical caption with each fact changed in turn, never to a pair that is held out."""
    captions = []
    for name, values in FACT_VALUES.items():
        changed = [replace(facts, **{name: value}) for value in values if value != vars(facts)[name]]
        others = [one for one in changed if not (one.who and one.what and is_held_out(one.who, one.what))]
        captions.append(canonical_caption(pick(others, rng)))
    return captions


def _turn(seed: int, position: int, rng: np.random.Generator, template: Template) -> Example:
    """One turn of a dialogue after those before it, as published."""
    said = dialogue_at(position, seed=seed)
    turns = [Turn(text=one.text, picture=str(at) if one.scene else None) for at, one in enumerate(said)]
    samples = list(mmdialog_samples(turns))
    sample = pick(samples, rng)
    read = [scene for at in sample.read if (scene := said[int(at)].scene)]
    drawn = said[int(sample.drawn)] if sample.drawn else None
    return Example(
        segments=sample_segments(sample, template),
        read=[draw_scene(scene) for scene in read],
        drawn=[draw_scene(drawn.scene)] if drawn and drawn.scene else [],
        captions=[canonical_caption(drawn.facts)] if drawn and drawn.facts else [],
        contrasts=[_contrasts(drawn.facts, rng)] if drawn and drawn.facts else [],
    )


def _question(seed: int, position: int, rng: np.random.Generator, template: Template) -> Example:
    """A turn of a chat: what a picture shows, at once or after it was asked for, or a request for a picture."""
    scene = scene_at(position, seed=seed)
    facts = draw_facts(scene, rng)
    request, shown = _asked(facts, rng), pick(SHOWN, rng)
    if rng.random() < REQUESTS:
        return Example(
            segments=[*template.reply([request], []), *template.answer(shown, draws=True)],
            read=[],
            drawn=[draw_scene(scene)],
            captions=[canonical_caption(facts)],
            contrasts=[_contrasts(facts, rng)],
        )
    picture, question = InputImage(data=b""), pick(QUESTIONS["seen"], rng)
    prompts: tuple[list[PromptPart], ...] = (
        [picture, question],
        [question, picture],
        [request, Role(name="assistant"), shown, picture, Role(name="user"), question],
    )
    return Example(
        segments=[*template.reply(pick(prompts, rng), []), *template.answer(write_caption(Facts.of(scene), rng))],
        read=[draw_scene(scene)],
        shown=[canonical_caption(Facts.of(scene))],
        drawn=[],
        captions=[],
    )


def _page(seed: int, position: int, rng: np.random.Generator, template: Template) -> Example:
    """One of the published tasks on one of a story's first three pages."""
    story = story_at(position, seed=seed)
    index = int(rng.integers(min(3, len(story.pages))))
    page, history = story.pages[index], story.pages[:index]
    tasks: tuple[Task, ...] = ("text", "picture", "both") if index else ("picture",)
    task = pick(tasks, rng)
    picture, read = draw_scene(page.scene), [draw_scene(past.scene) for past in history]
    segments = template.next_page([past.text for past in history], page.text, task, variant=int(rng.integers(6)))
    if task == "text":
        return Example(segments=segments, read=[*read, picture], drawn=[], captions=[])
    return Example(
        segments=segments,
        read=read,
        drawn=[picture],
        captions=[canonical_caption(page.facts)],
        contrasts=[_contrasts(page.facts, rng)],
    )
